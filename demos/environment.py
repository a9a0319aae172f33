"""What the results of a run may depend on, beside its settings."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numba

from tinygrad_bn import cuda


def environment(command: str, gpu: bool) -> dict[str, Any]:
    """The command line, versions, the commit of the source, processor, threads and system; with `gpu`, the GPU."""
    return {
        "command": command,
        "python": platform.python_version(),
        **{name: _version(name) for name in ("tinygrad-bn", "numpy", "numba", "matplotlib")},
        "commit": _commit(),
        "system": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": numba.get_num_threads(),
        "variables": {k: v for k, v in os.environ.items() if k.endswith("_NUM_THREADS") or k.startswith("NUMBA_")},
        "gpu": cuda.info() if gpu else None,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # run from its source, not installed
        return None


def _commit() -> str | None:
    """The commit of the source, with "-dirty" if a file differs from it; None if this file is in no git repository."""
    if not _git("ls-files", Path(__file__).name):  # installed, perhaps into a folder of another repository
        return None
    return _git("describe", "--always", "--abbrev=40", "--dirty", "--exclude=*")


def _git(*arguments: str) -> str | None:
    command = ["git", *arguments]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, encoding="utf-8", check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip() or None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
