"""What the Python code of a captured step may do and read: effects are refused by name, changes are taken up."""

import functools
import gc
import itertools
import math
import operator
import os
import sys
from collections import deque
from dataclasses import dataclass, field

import numpy as np
import pytest

from tests.framework.test_capture import DATA, dense, expect_same_bits, training
from tinygrad_bn import Tensor, capture, manual_seed, nn, no_grad, optim, train
from tinygrad_bn import functional as F

X = np.float32([[1, 2], [3, 4], [5, 6]])
STEPS = 8


@dataclass
class Settings:
    scale: float = 2.0
    more: dict = field(default_factory=lambda: {"shift": [1.0, 2.0]})


class Counter:
    calls = 0

    def scaled(self, y):
        return y * 2.0

    def __call__(self, y):
        self.calls += 1
        return y


def repeat(step):
    for _ in range(STEPS):
        step(X)


settings, counter, numbers, endless, queue, total = Settings(), Counter(), [], itertools.count(), deque([2.0]), 0.0
many = [2.0] * 5000
model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
optimizer = optim.SGD(model.parameters(), 0.1)
counts, leaf, gains = np.zeros(2), Tensor([1.0], requires_grad=True), np.array([2.0, 3.0])
tick, cached = optim.StepLR(optimizer, 1).step, functools.lru_cache(Settings)
table = {"a": 2.0, "b": 3.0}


# ---- what lasts -------------------------------------------------------------------------------------------


def prints(y):
    print("step")
    return y


def assigns_an_attribute(y):
    settings.scale = 3.0
    return y


def assigns_an_option(y):
    optimizer.param_groups[0]["lr"] = 0.2
    return y


def assigns_a_global(y):
    global total
    total = 1.0
    return y


def counts_in_a_closure():
    n = 0

    def count(y):
        nonlocal n
        n += 1
        return y * n

    return count


def counts_in_an_object(y):
    return counter(y)


def appends(y):
    numbers.append(1)
    return y


def appends_in_place(y):
    mine = numbers
    mine += [1]
    return y


def appends_to_a_default(y, seen=[]):  # noqa: B006
    seen.append(1)
    return y


def sets_by_name(y):
    setattr(settings, "scale", 2.0)  # noqa: B010
    return y


def draws(y):
    return y * float(np.random.default_rng().random())


def seeds(y):
    manual_seed(0)
    return F.dropout(y, 0.5)


def trains(y):
    train.fit(model, (X, X), loss=F.mse_loss, epochs=1, progress=False)
    return y


def reads_an_iterator(y):
    return y * next(endless)


def loops_over_an_iterator(y):
    for n in endless:
        y = y * n
        break
    return y


def imports(y):
    import math as here

    return y * here.pi


def reads_of_many(y):
    return y * many[3]


def reads_a_queue(y):
    return y * queue[0]


def adds_in_place(y):
    mine = counts
    mine += 1
    return y


def catches(y):
    try:
        return y.reshape(7)
    except ValueError:
        return y


def steps_by_another_name(y):
    tick()
    return y


def leaves_evaluation_mode(y):
    model.eval()
    y = model(y)
    model.train()
    return y


def sets_like_a_frozen_dataclass(y):
    object.__setattr__(settings, "scale", 2.0)
    return y


def prints_by_map(y):
    list(map(print, ["step"]))
    return y


def reads_a_cached_object(y):
    return y * cached().scale


def forgets_a_gradient(y):
    leaf.grad = None
    return y


