"""The generator that initialisers and dropout draw from unless they are given one."""

import numpy as np

_generator = np.random.default_rng()


def manual_seed(seed: int) -> np.random.Generator:
    """Restart the package's generator from `seed`, so that what follows is reproducible; gives it back."""
    global _generator
    _generator = np.random.default_rng(seed)
    return _generator


def generator() -> np.random.Generator:
    """The package's generator."""
    return _generator
