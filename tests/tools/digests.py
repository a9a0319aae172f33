"""Train the networks of the articles, and print the SHA-256 of all that results, a line each.

    python -m tests.tools.digests {captured|plain} {alone|beside}

"beside" another Python thread, which trains a network of its own meanwhile.
"""

import hashlib
import sys
import threading
from dataclasses import replace
from itertools import count, takewhile

from tests.tools.networks import NETWORKS, Training, samples_of
from tinygrad_bn import optim, train


def digest(name: str, captured: bool = True) -> str:
    """The hash of parameters, running statistics, optimizer state and history after ten steps."""
    model = NETWORKS[name][0]()
    optimizer = optim.Adam(model.parameters(), 1e-3)
    options = {"epochs": 2, "batch_size": 9, "optimizer": optimizer, "capture": captured, "progress": False}
    history = train.fit(model, samples_of(name, 40), seed=1, **options)
    state = {name: array.tobytes() for name, array in model.state_dict().items()}
    slots = [item for slot in optimizer.state_dict()["state"].values() for item in slot.items()]
    steps = [(key, v if isinstance(v, int) else v.tobytes()) for key, v in slots]
    epochs = [replace(epoch, seconds=0) for epoch in history.epochs]
    return hashlib.sha256(repr((state, steps, epochs)).encode()).hexdigest()


def main(captured: bool, beside: bool) -> None:
    """Print the digest of each network."""
    other, done = Training("titanic_mlp", captured=False), threading.Event()
    thread = threading.Thread(target=lambda: [other.step(n) for n in takewhile(lambda _: not done.is_set(), count())])
    if beside:
        thread.start()
    try:
        for name in NETWORKS:
            print(name, digest(name, captured))
    finally:
        done.set()


if __name__ == "__main__":
    main(sys.argv[1] == "captured", sys.argv[2] == "beside")
