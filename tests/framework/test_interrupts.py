"""Ctrl-C at any moment: the modes are as before, and no interrupt is lost."""

import dis
import sys
from contextlib import ExitStack, nullcontext
from functools import cache

import pytest

from tests.tools.interrupts import caught_interrupts
from tinygrad_bn import Tensor, autograd, backend, composed, debug, grad, is_recording, modes, nn, no_grad
from tinygrad_bn import functional as F
from tinygrad_bn.functional import reductions
from tinygrad_bn.nn import batch_statistics

FILES = {
    f.__code__.co_filename
    for f in (modes.debug, autograd.grad, nn.observe, batch_statistics, reductions.note, backend.kernels_disabled)
}


@cache
def bytecode(code):
    return code.co_code


class Interrupt:
    """Raises KeyboardInterrupt at the nth moment at which Python may deliver one in these files.

    That is before the first line of a function, after a call, and where a loop goes back.
    """

    def __init__(self, n):
        self.left, self.before = n, {}

    def __call__(self, frame, event, argument):
        if frame.f_code.co_filename not in FILES:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            done = self.before.get(frame, "RESUME")
            self.before[frame] = dis.opname[bytecode(frame.f_code)[frame.f_lasti]]
            if done.startswith(("RESUME", "CALL", "JUMP_BACKWARD")):
                self.left -= 1
                if self.left == 0:
                    raise KeyboardInterrupt
        return self

    def during(self, work):
        """Run `work`; whether it was interrupted."""
        before = sys.gettrace()
        sys._getframe().f_trace_opcodes = True  # Python 3.12 asks a frame before the trace begins
        sys.settrace(self)
        try:
            work()
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(before)
        return False


def block():
    with no_grad():
        pass


def nested():
    mode = no_grad()
    with mode, modes.recording(True), mode, composed(), debug():
        pass


@no_grad()
def decorated():
    return F.relu(Tensor([1.0]))


@no_grad()
def steps():
    for _ in range(2):
        yield is_recording()


def generator():
    assert list(steps()) == [False, False]


def on_a_stack():
    with ExitStack() as stack:
        stack.enter_context(no_grad())


def backward(create_graph=False):
    x = Tensor([[1.0], [2.0], [4.0]], requires_grad=True)
    F.mean(x * x).backward(create_graph=create_graph)


def second_order():
    x = Tensor(3.0, requires_grad=True)
    grad(grad(x * x, x, create_graph=True), x)


MODEL = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Dropout(), nn.Sequential(nn.BatchNorm1d(3).eval()))


def blocks_of_modules():
    with nn.observe(lambda module, y: None), nn.evaluating(MODEL):
        with nn.batch_statistics(MODEL), nn.batch_statistics(MODEL):
            pass
        assert not MODEL.training


def other_settings():
    with backend.kernels_disabled(), reductions.reductions([]):
        assert backend.find_kernel("sum", "cpu") is None


def state():
    return is_recording(), modes.COMPOSED.get(), modes.DEBUGGING.get()


def others():
    """What else the blocks change."""
    modes = [(m.training, getattr(m, "_collect", None)) for m in MODEL.modules()]
    return nn.module.being_observed(), backend.ENABLED.get(), reductions._listener.get(), modes


WORK = block, nested, decorated, generator, backward, lambda: backward(True), second_order
OTHERS = blocks_of_modules, other_settings


@pytest.mark.parametrize("work", WORK + OTHERS)
@pytest.mark.parametrize("recording", [True, False])
def test_modes_are_as_before_at_whatever_moment_an_interrupt_comes(work, recording):
    work()  # imports the kernels
    before = others()
    with modes.recording(recording) if recording else nullcontext():
        n = 1
        while Interrupt(n).during(work):
            assert state() == (True, False, False)
            assert others() == before
            n += 1
        assert n > 5


def test_modes_are_as_before_under_real_interrupts():
    def recording():
        assert is_recording()

    assert caught_interrupts(300, block, recording) == 300


def test_a_mode_is_left_in_every_way():
    for work in (block, nested, decorated, generator, on_a_stack, backward, second_order):
        work()
        assert state() == (True, False, False)
    mode = no_grad()
    for _ in range(2):
        mode.__enter__()
        assert not is_recording()
        mode.__exit__(None, None, None)
        assert is_recording()
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), no_grad():
            raise error
        assert is_recording()


def test_what_a_rule_sets_does_not_reach_the_caller():
    with no_grad():
        x = Tensor(2.0, requires_grad=True)
        with modes.recording(True):
            y = x * x
        grad(y, x, create_graph=True)
        assert not is_recording()
