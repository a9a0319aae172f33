"""Modes as decorators: they hold in the body of a function, and not while the body waits for its caller."""

import asyncio
import functools
import inspect
import types

import pytest

from tinygrad_bn import Tensor, composed, debug, is_recording, nn, no_grad
from tinygrad_bn.backend import ENABLED, kernels_disabled
from tinygrad_bn.modes import COMPOSED, DEBUGGING, RECORDING, recording
from tinygrad_bn.nn.module import being_observed

MODES = [(no_grad, RECORDING, False), (composed, COMPOSED, True), (debug, DEBUGGING, True)]


class Pause:
    """Hands control to whatever runs the coroutine."""

    def __await__(self):
        yield "pause"


def generator(variable, seen):
    seen.append(variable.get())
    yield 1
    seen.append(variable.get())


async def coroutine(variable, seen):
    seen.append(variable.get())
    await Pause()
    seen.append(variable.get())


async def async_generator(variable, seen):
    seen.append(variable.get())
    await Pause()
    seen.append(variable.get())
    yield 1
    seen.append(variable.get())


def advanced(body):
    """Run `body` step by step, giving control back here at each."""
    yield from body if inspect.isgenerator(body) else body.__await__()


async def consumed(body, variable, outside):
    async for _ in body:
        assert variable.get() is outside


@pytest.mark.parametrize(("mode", "variable", "inside"), MODES, ids=lambda m: getattr(m, "__name__", ""))
@pytest.mark.parametrize("function", [generator, coroutine, async_generator])
def test_a_mode_holds_inside_a_decorated_function_and_only_there(mode, variable, inside, function):
    seen, outside = [], variable.get()
    decorated = mode()(function)
    assert inspect.isgeneratorfunction(decorated) == inspect.isgeneratorfunction(function)
    assert inspect.iscoroutinefunction(decorated) == inspect.iscoroutinefunction(function)
    assert inspect.isasyncgenfunction(decorated) == inspect.isasyncgenfunction(function)
    for _ in range(2):  # the decorated function runs again
        body = decorated(variable, seen)
        for _ in advanced(consumed(body, variable, outside) if function is async_generator else body):
            assert variable.get() is outside  # while the body waits
        assert variable.get() is outside
    assert len(seen) >= 4
    assert set(seen) == {inside}


def test_each_step_of_two_generators_has_its_own_mode():
    x = Tensor(2.0, requires_grad=True)

    def squares():
        while True:
            yield (x * x).requires_grad

    on, off = squares(), no_grad()(squares)()
    assert [(next(on), next(off)) for _ in range(3)] == [(True, False)] * 3


def test_a_block_inside_a_decorated_generator_outlasts_its_pauses():
    @no_grad()
    def steps():
        with recording(True):
            yield is_recording()
            yield is_recording()
        yield is_recording()

    with no_grad():
        assert [(mode, is_recording()) for mode in steps()] == [(True, False), (True, False), (False, False)]


def test_a_decorated_generator_takes_what_is_sent_and_thrown_and_closes():
    closed = []

    @no_grad()
    @composed()
    def echo():
        """Words."""
        got = yield "first"
        try:
            while got != "end":
                try:
                    got = yield got, is_recording(), COMPOSED.get()
                except KeyError as error:
                    got = error.args[0]
        finally:
            closed.append(is_recording())
        return "result"

    assert echo.__doc__ == "Words."
    it = echo()
    assert [next(it), it.send("a"), it.throw(KeyError("b"))] == ["first", ("a", False, True), ("b", False, True)]
    with pytest.raises(StopIteration) as done:
        it.send("end")
    assert done.value.value == "result"
    unfinished = echo()
    for _ in range(2):
        next(unfinished)
    unfinished.close()
    assert closed == [False, False]
    assert is_recording()


def test_a_decorated_async_generator_takes_what_is_sent_and_thrown_and_closes():
    closed = []

    @no_grad()
    async def echo():
        got = yield "first"
        try:
            while True:
                try:
                    got = yield got, is_recording()
                except KeyError as error:
                    got = error.args[0]
        finally:
            await asyncio.sleep(0)
            closed.append(is_recording())

    async def talk():
        it = echo()
        said = [await anext(it), await it.asend("a"), await it.athrow(KeyError("b"))]
        await it.aclose()
        return said, is_recording()

    assert asyncio.run(talk()) == (["first", ("a", False), ("b", False)], True)
    assert closed == [False]


