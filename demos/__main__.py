"""List the demos, run one, or run all and write a page of their results."""

import sys
from importlib import import_module
from pathlib import Path

from .output import start

ORDER = (  # of learning
    "bn_backward", "normalize_numbers", "eval_gradient", "dead_bias", "layer_norm", "deep_mlp", "mnist_mlp",
    "mnist_cnn", "init_scale", "learning_rates", "gradient_flow", "iris_mlp", "titanic_mlp", "batch_size",
    "paper_figure1", "loss_landscape", "high_order", "new_op", "batch_renorm",
)  # fmt: skip
HIDDEN = (
    "__init__", "__main__", "bn_figures", "common", "environment", "gallery", "options", "output", "quiz",
    "settings",
)  # fmt: skip


def names() -> list[str]:
    """The names of the demos, in the order of learning; one that is not in `ORDER` comes last."""
    found = sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem not in HIDDEN)
    return sorted(found, key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER))


def main(arguments: list[str]) -> int:
    """Run the named demo with the remaining arguments; without a name, list the demos. Return the exit status."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"usage: python -m {__package__} NAME [options]\n")
        for name in names():
            print(f"  {name:18} {(import_module(f'.{name}', __package__).__doc__ or '').splitlines()[0]}")
        print(f"\n  {'all':18} run all demos, and write a page of their results")
        print(f"  {'quiz':18} {(import_module('.quiz', __package__).__doc__ or '').splitlines()[0]}")
        return 0
    name, *options = arguments
    if name == "all":
        return int(import_module(".gallery", __package__).main(names(), options))
    if name == "quiz":
        return int(import_module(".quiz", __package__).main(options))
    if name not in names():
        print(f"no demo {name!r}; the demos are {', '.join(names())}; or write all, or quiz", file=sys.stderr)
        return 2
    return int(import_module(f".{name}", __package__).main(options).code)


if __name__ == "__main__":
    start(lambda: main(sys.argv[1:]))
