"""Imports are lazy, data are installed, and everything public is documented."""

import gzip
import hashlib
import importlib
import importlib.metadata
import inspect
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.resources import files
from pathlib import Path

import pytest

import tinygrad_bn

PARTS = (
    "functional",
    "nn",
    "optim",
    "train",
    "datasets",
    "testing",
    "viz",
    "explain",
    "diagnose",
    "backend",
    "kernels",
    "cuda",
    "checkpoint",
)
ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
MODULES = ["tinygrad_bn", *(f"tinygrad_bn.{part}" for part in PARTS)]

LAZY = """
import sys
HEAVY = ("numba", "matplotlib", "rich", "pooch", "safetensors")
def loaded():
    return [name for name in HEAVY if name in sys.modules]
import tinygrad_bn
assert not loaded(), f"importing loaded {loaded()}"
import tinygrad_bn.viz
x = tinygrad_bn.Tensor([[1.0, 2.0], [3.0, 5.0]], requires_grad=True)
y = tinygrad_bn.functional.batch_norm_steps(x @ x.T + x.exp()).out
(y * y * x).sum().backward()
assert not loaded(), f"arithmetic loaded {loaded()}"
tinygrad_bn.functional.cross_entropy(x, tinygrad_bn.Tensor([0, 1]))
assert loaded() == ["numba"], f"cross_entropy loaded {loaded()}"
"""

KERNELS = """
import sys, tinygrad_bn_kernels
for (name, device), module in tinygrad_bn_kernels.MODULES.items():
    assert tinygrad_bn_kernels.lookup(name, device).__module__ == module
assert "tinygrad_bn" not in sys.modules, "a kernel imports the framework"
"""


def public(name: str) -> dict[str, object]:
    """A module's public names: `__all__`, or else its own functions and classes."""
    module = importlib.import_module(name)
    if hasattr(module, "__all__"):
        assert len(set(module.__all__)) == len(module.__all__)
        return {n: getattr(module, n) for n in module.__all__}
    written = {n: v for n, v in vars(module).items() if getattr(v, "__module__", None) == name and callable(v)}
    return {n: v for n, v in written.items() if not n.startswith("_")}


@pytest.mark.parametrize("program", [LAZY, KERNELS], ids=["lazy", "kernels"])
def test_imports_in_a_fresh_interpreter(program):
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("package", ["tinygrad_bn", "tinygrad_bn_kernels"])
def test_types_are_published(package):
    assert files(package).joinpath("py.typed").is_file()


def test_data_and_licenses_are_with_the_package():
    assert "MNIST" in files("tinygrad_bn.datasets").joinpath("data", "LICENSES.md").read_text()
    metadata = importlib.metadata.metadata("tinygrad-bn")
    assert metadata["Requires-Python"] == ">=3.11"
    required = {re.split("[<>=]", r)[0] for r in metadata.get_all("Requires-Dist") if "extra ==" not in r}
    assert required == {"numpy", "numba", "matplotlib", "rich", "pooch[progress]", "safetensors"}


def test_dependencies_are_bounded_on_both_sides():
    for requirement in PROJECT["project"]["dependencies"]:
        assert re.fullmatch(r"[a-z]+(\[[a-z]+\])?>=[\d.]+,<\d+", requirement), requirement


def test_every_data_file_has_its_origin_licence_and_hash():
    data = ROOT / "tinygrad_bn" / "datasets" / "data"
    told = (data / "LICENSES.md").read_text(encoding="utf-8")
    for path in sorted(data.iterdir()):
        if path.name != "LICENSES.md":
            content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            assert path.name in told
            assert hashlib.sha256(content).hexdigest() in told, path.name


WHEEL = """
import os, sys
from setuptools.build_meta import build_wheel
os.umask(0o022)
print(build_wheel(sys.argv[1]))
"""


