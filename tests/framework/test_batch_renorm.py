"""Batch renormalisation of the demo, against the formulas of the paper."""

import numpy as np

from demos import batch_renorm
from tinygrad_bn import composed, nn


def test_batch_renorm_is_batch_norm_at_first_and_then_as_in_the_paper():
    rng = np.random.default_rng(0)
    x = rng.normal(3, 2, (4, 3)).astype(np.float32)
    layer, plain = batch_renorm.BatchRenorm(3), nn.BatchNorm1d(3)
    np.testing.assert_allclose(layer(x).numpy(), plain(x).numpy(), atol=1e-6)
    np.testing.assert_array_equal(layer.running_var.numpy(), plain.running_var.numpy())
    layer.num_batches_tracked.data, layer.running_mean.data = np.int64(1000), [3.0, -9.0, 3.1]
    layer.running_var.data, layer.weight.data, layer.bias.data = [1.0, 1.0, 0.05], [1.0, 2.0, -1.0], [0.5, 0.0, 1.0]
    mean, deviation = layer.running_mean.numpy(), np.sqrt(layer.running_var.numpy() + 1e-5)
    batch = np.sqrt(x.var(0) + 1e-5)
    r, d = np.clip(batch / deviation, 1 / 3, 3), np.clip((x.mean(0) - mean) / deviation, -5, 5)
    assert (d[1], r[2]) == (5, 3), "limits are reached"
    wanted = ((x - x.mean(0)) / batch * r + d) * layer.weight.numpy() + layer.bias.numpy()
    np.testing.assert_allclose(layer(x).numpy(), wanted, rtol=1e-5)
    with composed():
        layer.num_batches_tracked.data, layer.running_mean.data = np.int64(1000), mean
        layer.running_var.data = deviation**2 - 1e-5
        np.testing.assert_allclose(layer(x).numpy(), wanted, rtol=1e-4)
