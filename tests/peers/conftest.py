"""Without a peer its tests are skipped; in CI they fail, so that a missing install shows."""

import os

if os.environ.get("CI"):
    import tensorboard  # noqa: F401
    import tensorboardX  # noqa: F401
    import torch  # noqa: F401
