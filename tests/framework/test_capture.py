"""Captured steps: the bits of the engine, whatever changes between steps; and reasons where they cannot be captured."""

import threading
import warnings
import weakref
from collections import deque

import numpy as np
import pytest

from tinygrad_bn import Tensor, grad, manual_seed, nn, no_grad, optim
from tinygrad_bn import functional as F
from tinygrad_bn.backend import kernels_disabled
from tinygrad_bn.captured import capture
from tinygrad_bn.captured.program import Forward
from tinygrad_bn.optim import clip_grad_norm_
from tinygrad_bn.sample import RandomDraw
from tinygrad_bn.tensor import OPS, primitive
from tinygrad_bn.testing.calls import split_differentiable

RNG = np.random.default_rng(0)
DATA = [(RNG.normal(size=(8, 6)).astype(np.float32), RNG.integers(0, 3, 8)) for _ in range(24)]
IMAGES = [(RNG.normal(size=(4, 1, 8, 8)).astype(np.float32), RNG.integers(0, 3, 4)) for _ in range(12)]


def dense(*, momentum=0.1, p=0.3):
    manual_seed(0)
    hidden = nn.Linear(6, 5), nn.BatchNorm1d(5, momentum=momentum), nn.ReLU(), nn.Dropout(p)
    return nn.Sequential(*hidden, nn.Linear(5, 4), nn.LayerNorm(4), nn.GELU(), nn.Linear(4, 3))


def convolutional():
    manual_seed(0)
    first = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)
    return nn.Sequential(*first, nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(16, 3))


def training(model, optimizer, loss=F.cross_entropy):
    def step(x, y):
        optimizer.zero_grad()
        outputs = model(x)
        value = loss(outputs, y)
        value.backward()
        optimizer.step()
        return value, outputs

    return step


def state(model, optimizer):
    return repr((model.state_dict(), optimizer.state_dict(), [p.grad for p in model.parameters()]))


def expect_same_bits(build, between=lambda model, optimizer, n: None, data=DATA, captured=True, make=optim.Adam):
    """Train with and without `capture`, with a change before each step. The captured step."""
    ends = []
    for wrap in (lambda f: f, capture):
        model = build()
        optimizer = make(model.parameters(), 0.01)
        step = wrap(training(model, optimizer))
        manual_seed(1)
        numbers = []
        for n, (x, y) in enumerate(data):
            between(model, optimizer, n)
            value, outputs = step(x, y)
            numbers.append(repr((value.item(), outputs.numpy().tolist())))
        ends.append((numbers, state(model, optimizer)))
    assert ends[0][0] == ends[1][0]
    assert ends[0][1] == ends[1][1]
    assert bool(step.programs) == captured
    return step


# ---- the same bits ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [optim.SGD, optim.Adam, optim.AdamW, optim.RMSprop, optim.Adagrad])
def test_a_training_step_gives_the_bits_of_the_engine(make):
    expect_same_bits(dense, make=make)


@pytest.mark.compiled  # without kernels, pooling computes indices outside of the seam
def test_a_convolutional_network_gives_the_bits_of_the_engine():
    expect_same_bits(convolutional, data=IMAGES)


def test_the_last_lines_run_where_there_are_more_lines_than_slots():
    ends = []
    for wrap in (lambda f: f, capture):
        w = Tensor([1.0, 2.0], requires_grad=True)
        optimizer = optim.SGD([w], 0.1)
        schedule = optim.StepLR(optimizer, 1, 0.5)

        @wrap
        def step(w=w, optimizer=optimizer, schedule=schedule):
            optimizer.zero_grad()
            F.exp(w).sum().backward()
            optimizer.step()
            schedule.step()

        for _ in range(6):
            step()
        ends.append((w.numpy().tolist(), optimizer.param_groups[0]["lr"]))
    assert ends[0] == ends[1]
    assert step.programs


