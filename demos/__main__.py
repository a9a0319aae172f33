"""List the demos, run one, or run all of them and make a page of what they show."""

import sys
from importlib import import_module
from pathlib import Path

HIDDEN = ("__init__", "__main__", "common", "gallery")


def names() -> list[str]:
    """The demos there are."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem not in HIDDEN)


def main(arguments: list[str]) -> int:
    """Run the demo that is named, with the arguments that follow; without a name, list what there is."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: python -m demos NAME [options]\n")
        for name in names():
            print(f"  {name:18} {(import_module(f'demos.{name}').__doc__ or '').splitlines()[0]}")
        print(f"\n  {'all':18} every one of them, and a page of their figures")
        return 0
    name, *options = arguments
    if name == "all":
        return int(import_module("demos.gallery").main(names(), options))
    if name not in names():
        print(f"there is no demo {name!r}; there are {', '.join(names())}, and all", file=sys.stderr)
        return 2
    try:
        return int(import_module(f"demos.{name}").main(options).code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
