"""Install the wheel and the sdist, each into an empty environment of each Python, and use what was installed.

python -m tests.tools.install [--dist FOLDER] [PYTHON ...]: versions or paths. A version that is not on this machine is
downloaded by uv; where that fails it is skipped, and named.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
UV = str(Path(sys.executable).with_name("uv"))
PYTHONS = ("3.11", "3.12", "3.13", "3.14")

PROGRAM = """
import sys
import tinygrad_bn
from tinygrad_bn import datasets, nn, train
assert tinygrad_bn.__file__.startswith(sys.prefix), tinygrad_bn.__file__
assert tinygrad_bn.__version__ == sys.argv[1], tinygrad_bn.__version__
tinygrad_bn.manual_seed(0)
digits, held_out = datasets.load("digits").scaled().split(297)
model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10))
history = train.fit(model, digits, validation=held_out, epochs=10, batch_size=50)
assert history["val_accuracy"][-1] > 0.8, history["val_accuracy"]
assert "pytest" not in sys.modules and "hypothesis" not in sys.modules
print(f"validation accuracy {history['val_accuracy'][-1]:.3f}")
"""


def run(*command: str, **options: object) -> str:
    """The output of a command. Raises CalledProcessError if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, **options)  # type: ignore[call-overload]
    if done.returncode:
        print(done.stdout, done.stderr, sep="\n", file=sys.stderr)
    done.check_returncode()
    return str(done.stdout)


def interpreter(python: str) -> str | None:
    """The path of a Python, which uv may download; None if there is none."""
    for command in ([UV, "python", "find"], [UV, "python", "install", "--quiet"], [UV, "python", "find"]):
        done = subprocess.run([*command, python], capture_output=True, text=True, cwd=tempfile.gettempdir())
        if done.returncode == 0 and done.stdout.strip():
            return done.stdout.strip()
    return None


def use(python: str, archive: Path, version: str) -> str:
    """Install `archive` for `python`, and train, run a demo with its claims, and make the table of kernels."""
    with tempfile.TemporaryDirectory(prefix="install-") as folder:
        environment = Path(folder) / "env"
        run(UV, "venv", "--quiet", "--no-project", "--python", python, str(environment))
        binary = environment / ("Scripts" if os.name == "nt" else "bin") / "python"
        run(UV, "pip", "install", "--quiet", "--python", str(binary), str(archive))
        isolated = (str(binary), "-I", "-W", "error")  # -I: nothing of the sources or of PYTHONPATH
        demo = run(*isolated, "-m", "tinygrad_bn_demos", "iris_mlp", "--check", "--out", f"{folder}/runs", cwd=folder)
        assert "iris" in demo.lower(), demo
        rows = run(*isolated, "-m", "tinygrad_bn", "kernels", cwd=folder).count(" cpu ")
        assert rows > 20, "the table of kernels is short"
        return f"{run(*isolated, '-c', PROGRAM, version, cwd=folder).splitlines()[-1]}, {rows} rows of kernels"


def main() -> int:
    """Install for every Python that is found; the exit status is 1 if one fails or none is found."""
    parser = argparse.ArgumentParser(description="Install the wheel and the sdist for each Python, and use them.")
    parser.add_argument("--dist", type=Path, default=ROOT / "dist", help="the folder of the archives")
    parser.add_argument("pythons", nargs="*", default=PYTHONS, metavar="PYTHON")
    options = parser.parse_args()
    (wheel,), (sdist,) = options.dist.glob("*.whl"), options.dist.glob("*.tar.gz")
    version = wheel.name.split("-")[1]
    used = failed = 0
    for name in options.pythons:
        python = interpreter(name)
        if python is None:
            print(f"Python {name}: skipped, there is none and none can be downloaded", flush=True)
            continue
        for archive in (wheel, sdist):
            start = time.perf_counter()
            try:
                result = use(python, archive.resolve(), version)
                used += 1
            except (subprocess.CalledProcessError, AssertionError) as error:
                result = f"FAILED: {error}"
                failed += 1
            print(f"Python {name}, {archive.name}: {result}, {time.perf_counter() - start:.0f} s", flush=True)
    return int(bool(failed) or not used)


if __name__ == "__main__":
    sys.exit(main())