def test_without_kernels_too():
    ends = []
    with kernels_disabled():
        for wrap in (lambda f: f, capture):
            model = dense(p=0.0)
            step = wrap(training(model, optim.SGD(model.parameters(), 0.1), lambda y, _: (y * y).mean()))
            ends.append([step(x, y)[0].item() for x, y in DATA[:8]])
    assert ends[0] == ends[1]
    assert step.programs


def test_batches_of_several_sizes_have_a_program_each():
    sizes = [(x[:n], y[:n]) for (x, y), n in zip(DATA, [8, 8, 3] * 8, strict=True)]
    assert len(expect_same_bits(dense, data=sizes).programs) == 2


def _draws(op):
    """Operands, options, and operands of the same shapes with other real numbers."""
    for seed in range(6):
        xs, params = op.sample(RandomDraw(seed))
        yield xs, params, tuple(x * 1.01 if getattr(x, "dtype", None) == np.float64 else x for x in xs)


@pytest.mark.parametrize("name", sorted(name for name, op in OPS.items() if op.differentiable))
def test_every_op_and_its_gradients_give_the_bits_of_the_engine(name):
    op = OPS[name]
    for xs, params, others in _draws(op):

        def step(*operands, params=params, xs=xs):
            f, inside = split_differentiable(op, xs, params)
            leaves = [Tensor(o, requires_grad=True) for o in operands]
            y = f(*leaves)
            gradients = grad(y, leaves, np.cos(np.arange(y.size, dtype=float)).reshape(y.shape)) if inside else []
            return y, *gradients

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # some samples index by an array
            captured = capture(step)
            for operands in (xs, others, xs, others, others):
                arrays = [np.array(a) for a in split_differentiable(op, operands, params)[1]]
                for mine, its in zip(captured(*arrays), step(*arrays), strict=True):
                    assert mine.numpy().tobytes() == its.numpy().tobytes()


# ---- nothing stands still ---------------------------------------------------------------------------------------


def _new_rate(model, optimizer, n):
    optimizer.param_groups[0]["lr"] = 0.01 / (n + 1)


def _new_decay(model, optimizer, n):
    optimizer.param_groups[0]["weight_decay"] = 0.1 * (n % 3)


def _new_weights(model, optimizer, n):
    if n == 9:
        model[0].weight.data = model[0].weight.data * 2
    if n == 15:
        model.load_state_dict({k: v * v.dtype.type(2) for k, v in model.state_dict().items()})


def _new_parameter(model, optimizer, n):
    if n == 9:
        model[1].weight = optimizer.param_groups[0]["params"][2] = nn.Parameter(np.full(5, 2, np.float32))


def _freeze(model, optimizer, n):
    if n in (9, 15):
        model[0].weight.requires_grad = n == 15


def _statistics(model, optimizer, n):
    if n in (9, 15):
        model[1].freeze() if n == 9 else model[1].unfreeze()


def _mode(model, optimizer, n):
    if n in (9, 15):
        model.train(n == 15)


def _momentum(model, optimizer, n):
    if n == 9:
        model[1].momentum = 0.5


def _dropout(model, optimizer, n):
    if n == 9:
        model[3].p = 0.7


def _seed(model, optimizer, n):
    if n == 9:
        manual_seed(7)


def _layer(model, optimizer, n):
    if n == 9:
        model[6].forward = F.relu


