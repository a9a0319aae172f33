"""Mutation testing: small mistakes planted in the core, one at a time; and whether its tests find them.

    python -m tests.tools.mutants [--each 60] [--seed 0] [--compiled] [GROUP ...]

Cosmic Ray proposes the mutants. A random sample of each group is tried, in a copy of the sources, and each survivor is
shown. Not tried are mutants of messages, annotations and declarations of samples, and of what only compiled loops obey.
"""

import argparse
import ast
import contextlib
import difflib
import importlib
import math
import multiprocessing
import os
import random
import re
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
COPY = ROOT / "build" / "mutants"
FOLDERS = ("tinygrad_bn", "kernels", "demos", "tests")
MODULES = ("cosmic_ray.plugins", "cosmic_ray.mutating", "hypothesis", "matplotlib", "numba", "pytest")


class Group(NamedTuple):
    """Modules of one subject, and the tests that know it best, quick ones first."""

    modules: str
    tests: str
    ops: str = "{function}"  # those of test_ops.py that run: a pytest keyword; by default the op with the mistake

    def arguments(self, function: str) -> list[str]:
        """Of pytest, for a mistake in this function."""
        files = [t if "/" in t else f"framework/{t}" for t in self.tests.split()]
        files = [f"tests/{folder}/test_{file}.py" for folder, file in (t.split("/") for t in files)]
        ops = self.ops.format(function=function)
        return [*PYTEST, *files, "-k", f"(not test_ops or {ops}) and not {SLOW}"]


GROUPS = {
    "autograd": Group("tinygrad_bn/autograd.py", "autograd faults functional edges ops", "test_ops"),
    "ops": Group("tinygrad_bn/ops.py", "autograd ops edges functional"),
    "functional": Group(
        "tinygrad_bn/functional/*.py",
        "functional ops batch_norm edges pooling convolution half_and_numbers wrong_calls tails",
    ),
    "norms": Group(
        "kernels/tinygrad_bn_kernels/cpu/norm*.py kernels/tinygrad_bn_kernels/cpu/moments.py",
        "batch_norm kernels/norm_limits kernels/kernels kernels/declines fold tails ops",
        "batch_norm or running_statistics",
    ),
}

# One or two replacements for each operator: `a << b` for `a + b` only shows that floats have no shift.
OPERATORS = re.compile(
    r"core/(ReplaceBinaryOperator_(Add_Sub|Sub_Add|Mul_Div|Div_Mul|FloorDiv_Mul|Mod_FloorDiv|Pow_Mul|BitAnd_BitOr|"
    r"BitOr_BitAnd)|ReplaceComparisonOperator_(Eq_NotEq|NotEq_Eq|Lt_LtE|Lt_GtE|LtE_Lt|LtE_Gt|Gt_GtE|Gt_LtE|GtE_Gt|"
    r"GtE_Lt|Is_IsNot|IsNot_Is)|ReplaceUnaryOperator_(USub_UAdd|Delete_.*)|AddNot|Replace(True|False|And|Or)With.*|"
    r"Replace(Break|Continue)With.*|ExceptionReplacer|NumberReplacer|RemoveDecorator|ZeroIterationForLoop)"
)
ONLY_COMPILED = ("njit", "inlined", "step")  # decorators without an effect on what an uncompiled loop computes
SLOW = "test_every_kernel_is_as_exact"
PYTEST = ["-x", "-q", "--no-header", "--tb=line", "-p", "no:cacheprovider"]
PYTEST += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # Hypothesis is imported before pytest starts
Span = tuple[tuple[int, int], tuple[int, int]]


def untested(tree: ast.AST, compiled: bool) -> Iterator[Span]:
    """Where a mutant would change a message, an annotation or a sample; or the options of loops, if not `compiled`."""

    def name(node: ast.expr) -> str:
        return ast.unparse(node).partition("(")[0]

    quiet = () if compiled else ONLY_COMPILED
    for node in ast.walk(tree):
        parts: list[Any] = []
        match node:
            case ast.Raise() | ast.JoinedStr():
                parts = [node]
            case ast.Call(func=ast.Name(id=called)) if called.endswith("Error"):
                parts = [node]
            case ast.arg(annotation=annotation) | ast.AnnAssign(annotation=annotation):
                parts = [annotation]
            case ast.FunctionDef() if "overload" in map(name, node.decorator_list):
                parts = [node, *node.decorator_list]
            case ast.FunctionDef():
                parts = [node.returns, *(d for d in node.decorator_list if name(d) in quiet)]
            case ast.keyword(arg="formula" | "sample" | "exact"):
                parts = [node.value]
            case ast.Assign(targets=[ast.Name(id=target)]) if target.istitle() or name(node.value) in quiet:
                parts = [node.value]  # another name of a type, or of a decorator
        for part in parts:
            if part is not None:
                yield (part.lineno, part.col_offset), (part.end_lineno, part.end_col_offset)


class Mutant(NamedTuple):
    path: Path
    operator: str
    occurrence: int
    line: int
    function: str


