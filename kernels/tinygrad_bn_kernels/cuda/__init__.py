"""Kernels for NVIDIA GPUs: Numba programs over contiguous arrays in device memory. `kernels/CUDA.md` describes them."""
