"""Every CUDA program: its memory accesses are coalesced, and it needs each of its barriers."""

from collections.abc import Callable
from functools import cache, partial

import numpy as np
import pytest

from tests.cuda.ptx.barriers import barriers, without_barrier
from tests.cuda.ptx.compile import require_compiler
from tests.cuda.ptx.interpreter import PTXError, Report
from tests.cuda.ptx.programs import Interpreted, computed, interpreted, numbers, programs, ptx_for, run, unaligned

ONE = [
    "neg",
    "abs",
    "sign",
    "relu",
    "exp",
    "expm1",
    "log",
    "log1p",
    "sqrt",
    "rsqrt",
    "tanh",
    "sech_squared",
    "erf",
    "erfc",
    "sigmoid",
    "softplus",
    "silu",
    "gelu",
    "identity",
]
TWO = ["add", "sub", "mul", "div", "pow", "maximum", "minimum", "relu_vjp", "silu_vjp", "gelu_vjp"]
TWO += ["equal", "not_equal", "less", "less_equal"]
REFLECTED = ["sub", "div", "pow", "less", "less_equal"]  # have programs with the number first

SCATTERED = {  # programs whose access pattern depends on their arguments
    "gather": "the index selects rows",
    "scatter_add": "the index selects rows",
    "where.aa": "each element is read from one of two arrays, so a warp reads in both",
    "where.rows": "each element is read from one of two arrays, so a warp reads in both",
    "columns": "a stride in the convolution is one in memory",
    "images": "the columns of an element are a row apart",
    "max_pool": "a stride of the pooling is one in memory",
    "max_pool.places": "a stride of the pooling is one in memory",
    "max_pool.vjp": "gradients go to the largest elements",
    "dropout": "four words of random bits belong to four neighbours, so a thread moves four elements one by one",
}


def elementwise() -> None:
    x, y = numbers(4099), numbers(4099, seed=1)
    for name in ONE:
        computed(name, x)
        computed(name, unaligned(x))
    for name in TWO:
        computed(name, x, y)
        computed(name, unaligned(x), unaligned(y))
        computed(name, x, 1.5)
        computed(name, unaligned(x), 1.5)
        computed(name, numbers((70, 197)), numbers(197))
        if name in REFLECTED:
            computed(name, 1.5, x)
            computed(name, 1.5, unaligned(x))
    run("clip", x, min=-1.0, max=1.0)
    for pair in ((x, y), (x, 0.0), (0.0, x)):
        run("where", x > 0, *pair)
    run("where", numbers((70, 1)) > 0, numbers((70, 197)), numbers(197))
    run("pad", x, width=((1, 1),), value=1.0)


def reduced(name: str) -> None:
    run(name, numbers((300, 197)), axis=1)
    run(name, numbers((40, 1500)), axis=1)
    run(name, numbers((5, 77, 197)), axis=1)


def moved() -> None:
    run("transpose", numbers((3, 100, 130)), axes=(0, 2, 1))
    run("concatenate", numbers((70, 197)), numbers((70, 100)), axis=1)


def indexed() -> None:
    index = np.arange(300) * 7 % 100
    run("getitem", numbers((100, 33)), index=index)
    run("scatter_add", numbers((300, 33)), index=index, shape=(100, 33))


def products() -> None:
    a, b, g = numbers((1, 66, 40)), numbers((1, 40, 72)), numbers((1, 66, 72))  # rows begin at a sector
    run("matmul", a, b)
    run("matmul.vjp", g, g, a, b, needs=[True, True])
    run("linear", a, numbers((72, 40)), numbers(72))


def batch_norm(shape: tuple[int, ...], relu: str) -> None:
    x, weight, needs = numbers(shape), numbers(shape[1], seed=1), [True] * 3
    name = "batch_norm_relu" if relu else "batch_norm_training"
    y, mean, var = run(name, x, weight, weight, eps=1e-5)
    run(f"{name}.vjp", x, y, x, weight, weight, needs=needs, eps=1e-5, mean=mean, var=var)
    run("batch_norm_inference", x, mean, var, weight, weight, eps=1e-5)


def running_statistics() -> None:
    old_mean, old_var, mean, var = (numbers(600, seed=k) for k in range(4))
    run("running_statistics", old_mean, old_var, np.array(2), mean, var, momentum=0.1, unbias=1.1)


def block_norm() -> None:
    x, weight, options = numbers((40, 6, 197)), numbers(6), {"blocks": (40, 2, 3, 197), "eps": 1e-5, "centered": True}
    y, mean, var = run("block_norm", x, weight, weight, **options)
    run("block_norm.vjp", x, y, x, weight, weight, needs=[True] * 3, **options, mean=mean, var=var)