def test_tasks_that_take_turns_keep_their_own_mode():
    @no_grad()
    async def off():
        for _ in range(3):
            assert not is_recording()
            await asyncio.sleep(0)

    async def on():
        for _ in range(3):
            assert is_recording()
            await asyncio.sleep(0)

    async def both():
        await asyncio.gather(off(), on(), off())

    asyncio.run(both())
    assert is_recording()


@pytest.mark.parametrize("block", [nn.evaluating, nn.batch_statistics])
def test_a_change_of_modules_decorates_functions_only(block):
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout())

    @block(model)
    def inside():
        return model.training, model[1].training

    assert [inside(), inside()] == [(False, False)] * 2
    assert model.training
    for function in (generator, coroutine, async_generator):
        with pytest.raises(TypeError, match="runs after the call: use a with block in it"):
            block(model)(function)


@pytest.mark.parametrize("mode", [lambda: nn.observe(print), kernels_disabled])
def test_every_setting_of_the_thread_holds_in_a_decorated_generator(mode):
    def seen():
        while True:
            yield being_observed(), ENABLED.get()

    inside, outside = mode()(seen)(), seen()
    assert [next(inside) == next(outside) for _ in range(3)] == [False] * 3
    assert next(outside) == (False, True)


# ---- what else is decorated -------------------------------------------------------------------------------


def recordings():
    yield is_recording()


async def recording_later():
    return is_recording()


async def recordings_later():
    yield is_recording()


@types.coroutine
def recording_at_last():
    yield from ()
    return is_recording()


@functools.wraps(recordings)
def wrapped():
    return recordings()


class Generates:
    def __call__(self):
        yield is_recording()


class Awaits:
    async def __call__(self):
        return is_recording()


class GeneratesLater:
    async def __call__(self):
        yield is_recording()


class Computes:
    def __call__(self):
        return is_recording()


def first(result):
    """What a function, or the first pause of its body, gives."""

    async def of(body):
        values = [value async for value in body]
        return values[0]

    if inspect.isasyncgen(result):
        return asyncio.run(of(result))
    if inspect.iscoroutine(result):
        return asyncio.run(result)
    return next(result) if inspect.isgenerator(result) else result


BODIES = {
    "generator object": Generates(), "coroutine object": Awaits(), "async generator object": GeneratesLater(),
    "wrapped": wrapped, "lambda": lambda: recordings(), "lambda, coroutine": lambda: recording_later(),
    "lambda, async generator": lambda: recordings_later(), "cached": functools.lru_cache(recordings),
    "partial": functools.partial(recordings), "partial of object": functools.partial(Generates()),
    "partial of partial": functools.partial(functools.partial(recording_later)), "bound": Generates().__call__,
}  # fmt: skip


@pytest.mark.parametrize("name", BODIES)
def test_a_mode_holds_in_the_body_of_whatever_is_called(name):
    assert first(no_grad()(BODIES[name])()) is False
    assert is_recording()
    with pytest.raises(TypeError, match="runs after the call: use a with block in it"):
        nn.evaluating(nn.ReLU())(BODIES[name])()


def test_a_mode_holds_in_objects_and_methods():
    class Model:
        @no_grad()
        @staticmethod
        def static():
            return is_recording()

        @no_grad()
        @classmethod
        def of_class(cls):
            yield cls, is_recording()

        @no_grad()
        def method(self):
            return recordings()

    for model in (Model, Model()):
        assert model.static() is False
        assert list(model.of_class()) == [(Model, False)]
    assert list(Model().method()) == [False]
    assert no_grad()(Computes())() is False


def test_a_coroutine_of_types_can_be_awaited():
    async def awaits():
        return await no_grad()(recording_at_last)(), is_recording()

    assert asyncio.run(awaits()) == (False, True)


@pytest.mark.parametrize("wrong", [3, None, "f", Computes, property(Computes())])
def test_what_cannot_be_decorated_is_refused(wrong):
    for change in (no_grad(), composed(), nn.evaluating(nn.ReLU())):
        with pytest.raises(TypeError, match="only functions and methods can be decorated; got"):
            change(wrong)


def test_recording_is_true_or_false():
    with pytest.raises(TypeError, match="on has to be True or False; got 'no'"):
        recording("no")


def test_a_generator_that_began_before_is_returned_as_it_is():
    def numbers():
        yield from range(3)

    begun = numbers()
    next(begun)
    assert no_grad()(lambda: begun)() is begun
    assert list(begun) == [1, 2]
