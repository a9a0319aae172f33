"""Ops, training and shared memory on an NVIDIA GPU; skipped without one."""

import numpy as np
import pytest

from tests.cuda.gpu_report import measure, table
from tests.cuda.training import BUILT_IN, OPTIMISERS, cuda_matches_cpu, network, three_steps
from tinygrad_bn import Tensor, cuda, sample
from tinygrad_bn.tensor import OPS


@pytest.fixture(scope="module")
def gpu():
    if not cuda.is_available():
        pytest.skip(cuda.info()["reason"])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", BUILT_IN)
def test_every_op_is_the_same_as_on_the_cpu(name, dtype, gpu):
    for example in range(10):
        xs, params = OPS[name].sample(sample.RandomDraw(example))
        cuda_matches_cpu(OPS[name], xs, params, example, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_training_steps_are_those_of_the_cpu(optimiser, gpu):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(300, 6)).astype(np.float32), rng.integers(0, 3, 300)
    losses, want = (three_steps(network, optimiser, x, y, where)[0] for where in ("cuda", "cpu"))
    np.testing.assert_allclose(losses, want, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("library", ["torch", "cupy"])
def test_memory_is_shared_with_other_libraries(library, gpu):
    other = pytest.importorskip(library)
    t = Tensor(np.arange(6.0).reshape(2, 3)).to("cuda")
    theirs = other.from_dlpack(t.data)
    theirs += 1
    np.testing.assert_array_equal(t.numpy(), np.arange(6.0).reshape(2, 3) + 1)
    np.testing.assert_array_equal(cuda.from_dlpack(theirs).numpy(), t.numpy())


@pytest.mark.gpu
def test_work_follows_another_library_to_its_stream(gpu):
    torch = pytest.importorskip("torch")
    side = torch.cuda.Stream()
    with torch.cuda.stream(side), cuda.stream(side.cuda_stream):
        x = torch.ones(1 << 22, device="cuda") * 2
        z = torch.from_dlpack((cuda.from_dlpack(x) + 1.0).data) * 3
    side.synchronize()
    assert (z == 9).all()


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-5), (np.float64, 1e-13)])
def test_a_large_product_by_cublas_is_as_exact(dtype, tolerance, gpu):
    a, b = (np.random.default_rng(0).normal(size=shape) for shape in ((512, 300), (300, 256)))
    a, b = a.astype(dtype), b.astype(dtype)
    want = a.astype(np.float64) @ b.astype(np.float64)
    got = (Tensor(a).to("cuda") @ Tensor(b).to("cuda")).numpy()
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance * np.abs(want).max())


def test_the_report_runs_on_the_interpreter():
    """The report runs, here on the interpreter; its times mean nothing."""
    from tests.cuda.ptx.compile import require_compiler
    from tests.cuda.ptx.programs import interpreted

    require_compiler()
    with interpreted():
        rows = list(measure((2, 2, 4, 4), (5, 7), repeats=1, calls=1))
    lines = list(table(rows))
    assert len(lines) == len(rows) + 1
    assert "100%" in lines[1]
