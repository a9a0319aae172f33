"""Programs in processes of their own, and functions on several Python threads."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor


def python(program, **environment):
    """Start a Python process."""
    environment = {k: str(v) for k, v in environment.items()}
    command = [sys.executable, "-W", "ignore", "-c", program]
    return subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment}, stdout=-1, text=True
    )


def output(process):
    """The output of a process that ends with status 0."""
    written, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    return written.strip()


def on_threads(function, count, meanwhile=lambda: None):
    """Run `function(i)` on `count` Python threads at once, and `meanwhile()` here; raise an error of any of them."""
    with ThreadPoolExecutor(count) as pool:
        running = [pool.submit(function, i) for i in range(count)]
        meanwhile()
        for each in running:
            each.result()
