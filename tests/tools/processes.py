"""Programs that tests run in a process of their own."""

import os
import subprocess
import sys


def python(program, **environment):
    """Start a Python process."""
    environment = {k: str(v) for k, v in environment.items()}
    command = [sys.executable, "-W", "ignore", "-c", program]
    return subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment}, stdout=-1, text=True
    )


def output(process):
    """What it has written, once it has ended well."""
    written, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    return written.strip()
