"""Kernels for the CPU: Numba loops over contiguous arrays."""
