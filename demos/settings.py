"""The settings of a run as a file of TOML: read with `--config`, and written beside the results."""

import argparse
import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .options import rate

UNWRITTEN = ("config", "resume", "out", "help")  # a repeated run has a folder of its own


def read_settings(parser: argparse.ArgumentParser, arguments: Sequence[str], demo: str) -> dict[str, Any]:
    """The options in the file that `--config` names, or of the run that `--resume` names, checked as any others.

    Exits with an error for a file that cannot be read, an unknown option, or a value that does not fit.
    """
    first = argparse.ArgumentParser(prog=parser.prog, add_help=False)
    first.add_argument("--config", type=Path)
    first.add_argument("--resume", type=Path)
    named = first.parse_known_args([text for text in arguments if text not in ("-h", "--help")])[0]
    path = named.config if named.resume is None else named.resume / "config.toml"
    if path is None:
        return {}
    if named.resume is not None:
        _expect_no_others(parser, arguments)
    try:
        given = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        what = "" if named.resume is None else f"; is {named.resume} the folder of one run, named by its time?"
        parser.error(f"cannot read {path}: {error.strerror}{what}")
    except ValueError as error:  # also of the encoding
        parser.error(f"{path} is no TOML file: {error}")
    if given.pop("demo", demo) != demo:
        parser.error(f"{path} is of another demo")
    options = {action.dest: action for action in parser._actions if action.dest not in UNWRITTEN}
    found = {}
    for key, value in given.items():
        action = options.get(key.replace("-", "_"))
        if action is None:
            parser.error(f"{path}: unknown option {key!r}; the options are {', '.join(options)}")
        try:
            found[action.dest] = _converted(action, value)
        except (ValueError, argparse.ArgumentTypeError) as error:
            parser.error(f"{path}: {key}: {error or 'got a wrong value'}")
    return found


def _expect_no_others(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> None:
    """Exit if there are other options beside `--resume` than those of the output."""
    unset = object()
    given = vars(parser.parse_args(arguments, argparse.Namespace(**{a.dest: unset for a in parser._actions})))
    others = [key for key, value in given.items() if value is not unset and key not in ("resume", "quiet", "no_plot")]
    if others:
        parser.error(f"--resume takes the options of the interrupted run: leave out --{others[0].replace('_', '-')}")


def _converted(action: argparse.Action, value: Any) -> Any:
    """A value of the file as the command line would give it. Raises ValueError or ArgumentTypeError."""
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise ValueError(f"has to be true or false; got {value!r}")
        return value
    if action.nargs is not None:
        if not (isinstance(value, list) and value):
            raise ValueError(f"has to be a list of values; got {value!r}")
        return [_one(action, item) for item in value]
    return _one(action, value)


def _one(action: argparse.Action, value: Any) -> Any:
    convert: Any = action.type or str
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"has to be one number or text; got {value!r}")
    if isinstance(value, str) != (convert in (str, Path)):
        raise ValueError(f"has to be a {'text' if convert in (str, Path) else 'number'}; got {value!r}")
    if action.choices is not None and value not in action.choices:
        raise ValueError(f"has to be one of {', '.join(action.choices)}; got {value!r}")
    if isinstance(value, float) and convert not in (float, rate):
        raise ValueError(f"has to be an integer; got {value!r}")
    return convert(value if isinstance(value, str) else repr(value))


def as_toml(options: Mapping[str, Any]) -> str:
    """The options as TOML, but for those that are None."""
    return "".join(f"{k} = {_toml(v)}\n" for k, v in options.items() if k not in UNWRITTEN and v is not None)


def _toml(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