LASTING = {
    adds_in_place: "the step changes what its Python code reads: counts",
    catches: r"catches\(\) catches an error",
    steps_by_another_name: r"the step calls Schedule.step\(\) by a name of its own; call it by its object",
    leaves_evaluation_mode: r"the step calls Module.train\(\), which changes a module",
    sets_like_a_frozen_dataclass: r"sets_like_a_frozen_dataclass\(\) uses __setattr__",
    prints_by_map: r"prints_by_map\(\) uses print",
    reads_a_cached_object: "cached is a _lru_cache_wrapper, which a program would not call again",
    forgets_a_gradient: r"forgets_a_gradient\(\) assigns an attribute \(grad\)",
    prints: r"prints\(\) uses print, which a program would not do again",
    assigns_an_attribute: r"assigns_an_attribute\(\) assigns an attribute \(scale\)",
    assigns_an_option: r"assigns_an_option\(\) assigns an element",
    assigns_a_global: r"assigns_a_global\(\) assigns a global variable \(total\)",
    counts_in_a_closure(): r"count\(\) assigns a variable of the function around it \(n\)",
    counts_in_an_object: r"Counter.__call__\(\) assigns an attribute \(calls\)",
    appends: "the step changes what its Python code reads: numbers",
    appends_in_place: "the step changes what its Python code reads: numbers",
    appends_to_a_default: "the step changes what its Python code reads: an element of a default",
    sets_by_name: r"sets_by_name\(\) uses setattr",
    draws: r"np\.random\.\w+ is a \w+, wh",
    seeds: r"the step calls manual_seed\(\)",
    trains: r"the step calls fit\(\)",
    reads_an_iterator: "endless is a count, whose changes would not be found",
    loops_over_an_iterator: "endless is a count, whose changes would not be found",
    imports: r"imports\(\) imports a module \(math\)",
    reads_of_many: "many has 5000 elements, too many to look at in each step",
    reads_a_queue: "queue is a deque, whose changes would not be found",
}


@pytest.mark.parametrize("effect", LASTING, ids=lambda f: f.__name__)
def test_code_whose_effects_would_stand_still_is_refused_with_the_reason(effect, capsys):
    step = capture(lambda x: effect(Tensor(x)).sum())
    with pytest.warns(UserWarning, match=f"runs as always: .*{LASTING[effect]}"):
        repeat(step)
    assert not step.programs
    effect_of_one = capsys.readouterr().out.count("step")
    assert effect_of_one in (0, STEPS)


def test_an_effect_inside_of_a_module_is_refused():
    class Counting(nn.ReLU):
        def forward(self, x):
            self.calls = getattr(self, "calls", 0) + 1
            return super().forward(x)

    layer = Counting()
    step = capture(lambda x: layer(Tensor(x)))
    with pytest.warns(UserWarning, match=r"Counting.forward\(\) assigns an attribute \(calls\)"):
        repeat(step)
    assert layer.calls == STEPS


# ---- what is read -----------------------------------------------------------------------------------------


def reads(y):
    return y * settings.scale + settings.more["shift"][0]


def changes_a_number():
    settings.scale += 1


def changes_a_nested_list():
    settings.more["shift"][0] += 1


def changes_an_object():
    global settings
    settings = Settings(scale=settings.scale + 1)


def changes_a_method():
    Counter.scaled = lambda self, y: y * 5.0


def reads_by_a_computed_name(y):
    return y * getattr(settings, "sca" + "le"[: len("le")])


CHANGES = [changes_a_number, changes_a_nested_list, changes_an_object, changes_a_method]


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_what_the_code_reads_is_taken_up_at_once(change, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "settings", Settings())
    monkeypatch.setattr(Counter, "scaled", Counter.scaled)

    def function(x):
        return counter.scaled(reads(Tensor(x))).sum()

    step = capture(function)
    for _ in range(STEPS):
        assert step(X).item() == function(X).item()
    assert step.programs
    before = step(X).item()
    change()
    assert step(X).item() == function(X).item() != before


class Base:
    scale = 2.0


class Derived(Base):
    pass


def read_by_class(y):
    return y * Derived.scale


def read_by_a_function(y):
    return y * read_by_a_function.scale


