"""Without PyTorch the tests of this folder are skipped; in CI they fail, so that a missing install shows."""

import os

if os.environ.get("CI"):
    import torch  # noqa: F401