CHANGES = [
    _new_rate, _new_decay, _new_weights, _new_parameter, _freeze, _statistics, _mode, _momentum, _dropout, _seed, _layer
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_between_steps_is_taken_up_at_once(change):
    expect_same_bits(dense, change)


def test_the_mean_of_all_batches_goes_on():
    expect_same_bits(lambda: dense(momentum=None))


def test_a_schedule_and_clipping_inside_the_step_go_on():
    ends = []
    for wrap in (lambda f: f, capture):
        model = dense()
        optimizer = optim.SGD(model.parameters(), 0.1)
        schedule = optim.StepLR(optimizer, 2, 0.7)

        @wrap
        def step(x, y, model=model, optimizer=optimizer, schedule=schedule):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            schedule.step()

        for x, y in DATA:
            step(x, y)
        ends.append((state(model, optimizer), optimizer.param_groups[0]["lr"]))
    assert ends[0] == ends[1]
    assert step.programs


def test_a_variable_of_the_function_is_taken_up():
    scale = 2.0
    w = Tensor([1.0, 2.0])

    @capture
    def step(x):
        return (w * x * scale).sum()

    x = np.ones(2, np.float32)
    assert [step(x).item() for _ in range(4)] == [6, 6, 6, 6]
    scale = 3.0
    assert [step(x).item() for _ in range(4)] == [9, 9, 9, 9]
    w = Tensor([2.0, 2.0])
    assert step(x).item() == 12


def test_an_evaluation_without_a_graph_reads_the_present_statistics():
    model = dense()
    outputs = capture(lambda x: model(x))
    model.eval()
    with no_grad():
        for n, (x, _) in enumerate(DATA[:8]):
            model[1].running_mean.data = np.full(5, n, np.float32)
            assert np.array_equal(outputs(x).numpy(), model(x).numpy())
    assert outputs.programs


# ---- errors -------------------------------------------------------------------------------------------------------


def test_a_batch_that_is_not_finite_leaves_what_it_leaves_in_the_engine():
    data = [(np.full_like(x, np.nan) if n == 9 else x, y) for n, (x, y) in enumerate(DATA)]
    with (
        pytest.warns(RuntimeWarning, match="statistics are not finite"),
        pytest.warns(UserWarning, match="not captured"),
    ):
        expect_same_bits(dense, data=data, captured=False)  # all later batches are counted as skipped


@pytest.mark.parametrize("n", [0, 1, 5])
def test_an_error_leaves_what_it_leaves_in_the_engine(n):
    ends = []
    for wrap in (lambda f: f, capture):
        model = dense()
        optimizer = optim.Adam(model.parameters())
        step = wrap(training(model, optimizer))
        for i, (x, y) in enumerate(DATA[:8]):
            if i == n:
                with pytest.raises(ValueError, match="99"):
                    step(x, np.full_like(y, 99))
            else:
                step(x, y)
        ends.append(state(model, optimizer))
    assert ends[0] == ends[1]


# ---- what is not captured -----------------------------------------------------------------------------------------

W = Tensor([[1.0, -2.0], [0.5, 3.0]], requires_grad=True)
X = np.float32([[1, 2], [3, 4], [5, 6]])


def reads_an_item(x):
    y = (x @ W).sum()
    return y * 2 if y.item() > 0 else y


def reads_an_array(x):
    y = x @ W
    return y * float(y.numpy().max())


def decides(x):
    y = (x @ W).sum()
    return y * 2 if y > 0 else y


def assigns(x):
    y = x @ W
    W.data = W.data + 1
    return y


def differentiates_twice(x):
    y = ((x @ W) ** 3).sum()
    y.backward(create_graph=True)
    return y


def adds_gradients(x):
    y = (x @ W).sum()
    y.backward()
    return y


def counts(x, numbers=[]):  # noqa: B006
    numbers.append(1)
    return (x @ W) * float(len(numbers))


def draws(x):
    return (x @ W) * np.random.default_rng().normal(size=(3, 2))


def computes_outside(x):
    return Tensor(x / x.max()) @ W


def indexes_by_an_array(x):
    return (x @ W)[np.array([0, 2])]


REFUSED = {
    reads_an_item: "reads or assigns numbers .item.",
    reads_an_array: "reads or assigns numbers .numpy_view.",
    decides: "reads or assigns numbers .item.",
    assigns: r"assigns\(\) assigns an attribute \(data\), which a program would not do again",
    differentiates_twice: "create_graph=True",
    adds_gradients: r"call zero_grad\(\) in the step",
    counts: "the step changes what its Python code reads: an element of a default of counts",
    draws: r"np\.random\.\w+ is a \w+, wh",
    computes_outside: r"computes_outside\(\) calls Argument.max\(\), which a program would not call again",
}


@pytest.mark.parametrize("function", REFUSED)
def test_what_could_stand_still_is_refused_with_the_reason(function):
    W.data, W.grad = np.float32([[1, -2], [0.5, 3]]), None
    captured = capture(lambda x: function(Tensor(x)) if function is not computes_outside else function(x))
    with pytest.warns(UserWarning, match=f"runs as always: .*{REFUSED[function]}"):
        first = [captured(X * (n + 1)) for n in range(6)]
    assert not captured.programs
    W.grad = None
    assert captured(-X).shape == first[0].shape  # without a further warning


@pytest.fixture
def declared():
    """Declare the op "planted" by a function of arrays."""

    def declare(reference):
        reference.__name__ = "planted"
        return primitive(lambda g, y, x: g, formula="y = x", sample=lambda d: ((d.array_like,), {}))(reference)

    yield declare
    OPS.pop("planted", None)


def test_an_op_with_a_memory_fails_the_proof_by_name(declared):
    calls = []

    def times_calls(x):
        """x times the number of calls."""
        calls.append(None)
        return x * float(len(calls))

    op = declared(times_calls)
    step = capture(lambda x: op(Tensor(x)) + 1)
    with pytest.warns(UserWarning, match="planted gives other numbers than in the engine"):
        step(X), step(X)
    assert np.array_equal(step(X).numpy(), X * len(calls) + 1)


def test_a_program_with_a_fault_is_found_by_its_next_proof(monkeypatch):
    model = dense()
    step = capture(training(model, optim.Adam(model.parameters())))
    for x, y in DATA[:3]:
        step(x, y)
    run = Forward.run

    def faulty(line, s, args):
        run(line, s, args)
        if line.name == "batch_norm_relu":
            s[line.outs[0]] = np.nextafter(s[line.outs[0]], np.float32(9))

    monkeypatch.setattr(Forward, "run", faulty)
    with pytest.warns(UserWarning, match="batch_norm_relu in 1 gives other numbers than in the engine"):
        deque(map(step, *zip(*DATA[3:], strict=True)), maxlen=0)
    assert not step.programs


# ---- when it steps aside ------------------------------------------------------------------------------------------


def test_a_second_thread_runs_as_always_meanwhile(declared):
    inside, go_on = threading.Event(), threading.Event()
    results = []

    def waits(x):
        """x times 2, after a while."""
        inside.set()
        go_on.wait(10)
        return x * 2

    op = declared(waits)
    step = capture(lambda x: op(Tensor(x)))
    thread = threading.Thread(target=lambda: results.append(step(X)))
    thread.start()
    inside.wait(10)
    go_on.set()
    results.append(step(X))
    thread.join()
    assert all(np.array_equal(r.numpy(), 2 * X) for r in results)


def test_a_step_keeps_no_results():
    step = capture(lambda x: (Tensor(x) * 2, (Tensor(x) * 3).sum()))
    for _ in range(4):
        results = step(X)
    refs = [weakref.ref(results[0]._data)]
    del results
    assert refs[0]() is None
    assert all(a is None or a.size < 10 for a in step.programs[0].constants if hasattr(a, "size"))


def test_a_program_lists_its_operations_with_their_modules():
    model = dense()
    step = capture(training(model, optim.SGD(model.parameters(), 0.01)))
    for x, y in DATA[:3]:
        step(x, y)
    lines = str(step.programs[0]).splitlines()
    assert any("= linear(%2, 0.weight, 0.bias)" in line and line.endswith("# 0, 492 bytes") for line in lines)
    assert any(":float32[8,5]" in line and " batch_norm_relu(" in line and "# 1, " in line for line in lines)
    assert any("= draw_key(None)" in line and line.endswith("# 3") for line in lines)
    assert sum("linear.vjp(" in line for line in lines) == 3
    assert any(line.startswith("0.weight.grad = %") for line in lines)
    assert lines[-2].startswith("step(")
    assert lines[-1].startswith(f"{len(lines) - 1} operations, ")