read_by_a_function.scale = 2.0
derived = Derived()
READ = {
    "an element of an array": (lambda y: y * gains[0], lambda: gains.__setitem__(0, 5.0)),
    "an inherited attribute": (read_by_class, lambda: setattr(Base, "scale", 5.0)),
    "an attribute of a function": (read_by_a_function, lambda: setattr(read_by_a_function, "scale", 5.0)),
    "an attribute that appears": (lambda y: y * getattr(derived, "late", 2.0), lambda: setattr(derived, "late", 5.0)),
    "an attribute by a text": (
        lambda y: y * operator.attrgetter("scale")(derived), lambda: setattr(derived, "scale", 7.0)
    ),
    "the order of a dictionary": (lambda y: y * max(table)[0].count("b"), lambda: table.update(c=table.pop("b"))),
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_whatever_the_code_reads_is_taken_up_at_once(name):
    reader, change = READ[name]

    def function(x):
        return reader(Tensor(x)).sum()

    step = capture(function)
    repeat(step)
    assert step.programs
    before = step(X).item()
    change()
    assert step(X).item() == function(X).item() != before


def test_an_option_of_the_optimizer_that_the_code_reads_is_taken_up():
    w = Tensor([1.0, 2.0], requires_grad=True)
    sgd = optim.SGD([w], 0.1)
    step = capture(lambda x: (Tensor(x) * w).sum() * sgd.param_groups[0]["lr"])
    for _ in range(STEPS):
        step(X)
    assert step.programs
    sgd.param_groups[0]["lr"] = 1.0
    assert step(X).item() == pytest.approx(33)


def test_attributes_that_are_read_by_a_computed_name_are_taken_up(monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "settings", Settings())
    step = capture(lambda x: reads_by_a_computed_name(Tensor(x)).sum())
    for scale in (2.0, 3.0):
        settings.scale = scale
        assert [step(X).item() for _ in range(STEPS)] == [21 * scale] * STEPS
        assert step.programs


def test_defaults_closures_and_partial_functions_are_read():
    scale = 2.0

    def scaled(y, by=[3.0]):  # noqa: B006
        return y * by[0] * scale

    step = capture(functools.partial(lambda f, x: f(Tensor(x)).sum(), scaled))
    assert [step(X).item() for _ in range(4)] == [126] * 4
    assert step.programs
    scaled.__defaults__[0][0] = 4.0
    assert [step(X).item() for _ in range(4)] == [168] * 4
    scale = 1.0
    assert [step(X).item() for _ in range(4)] == [84] * 4


def test_code_that_only_computes_is_captured():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(*(nn.Linear(6, 6) for _ in range(3)))
            self.scales = [0.5, 1.0, 2.0]
            self.head = nn.Linear(6, 3)

        def forward(self, x):
            outputs = [x]
            for layer, scale in zip(self.layers, self.scales, strict=True):
                outputs.append(F.relu(layer(outputs[-1])) * scale + outputs[-1])
            with no_grad():
                size = math.sqrt(sum(y.size for y in outputs))
            named = {f"y{i}": y for i, y in enumerate(outputs)}
            return self.head(max(named.items())[1]) * (1 / size)

    def build():
        manual_seed(0)
        return Residual()

    expect_same_bits(build)


# ---- while it is recorded -----------------------------------------------------------------------------------


def test_a_step_runs_as_always_where_a_profiler_looks_on():
    step = capture(lambda x: Tensor(x) * 2)
    before = sys.getprofile()
    try:
        sys.setprofile(lambda *args: None)
        step(X)
        assert sys.getprofile() is not None
    finally:
        sys.setprofile(before)
    for _ in range(STEPS):
        step(X)
    assert step.programs


def test_an_error_in_the_step_ends_the_observation():
    def fails(x):
        raise ValueError("no")

    step = capture(fails)
    with pytest.raises(ValueError, match="no"):
        step(X)
    assert sys.getprofile() is None
    assert gc.isenabled()


def test_a_collection_of_garbage_meanwhile_is_not_the_steps():
    collected = []

    def look(phase, info):
        collected.append(os.getpid())

    threshold = gc.get_threshold()
    gc.callbacks.append(look)
    gc.set_threshold(1)
    try:
        step = capture(training(net := dense(), optim.Adam(net.parameters())))
        for x, y in DATA[:6]:
            step(x, y)
    finally:
        gc.callbacks.remove(look)
        gc.set_threshold(*threshold)
    assert collected
    assert step.programs


def test_a_collector_that_is_off_stays_off():
    gc.disable()
    try:
        capture(lambda x: Tensor(x) * 2)(X)
        assert not gc.isenabled()
    finally:
        gc.enable()
