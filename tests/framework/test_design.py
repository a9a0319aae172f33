"""The rules of the source that no other test would miss: which file may import what, and how long a file is."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FRAMEWORK, KERNELS = ROOT / "tinygrad_bn", ROOT / "kernels" / "tinygrad_bn_kernels"
READING_PATH = (
    "tensor.py",
    "autograd.py",
    "ops.py",
    "functional/statistics.py",
    "functional/batch_norm.py",
    "nn/batch_norm.py",
)
# Each imports what stands before it. Parts that are not listed may be imported by all.
ORDER = (
    ["tensor"],
    ["autograd"],
    ["ops", "more_ops"],
    ["functional"],
    ["nn", "optim"],
    ["hooks"],
    ["captured", "batching", "batching_rules"],
    ["recompute"],
    ["transforms", "testing"],
    ["train", "viz", "explain", "datasets"],
    ["diagnose"],
    ["onnx", "extend"],
)
LEVEL = {part: level for level, parts in enumerate(ORDER) for part in parts}
CIRCLE = ("tensor", "autograd")  # the one circle: a tensor is differentiated by the engine that is built on it
ABOUT_KERNELS = (
    "backend.py",
    "cuda.py",
    "extend.py",
    "gradient_hooks.py",
    "hooks.py",
    "kernels.py",
    "testing/check.py",
    "testing/extremes.py",
)


def imported(path: Path) -> set[str]:
    """The modules that a file imports, also inside of functions, by full names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} has a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def sources(folder: Path) -> list[Path]:
    found = sorted(folder.rglob("*.py"))
    assert len(found) > 10
    return found


def part_of(path: Path) -> str:
    return path.relative_to(FRAMEWORK).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", sources(FRAMEWORK), ids=lambda path: str(path.relative_to(FRAMEWORK)))
def test_imports_of_the_framework_go_one_way(path):
    own = part_of(path)
    for name in imported(path):
        package, _, rest = name.partition(".")
        other = rest.partition(".")[0]
        assert package not in ("demos", "tests")
        if package == "tinygrad_bn" and own in LEVEL and (own, other) != CIRCLE:
            assert LEVEL.get(other, -1) <= LEVEL[own], f"{own} stands below {other}"
        if package == "tinygrad_bn_kernels":
            assert path.relative_to(FRAMEWORK).as_posix() in ABOUT_KERNELS, "kernels are found by backend.py"


def test_kernels_know_arrays_only_and_one_module_imports_numbas_cuda():
    for path in sources(KERNELS):
        modules = imported(path)
        assert not any(name.split(".")[0] == "tinygrad_bn" for name in modules), path
        devices = {name.split(".")[1] for name in modules if name.startswith("tinygrad_bn_kernels.")} & {"cpu", "cuda"}
        assert devices <= {path.relative_to(KERNELS).parts[0]}, f"{path} imports another device's kernels"
        if any(name.startswith("numba.cuda") for name in modules):
            assert path.name == "shim.py", path


def lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def test_the_core_is_read_in_an_afternoon_and_a_demo_at_a_glance():
    assert sum(lines(FRAMEWORK / name) for name in READING_PATH) <= 1550
    experiments = [path for path in (ROOT / "demos").glob("*.py") if path.name not in ("common.py", "gallery.py")]
    assert [path.name for path in experiments if lines(path) > 120] == []
