"""Hypothesis profiles, and what the suite needs on machines where others are missing it.

HYPOTHESIS_PROFILE is dev (default), ci, few, intense or mutants; all but intense take the same examples on every run.
`mutants` is `dev` without looking for the simplest counterexample: any will do.
"""

import os
import tempfile

import numba
import pytest
from hypothesis import HealthCheck, Phase, settings
from tinygrad_bn_kernels.cpu import jit

collect_ignore = ["benchmarks"]  # a program, and it needs the peers

COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}
settings.register_profile("dev", max_examples=15, derandomize=True, **COMMON)
settings.register_profile("mutants", settings.get_profile("dev"), phases=(Phase.explicit, Phase.generate))
settings.register_profile("few", max_examples=5, derandomize=True, **COMMON)
settings.register_profile("ci", max_examples=25, derandomize=True, **COMMON)
settings.register_profile("intense", max_examples=1000, **COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))


def pytest_configure(config):
    """Where no cache can be written, the processes of this run share one that ends with it."""
    try:
        jit.cache_folder()
    except RuntimeError:
        folder = tempfile.TemporaryDirectory()
        config.add_cleanup(folder.cleanup)
        os.environ |= {"NUMBA_CACHE_DIR": folder.name, "MPLCONFIGDIR": folder.name}


def pytest_runtest_setup(item):
    if numba.config.DISABLE_JIT and item.get_closest_marker("compiled"):
        pytest.skip("needs compiled kernels, without NUMBA_DISABLE_JIT")
