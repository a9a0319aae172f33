"""Hypothesis profiles: HYPOTHESIS_PROFILE=dev (default), ci or intense; the same examples on every run but intense."""

import os

from hypothesis import HealthCheck, settings

collect_ignore = ["benchmarks"]  # a program, and it needs the peers

COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}
settings.register_profile("dev", max_examples=15, derandomize=True, **COMMON)
settings.register_profile("ci", max_examples=40, derandomize=True, **COMMON)
settings.register_profile("intense", max_examples=1000, **COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))
