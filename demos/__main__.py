"""List the demos, run one, or run all and write a page of their results."""

import sys
from importlib import import_module
from pathlib import Path

HIDDEN = ("__init__", "__main__", "common", "gallery")


def names() -> list[str]:
    """The names of the demos."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem not in HIDDEN)


def main(arguments: list[str]) -> int:
    """Run the named demo with the remaining arguments; without a name, list the demos. Return the exit status."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: python -m demos NAME [options]\n")
        for name in names():
            print(f"  {name:18} {(import_module(f'demos.{name}').__doc__ or '').splitlines()[0]}")
        print(f"\n  {'all':18} run all demos, and write a page of their results")
        return 0
    name, *options = arguments
    if name == "all":
        return int(import_module("demos.gallery").main(names(), options))
    if name not in names():
        print(f"no demo {name!r}; the demos are {', '.join(names())}, and all", file=sys.stderr)
        return 2
    try:
        return int(import_module(f"demos.{name}").main(options).code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