def mutants(pattern: str, compiled: bool) -> list[Mutant]:
    """All mutants of the modules, in the order of the sources."""
    from cosmic_ray import plugins
    from cosmic_ray.ast import ast_nodes, get_ast

    found = []
    for path in (p for part in pattern.split() for p in sorted(COPY.glob(part))):
        source = path.read_text(encoding="utf-8")
        lines = source.splitlines()
        spans = [
            tuple((row, len(lines[row - 1].encode()[:column].decode())) for row, column in span)  # ast counts bytes
            for span in untested(ast.parse(source), compiled)
        ]
        functions = [
            (f.decorator_list[0].lineno if f.decorator_list else f.lineno, f.end_lineno or 0, f.name)
            for f in ast.parse(source).body
            if isinstance(f, ast.FunctionDef) and not f.name.startswith("_")  # any op may use a helper
        ]
        nodes = list(ast_nodes(get_ast(source)))
        for operator in filter(OPERATORS.fullmatch, plugins.operator_names()):
            make = plugins.get_operator(operator)()
            positions = [start for node in nodes for start, _ in make.mutation_positions(node)]
            for occurrence, (row, column) in enumerate(positions):
                at = row, column + (operator == "core/RemoveDecorator")  # of the name behind the @
                if not any(start <= at <= end for start, end in spans):
                    function = next((name for first, last, name in functions if first <= row <= last), "test_ops")
                    found.append(Mutant(path, operator, occurrence, row, function))
    return sorted(found)


def run_tests(arguments: list[str], output: str, limit: int) -> None:
    """In a child: pytest, for `limit` seconds of processor time, with its output in a file. The status is pytest's."""
    import pytest

    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
    log = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    with tempfile.TemporaryDirectory() as folder:
        if os.environ["NUMBA_DISABLE_JIT"] == "0":
            os.environ["NUMBA_CACHE_DIR"] = folder
        sys.exit(pytest.main(arguments))


def outcome(arguments: list[str], limit: int = 3600) -> str:
    """What tells the tests that something is wrong: "" if nothing does."""
    output = str(COPY / "output.txt")
    child = multiprocessing.get_context("fork").Process(target=run_tests, args=(arguments, output, limit))
    child.start()
    child.join(20 * limit)  # threads may wait for each other forever; a busy machine must not look like that
    if child.is_alive():
        child.kill()
        child.join()
    if child.exitcode is not None and child.exitcode < 0:
        return f"ended by signal {-child.exitcode} within {limit} s"
    if not child.exitcode:
        return ""
    failed = re.search(r"^(FAILED|ERROR) \S+", Path(output).read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
    return failed[0] if failed else f"exit status {child.exitcode}"


def interval(hits: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95 % interval of a rate."""
    p, square = hits / n, z * z / n
    half = z * math.sqrt(p * (1 - p) / n + square / (4 * n))
    return (p + square / 2 - half) / (1 + square), (p + square / 2 + half) / (1 + square)


def try_group(name: str, each: int, seed: int, compiled: bool) -> bool:
    """Try a sample of one group, print the survivors and the rate; whether that is at least 90 %."""
    from cosmic_ray import plugins
    from cosmic_ray.mutating import mutate_code

    group = GROUPS[name]
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    if wrong := outcome(group.arguments("softmax")):
        raise SystemExit(f"the tests of {name} fail without a mutant: {wrong}")
    limit = 20 + int(3 * (resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before))
    every = mutants(group.modules, compiled)
    sample = random.Random(f"{name} {seed}").sample(every, min(each, len(every)))
    print(f"{name}: {len(sample)} of {len(every)} mutants, at most {limit} s each", flush=True)
    killed = 0
    for mutant in sample:
        source = mutant.path.read_text(encoding="utf-8")
        changed = mutate_code(source, plugins.get_operator(mutant.operator)(), mutant.occurrence)
        begin = time.perf_counter()
        try:
            mutant.path.write_text(changed, encoding="utf-8")
            reason = outcome(group.arguments(mutant.function), limit)
        finally:
            mutant.path.write_text(source, encoding="utf-8")
        killed += bool(reason)
        where = f"{mutant.path.relative_to(COPY)}:{mutant.line}"
        seconds = time.perf_counter() - begin
        verdict = "killed" if reason else "SURVIVED"
        print(f"{verdict} {where} {mutant.operator[5:]} {seconds:.0f} s {reason}", flush=True)
        if not reason:
            for line in difflib.unified_diff(source.splitlines(), changed.splitlines(), n=0, lineterm=""):
                if not line.startswith(("---", "+++", "@@")):
                    print(f"    {line}", flush=True)
    low, high = interval(killed, len(sample))
    rate = killed / len(sample)
    print(f"{name}: {killed} of {len(sample)} killed, {rate:.1%} (95 % interval {low:.1%} to {high:.1%})", flush=True)
    return rate >= 0.9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", default=list(GROUPS), help=f"of {', '.join(GROUPS)}; all by default")
    parser.add_argument("--each", type=int, default=60, help="mutants of a group (60)")
    parser.add_argument("--seed", type=int, default=0, help="of the sample (0)")
    parser.add_argument("--compiled", action="store_true", help="compile the loops for each mutant, which is slow")
    options = parser.parse_args()
    os.environ |= {
        "NUMBA_DISABLE_JIT": "0" if options.compiled else "1",
        "HYPOTHESIS_PROFILE": "mutants",
        "OPENBLAS_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    sys.dont_write_bytecode = True
    for module in MODULES:  # once, for all children
        importlib.import_module(module)
    shutil.rmtree(COPY, ignore_errors=True)
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, COPY / folder, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    shutil.copy(ROOT / "pyproject.toml", COPY)
    os.chdir(COPY)
    sys.path = [p for p in sys.path if Path(p).resolve() not in (ROOT, ROOT / "kernels")]  # pytest adds the copy
    with contextlib.suppress(KeyError):
        del os.environ["PYTHONPATH"]
    good = [try_group(name, options.each, options.seed, options.compiled) for name in options.groups]
    sys.exit(not all(good))


if __name__ == "__main__":
    main()
