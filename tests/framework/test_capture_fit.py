"""Captured steps inside of `train.fit`: the same history and state, for modules and losses of any program."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from tests.framework.test_capture import DATA, dense, state
from tinygrad_bn import functional as F
from tinygrad_bn import manual_seed, nn, optim, train
from tinygrad_bn.captured.program import Program


@pytest.mark.parametrize("options", [{}, {"clip_norm": 0.3}, {"loss": partial(F.cross_entropy, ignore_index=0)}])
def test_fit_gives_the_same_history_with_and_without(options):
    x, y = np.concatenate([x for x, _ in DATA]), np.concatenate([y for _, y in DATA])
    ends = []
    for on in (False, True):
        model = dense()
        optimizer = optim.Adam(model.parameters(), 0.01)
        schedule = optim.StepLR(optimizer, 2, 0.5)
        manual_seed(3)
        history = train.fit(
            model, (x, y), epochs=4, batch_size=30, optimizer=optimizer, schedule=schedule, capture=on, progress=False,
            **options,
        )  # fmt: skip
        ends.append((repr([replace(e, seconds=0) for e in history.epochs]), state(model, optimizer)))
    assert ends[0] == ends[1]


def test_fit_captures_by_itself(monkeypatch):
    class Own(nn.Sequential):
        def forward(self, x):
            return super().forward(x) * 2.0

    class Counting(nn.Sequential):
        def forward(self, x):
            self.calls = getattr(self, "calls", 0) + 1
            return super().forward(x)

    def run(model, loss=F.cross_entropy, **options):
        ran = []
        monkeypatch.setattr(Program, "run", lambda *args, run=Program.run: ran.append(1) or run(*args))
        data = np.concatenate([x for x, _ in DATA]), np.concatenate([y for _, y in DATA])
        train.fit(model, data, epochs=1, progress=False, loss=loss, **options)
        monkeypatch.undo()
        return bool(ran)

    assert run(dense())
    assert run(dense(), partial(F.cross_entropy, label_smoothing=0.1))
    assert run(dense(), lambda z, y: F.cross_entropy(z, y))
    assert run(Own(dense()))
    assert not run(dense(), capture=False)
    counting = Counting(dense())
    assert not run(counting)
    assert counting.calls == len(DATA) * 8 // 32


def test_a_loss_whose_function_names_a_variable_sees_its_changes():
    scale = 1.0

    def loss(outputs, target):
        return F.cross_entropy(outputs, target) * scale

    def double(history, model):
        nonlocal scale
        scale *= 2

    ends = []
    for on in (False, True):
        scale, model = 1.0, dense()
        optimizer = optim.SGD(model.parameters(), 0.01)
        manual_seed(3)
        data = np.concatenate([x for x, _ in DATA]), np.concatenate([y for _, y in DATA])
        history = train.fit(
            model, data, epochs=4, optimizer=optimizer, loss=loss, callbacks=double, capture=on, progress=False
        )
        ends.append((repr([replace(e, seconds=0) for e in history.epochs]), state(model, optimizer)))
    assert ends[0] == ends[1]


def test_a_loss_with_attributes_in_fit_is_taken_up():
    class Weighted:
        weight = 1.0

        def __call__(self, outputs, target):
            return F.cross_entropy(outputs, target) * self.weight

        def double(self, history, model):
            self.weight *= 2

    data = np.concatenate([x for x, _ in DATA]), np.concatenate([y for _, y in DATA])
    losses = []
    for on in (False, True):
        manual_seed(0)
        loss, network = Weighted(), dense(p=0.0)
        options = {"optimizer": optim.SGD(network.parameters(), 0.01), "seed": 0, "progress": False}
        history = train.fit(network, data, loss=loss, callbacks=loss.double, capture=on, epochs=4, **options)
        losses.append(history["loss"])
    assert losses[0] == losses[1]
    assert losses[0][3] > 4 * losses[0][0]
