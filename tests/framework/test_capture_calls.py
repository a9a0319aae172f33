"""How captured steps are called, and what this package does inside of them: schedules, clipping, modes, numbers."""

import copy
from contextlib import nullcontext

import numpy as np
import pytest

from tests.framework.test_capture import DATA, dense
from tests.framework.test_capture_python import STEPS, X
from tinygrad_bn import Tensor, capture, nn, optim
from tinygrad_bn import functional as F

# ---- how it is called -------------------------------------------------------------------------------------------


def test_arguments_by_name_have_programs_of_their_own():
    step = capture(lambda x, y: Tensor(x) - Tensor(y))
    for n in range(STEPS):
        assert np.array_equal(step(X, y=X * n).numpy(), X - X * np.float32(n))
        assert np.array_equal(step(y=X * n, x=X).numpy(), X - X * np.float32(n))
    assert len(step.programs) == 2


def test_an_argument_that_cannot_be_captured_is_named_once():
    step = capture(lambda x, w: (Tensor(x) * w).sum())
    w = Tensor([1.0, 2.0], requires_grad=True)
    with pytest.warns(UserWarning, match=r"runs as always: an argument is Tensor"):
        results = [step(X, w).item() for _ in range(STEPS)]
    assert results == [33] * STEPS
    assert [step(X, w.detach()).item() for _ in range(STEPS)] == results
    assert len(step.programs) == len(step.reasons) == 1


def test_numbers_that_change_in_each_step_have_so_many_programs_and_no_more():
    step = capture(lambda x, n: Tensor(x) * n)
    with pytest.warns(UserWarning, match="more than 64 kinds; pass numbers that change as arrays"):
        results = [step(X, n).numpy() for n in range(100)]
    assert np.array_equal(results, [X * np.float32(n) for n in range(100)])
    assert len(step._cases) == 65


def test_a_method_is_captured_by_its_object():
    class Trainer:
        scale = 2.0

        def step(self, x):
            return Tensor(x) * self.scale

        decorated = capture(step)

    trainer = Trainer()
    with pytest.raises(TypeError, match=r"Trainer.step is a method; capture one of an object: step = capture"):
        trainer.decorated(X)
    step = capture(trainer.step)
    for scale in (2.0, 3.0):
        trainer.scale = scale
        for _ in range(STEPS):
            assert np.array_equal(step(X).numpy(), X * np.float32(scale))
        assert step.programs


def test_what_is_no_function_is_an_error():
    with pytest.raises(TypeError, match="capture takes a function; got 3"):
        capture(3)


# ---- what this package does for it ---------------------------------------------------------------------------------


def stepping(network, sgd, before=lambda: None, after=lambda: True):
    """A training step with something before it, and after the backward pass: whether the optimizer takes a step."""

    def step(x, y):
        before()
        sgd.zero_grad()
        F.cross_entropy(network(x), y).backward()
        if after():
            sgd.step()

    return step


def expect_same_ends(build, steps=12, warns=None):
    """Train with and without `capture`. The step is captured unless a warning is expected."""
    ends = []
    for wrap in (lambda f: f, capture):
        network = dense(p=0.0)
        step = wrap(build(network, optim.SGD(network.parameters(), 0.1)))
        with pytest.warns(UserWarning, match=warns) if warns and wrap is capture else nullcontext():
            for x, y in DATA[:steps]:
                step(x, y)
        ends.append([p.numpy().tolist() for p in network.parameters()])
    assert ends[0] == ends[1]
    assert bool(step.programs) == (warns is None)


def test_schedules_of_schedules_go_on():
    def build(network, sgd):
        schedule = optim.WarmupLR(sgd, 3, optim.StepLR(sgd, 2, 0.5))
        return stepping(network, sgd, before=lambda: schedule.step())

    expect_same_ends(build)


def test_clipped_values_go_on():
    def build(network, sgd):
        return stepping(network, sgd, after=lambda: optim.clip_grad_value_(network.parameters(), 0.01) is None)

    expect_same_ends(build)


def test_a_decision_by_a_number_that_the_host_computed_is_refused():
    def build(network, sgd):
        return stepping(network, sgd, after=lambda: optim.clip_grad_norm_(network.parameters(), 1.0) < 0.9)

    expect_same_ends(build, warns=r"reads a number that it computed \(__lt__\)")


def test_state_that_is_assigned_outside_of_recorded_calls_is_refused():
    def build(network, sgd):
        return stepping(network, sgd, before=lambda: nn.init.ones_(network[1].weight))

    expect_same_ends(build, warns="reads or assigns numbers")


def test_a_mode_that_the_step_sets_itself_is_set_again():
    def build(network, sgd):
        return stepping(network, sgd, before=lambda: network.train())

    expect_same_ends(build)
    network = dense(p=0.0)
    step = capture(build(network, optim.SGD(network.parameters(), 0.1)))
    for x, y in DATA[:6]:
        step(x, y)
    network.eval()
    step(*DATA[6])
    assert network.training