def cross_entropy() -> None:
    x, target, weight = numbers((300, 100)), np.arange(300) % 100, np.ones(100, np.float32)
    options = {"smoothing": 0.1, "ignore_index": -100, "reduction": "mean"}
    loss, normalizer, total = run("softmax_cross_entropy", x, target, weight, **options)
    needs, saved = [True, False, False], {"normalizer": normalizer, "total": total}
    run("softmax_cross_entropy.vjp", loss, loss, x, target, weight, needs=needs, **options, **saved)


def convolution() -> None:
    options = {"stride": (2, 1), "padding": ((1, 1), (0, 0)), "dilation": (1, 1), "groups": 1}
    x, weight = numbers((2, 3, 9, 40)), numbers((4, 3, 3, 3))
    y = run("conv", x, weight, **options)
    run("conv_input", y, weight, size=(9, 40), **options)
    pooling = {"kernel": (2, 2), "out": (4, 20), "stride": (2, 2), "padding": (0, 0), "dilation": (1, 1)}
    pooled = run("max_pool", x, **pooling)
    run("max_pool.vjp", pooled, pooled, x, needs=[True], **pooling)


def updates() -> None:
    p, g, m, v = (np.abs(numbers(4099, seed=k)) for k in range(4))
    adam = {"beta1": 0.9, "beta2": 0.99, "step_size": 0.1, "root_scale": 1.0, "eps": 1e-8, "shrink": 1.0, "decay": 0.0}
    run("adam", p, g, m, v, **adam)
    run("sgd", p, g, v, lr=0.1, momentum=0.9, dampening=0.0, decay=0.0, nesterov=True)
    run("dropout_by_key", p, p=0.5, key=1)
    run("dropout_by_key", unaligned(p), p=0.5, key=1)


# Each gives its programs more work than blocks, so that every loop runs more than once.
BUSY: dict[str, Callable[[], None]] = {
    f.__name__: f
    for f in (
        elementwise,
        moved,
        indexed,
        products,
        running_statistics,
        block_norm,
        cross_entropy,
        convolution,
        updates,
    )
}
BUSY |= {name: partial(reduced, name) for name in ("sum", "sum_of_squares", "max", "min")}
BUSY |= {name: partial(run, name, numbers((40, 300)), axis=1) for name in ("argmax", "argmin")}
for _relu in ("", "_relu"):
    BUSY[f"batch_norm_of_planes{_relu}"] = partial(batch_norm, (6, 40, 197), _relu)
    BUSY[f"batch_norm_of_planes4{_relu}"] = partial(batch_norm, (6, 40, 196), _relu)
    BUSY[f"batch_norm_of_rows{_relu}"] = partial(batch_norm, (300, 700, 1), _relu)


@cache
def launches(name: str) -> list[tuple[str, Report]]:
    """The launches of one case: names of programs, and their reports."""
    require_compiler()
    with interpreted() as device:
        BUSY[name]()
    return device.launches


def test_every_program_is_launched():
    launched = {program for name in BUSY for program, _ in launches(name)}
    assert programs().keys() == launched


@pytest.mark.parametrize("name", BUSY)
def test_memory_is_moved_in_whole_sectors_and_without_bank_conflicts(name):
    """32 adjacent elements of 4 bytes are in 4 sectors, or in 5 if unaligned; 32 of 16 bytes are in 16."""
    wrong = []
    for program, report in launches(name):
        found = report.sectors_per_request(32), report.sectors_per_request(128)
        if (found[0] > 5 or found[1] > 16) and program not in SCATTERED:
            wrong.append(f"{program}: {found[0]:.2f} and {found[1]:.2f} sectors a request of 32 and 128 bits")
        if report.bank_conflicts:
            wrong.append(f"{program}: {report.bank_conflicts} bank conflicts")
    assert not wrong


@pytest.mark.parametrize("name", BUSY)
def test_every_barrier_is_needed(name):
    needless = [
        f"{program}: barrier {k + 1}"
        for program in {program for program, _ in launches(name)}
        if (users := [n for n in BUSY if any(program == p for p, _ in launches(n))])[0] == name
        for k in range(len(barriers(ptx_for(programs()[program], Interpreted.cc))))
        if not any(is_detected(user, program, k) for user in users)
    ]
    assert not needless


def is_detected(name: str, program: str, k: int) -> bool:
    """Whether the interpreter detects that the k-th barrier of a program is missing."""
    try:
        with interpreted(Interpreted(lambda which, ptx: without_barrier(ptx, k) if which == program else ptx)):
            BUSY[name]()
    except PTXError:
        return True
    return False
