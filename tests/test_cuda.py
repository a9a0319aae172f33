"""Training on cuda, end to end: what a GPU would run is executed from its PTX, by the interpreter of `tests/ptx`."""

import contextlib

import numpy as np
import pytest

from tinygrad_bn import Tensor, cuda, functional, nn, optim, testing
from tinygrad_bn.autograd import OPS
from tests.ptx.compile import need_compiler, offline
from tests.ptx.interpreter import Device


class Interpreted(Device):
    """The interpreter, as the driver that programs are launched with."""

    cc, processors, name = (9, 0), 2, "PTX interpreter"

    def read(self, pointer, nbytes):
        return super().read(pointer, (nbytes,), np.uint8)

    def copy(self, to, source, nbytes):
        self.write(to, self.read(source, nbytes))

    def launch(self, ptx, name, grid, block, args):
        super().launch(ptx, grid, block, args, name=name)

    def synchronize(self):
        pass


@pytest.fixture(scope="module", autouse=True)
def device():
    need_compiler()
    from tinygrad_bn_kernels.cuda import launch

    with offline(), launch.using(Interpreted()) as interpreted:
        yield interpreted


BUILT_IN = [name for name, op in OPS.items() if op.forward.__module__.startswith("tinygrad_bn.")]


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_op_is_the_same_as_on_the_cpu(name):
    for example in range(4):
        xs, params = OPS[name].sample(testing.RandomDraw(example))
        testing.device_matches_cpu(OPS[name], xs, params, example, "cuda")