def test_a_norm_is_returned_as_a_number():
    network = dense(p=0.0)

    def step(x, y):
        network.zero_grad()
        F.cross_entropy(network(x), y).backward()
        return optim.clip_grad_norm_(network.parameters(), 0.5)

    captured = capture(step)
    for x, y in DATA[:8]:
        norm = captured(x, y)
        assert type(norm) is float
        assert norm == step(x, y)
    assert captured.programs


def test_an_array_that_is_given_twice_and_then_another():
    step = capture(lambda a, b: Tensor(a) * 2 + Tensor(b))
    for _ in range(4):
        step(X, X)
    assert np.array_equal(step(X, -X).numpy(), X)


def test_two_arguments_over_one_memory_and_then_another():
    step = capture(lambda a, b: Tensor(a) * 2 + Tensor(b))
    for _ in range(4):
        step(X, X[:])
    assert np.array_equal(step(X, -X).numpy(), X)


def test_an_argument_that_the_step_also_reads_by_name():
    step = capture(lambda x: (Tensor(x) * Tensor(X)).sum())
    with pytest.warns(UserWarning, match="an argument is also an array"):
        results = [step(x).item() for x in (X, X, X, X, 2 * X)]
    assert results[4] == 2 * results[0]


def test_gradients_add_up_where_nothing_clears_them():
    w = Tensor([1.0, 2.0], requires_grad=True)
    step = capture(lambda x: (Tensor(x) * w).sum().backward())
    for _ in range(5):
        w.zero_grad()
        step(X)
    assert step.programs
    with pytest.warns(UserWarning, match="a gradient is added to that of a step before"):
        results = [step(X) for _ in range(3)]
    assert results == [None] * 3
    assert w.grad.numpy().tolist() == (4 * X.sum(axis=0)).tolist()


def test_two_backward_passes_in_a_step_add_up():
    ends = []
    for wrap in (lambda f: f, capture):
        w = Tensor([1.0, 2.0], requires_grad=True)

        def function(x, w=w):
            w.zero_grad()
            (Tensor(x) * w).sum().backward()
            (Tensor(x) * w * w).sum().backward()
            return w.grad

        step = wrap(function)
        ends.append([step(X * n).numpy().tolist() for n in range(8)])
    assert ends[0] == ends[1]
    assert step.programs


def test_a_tensor_in_a_list_is_unfrozen():
    tensors = [Tensor([1.0, 2.0], requires_grad=True), Tensor([3.0, 4.0])]

    def function(x):
        for t in tensors:
            t.zero_grad()
        (Tensor(x) * tensors[0] * tensors[1]).sum().backward()

    step = capture(function)
    for _ in range(8):
        step(X)
    assert step.programs
    tensors[1].requires_grad = True
    step(X)
    assert tensors[1].grad.numpy().tolist() == (X.sum(axis=0) * [1, 2]).tolist()


def test_a_copy_of_an_object_with_a_captured_step_records_its_own():
    class Trainer:
        def __init__(self):
            self.scale = 2.0
            self.run = capture(self.step)

        def step(self, x):
            return Tensor(x) * self.scale

    trainer = Trainer()
    other = copy.deepcopy(trainer)
    other.scale = 3.0
    for _ in range(STEPS):
        assert np.array_equal(trainer.run(X).numpy(), X * np.float32(2))
        assert np.array_equal(other.run(X).numpy(), X * np.float32(3))
    assert trainer.run.programs
    assert other.run.programs


@pytest.mark.parametrize(("line", "what"), [("t._data = t._data + 1", "data"), ("t.grad = None", "gradient")])
def test_functions_of_the_package_may_not_assign_without_a_record(line, what):
    """A function that would be added to the package, and forgotten in `hooks`."""
    module = {"__name__": "tinygrad_bn.nn.later"}
    exec(f"def poke(t):\n    {line}", module)
    w = Tensor([1.0, 2.0], requires_grad=True)

    def step(x):
        w.zero_grad()
        (Tensor(x) * w).sum().backward()
        module["poke"](w)

    captured = capture(step)
    with pytest.warns(UserWarning, match=f"the step assigns the {what} of a tensor"):
        captured(X)


def test_what_is_printed_before_and_without_a_program():
    step, refused = capture(lambda x: Tensor(x) * 2), capture(lambda x: Tensor(x) * float(x[0, 0]), quiet=True)
    assert str(step) == "no program yet: it is there after the second step"
    for _ in range(2):
        step(X), refused(X)
    assert str(step) == str(step.programs[0])
    assert str(refused).startswith("not captured: the step computes with the numbers of an argument (__getitem__)")