def test_a_wheel_is_the_same_bytes_wherever_and_whenever_it_is_built(tmp_path):
    pytest.importorskip("setuptools", minversion="77", reason="builds a wheel: pip install 'tinygrad-bn[test]'")
    wheels = []
    for place, when in (("a", 1_000_000_000), ("another place/b", 1_700_000_000)):
        source = tmp_path / place
        for part in ("tinygrad_bn", "kernels", "demos"):
            shutil.copytree(ROOT / part, source / part, ignore=shutil.ignore_patterns("__pycache__", "figures"))
        for name in ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
            shutil.copyfile(ROOT / name, source / name)
        for path in source.rglob("*"):
            os.utime(path, (when, when))
        environment = {**os.environ, "SOURCE_DATE_EPOCH": "315532800", "TZ": f"UTC-{when % 7}"}
        command = [sys.executable, "-c", WHEEL, str(tmp_path)]
        done = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        built = tmp_path / done.stdout.split()[-1]
        wheels.append((built.name, built.read_bytes()))
    assert wheels[0][0] == f"tinygrad_bn-{PROJECT['project']['version']}-py3-none-any.whl"
    assert wheels[0] == wheels[1]
    with zipfile.ZipFile(built) as wheel:
        names = wheel.namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {
        "tinygrad_bn",
        "tinygrad_bn_kernels",
        "tinygrad_bn_demos",
        built.name.rsplit("-", 3)[0] + ".dist-info",
    }
    assert sum(name.endswith(("LICENSE", "LICENSES.md")) and ".dist-info/" in name for name in names) == 2


def test_the_changelog_and_the_security_page_are_of_this_version():
    version = PROJECT["project"]["version"]
    newest = re.search(
        r"^## (\S+) - \d{4}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert newest is not None
    assert newest[1] == version
    latest = f"latest minor version, now {version.rpartition('.')[0]}."
    assert latest in (ROOT / "SECURITY.md").read_text(encoding="utf-8")


def test_all_packages_are_installed_under_names_of_our_own():
    packages = PROJECT["tool"]["setuptools"]["packages"]
    folders = {
        ".".join(path.parent.relative_to(base).parts)
        for base in (ROOT, ROOT / "kernels")
        for path in base.glob("tinygrad_bn*/**/__init__.py")
    }
    assert sorted(packages) == sorted(folders | {"tinygrad_bn_demos"})


def test_the_version_is_that_of_the_installed_package():
    assert tinygrad_bn.__version__ == PROJECT["project"]["version"]
    with pytest.raises(AttributeError, match="'tinygrad_bn' has no attribute 'nope'"):
        tinygrad_bn.nope  # noqa: B018


def test_the_installed_package_runs_the_demos_anywhere(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    for arguments, printed in ((), "usage: python -m tinygrad_bn_demos NAME"), (["normalize_numbers"], "[-1.64750894 "):
        command = [sys.executable, "-m", "tinygrad_bn_demos", *arguments]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        assert printed in done.stdout


@pytest.mark.parametrize("name", MODULES)
def test_everything_public_exists_and_is_documented(name):
    assert (importlib.import_module(name).__doc__ or "").strip()
    offered = public(name)
    assert offered
    for n, value in offered.items():
        if callable(value) or inspect.ismodule(value):
            # a class without a docstring of its own must not pass with its base's
            doc = vars(value).get("__doc__") if inspect.isclass(value) else value.__doc__
            assert (doc or "").strip(), f"{name}.{n} has no docstring"


@pytest.mark.parametrize("name", ["tinygrad_bn.nn", "tinygrad_bn.optim", "tinygrad_bn.train", "tinygrad_bn.diagnose"])
def test_public_methods_are_documented(name):
    """All but `forward`, which `Module` documents."""
    methods = {
        f"{n}.{method}": inspect.getdoc(getattr(value, method))
        for n, value in public(name).items()
        if inspect.isclass(value)
        for method, function in vars(value).items()
        if inspect.isfunction(function) and not method.startswith("_") and method != "forward"
    }
    assert methods
    assert [method for method, doc in methods.items() if not doc] == []
