"""Walks of CUDA programs visit every element once, and split long rows."""

import math

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st
from tinygrad_bn_kernels.cuda.strides import LONG, broadcast, contiguous, row_block, walks


@given(st.lists(st.integers(1, 4), max_size=6), st.integers(0, 99))
@example([3], 0)
@example([2, LONG + 5], 0)
@example([LONG * 3 + 1], 1)
def test_every_element_is_visited_once(shape, seed):
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(shape))
    source = np.arange(math.prod(shape)).reshape([shape[i] for i in order])
    own = contiguous(source.shape)
    steps = [tuple(own[list(order).index(i)] for i in range(len(shape))), contiguous(tuple(shape))]
    got = np.full(math.prod(shape), -1)
    for walk in walks(tuple(shape), (0, 0), steps):
        index = np.indices(walk.shape).reshape(4, -1)
        at, to = (start + np.asarray(step) @ index for start, step in zip(walk.starts, walk.steps, strict=True))
        assert (got[to] == -1).all()
        got[to] = source.ravel()[at]
    want = source.transpose([list(order).index(i) for i in range(len(shape))])
    np.testing.assert_array_equal(got, want.ravel())


def test_a_long_row_is_work_for_many_warps():
    n = 1 << 23
    parts = list(walks((8, n // 8), (0, 0), (broadcast((), (8, n // 8)), contiguous((8, n // 8)))))
    assert parts[0].rows >= n // 512
    assert sum(math.prod(walk.shape) for walk in parts) == n


def test_blocks_have_256_threads():
    for inner in (1, 2, 31, 33, 1000):
        for rows in (1, 10**6):
            along, across = row_block(inner, rows)
            assert along * across == 256
            assert along < 2 * max(inner, 1) or along == 1
