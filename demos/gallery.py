"""Run every demo, and write one page, index.html, with their output, figures and claims."""

import argparse
import base64
import html
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from string import Template
from typing import Any

from rich.console import Console

from tinygrad_bn.files import replacing

from .common import remove_checkpoints
from .options import natural

# A figure is a checkbox: ticked by a click or the space bar, it is shown in full size, in a box that scrolls.
PAGE = Template("""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>tinygrad_bn: the demos</title>
<style>
:root { color-scheme: light dark; --soft: light-dark(#f6f6f6, #242424) }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem;
  color: light-dark(#222, #ddd); background: light-dark(#fff, #161616) }
h2 { margin-top: 3rem; border-top: 1px solid #8884; padding-top: 1rem }
.figure { display: inline-block; max-width: 100%; overflow-x: auto; margin: 0.5rem 0.5rem 0 0; cursor: zoom-in }
.figure img { width: min(100%, 0.5 * var(--pixels)); height: auto } .figure input { position: absolute; opacity: 0 }
.figure input:focus-visible + img { outline: 2px solid #06c } .figure input:checked + img { width: auto }
@media (max-width: 600px) { .figure img { width: max(100%, 0.4 * var(--pixels)) } }
pre { overflow-x: auto; background: var(--soft); padding: 1rem; font-size: 13px }
.fails { color: light-dark(#b00, #f88) } a { color: light-dark(#06c, #6bf) }
.figure img { background: #fff } p, li { overflow-wrap: anywhere }
code { background: var(--soft) } summary { cursor: pointer }
</style>
<h1>BatchNorm, experiment by experiment</h1>
<p>Made by <code>$command</code>. All figures and numbers come from the runs shown here. ± is half of a 95 % interval.
Click a figure to enlarge it.</p>
<ol>$contents</ol>
$sections
</html>
""")
SECTION = Template("""<h2 id="$name">$title</h2>
<p>$text</p>
<ul>$claims</ul>
$figures
<details$open><summary>output of <code>$name</code>, $seconds s</summary><pre>$printed</pre></details>
""")
PRINTED = "output.txt"
WORKERS = os.cpu_count() or 1
ONE_THREAD = {"TINYGRAD_BN_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # of each demo, as others run beside it
READ = ("bn_backward", "normalize_numbers")  # their output is what they show, so it is not folded


def prose(text: str) -> str:
    """Text as HTML, with code between backticks."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))


def figure(path: Path) -> str:
    """An embedded image, as HTML. On a narrow page a wide one scrolls, in a size in which its text can be read."""
    png = path.read_bytes()
    width = int.from_bytes(png[16:20])
    name, data = html.escape(path.stem), base64.b64encode(png).decode()
    image = f'<img style="--pixels: {width}px" alt="{name}" src="data:image/png;base64,{data}">'
    return f'<label class="figure"><input type="checkbox">{image}</label>'


def section(name: str, folder: Path, printed: str) -> str:
    """The results in the folder of one demo, as HTML; without readable results, what it printed."""
    try:
        results: dict[str, Any] = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        figures = "".join(figure(folder / path) for path in results["figures"])
    except (OSError, ValueError):
        return f'<h2 id="{name}">{name}</h2><p class="fails">failed</p><pre>{html.escape(printed)}</pre>'
    claims = "".join(
        f"<li>{prose(text)}</li>" if holds else f'<li class="fails">does not hold: {prose(text)}</li>'
        for text, holds in results["claims"].items()
    )
    return SECTION.substitute(
        name=name, title=prose(results["title"]), text=prose(results["text"]), claims=claims, figures=figures,
        open=" open" * (name in READ), seconds=results["seconds"], printed=html.escape(printed),
    )  # fmt: skip


def finished(folder: Path) -> str | None:
    """What the demo printed that has finished in this folder; None if none has."""
    try:
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        return None if results["interrupted"] else (folder / PRINTED).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None


def run_demo(name: str, args: argparse.Namespace, children: list[Any]) -> tuple[int, str, float]:
    """The status of a demo, what it printed, and its seconds: those of before, if it has finished and may be kept.

    Its process joins `children`. It is in a session of its own, so that a Ctrl-C comes to this process alone.
    """
    folder: Path = args.out / name
    folder.mkdir(parents=True, exist_ok=True)
    if args.resume and (before := finished(folder)) is not None:
        return 0, before, 0.0
    options = ["--out", str(folder), "--seed", str(args.seed)] + ["--check"] * args.check
    if args.resume and (folder / "config.toml").exists():
        options = ["--resume", str(folder)]
    else:
        remove_checkpoints(folder)
    (folder / "results.json").unlink(missing_ok=True)  # of an earlier run
    environment = {"COLUMNS": "110", "PYTHONIOENCODING": "utf-8"} | (ONE_THREAD if WORKERS > 1 else {})
    start = time.perf_counter()
    child = subprocess.Popen(
        [sys.executable, "-m", str(__package__), name, *options], start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", errors="replace",
        env=os.environ | environment,
    )  # fmt: skip
    children.append(child)
    printed, _ = child.communicate()
    with replacing(folder / PRINTED) as beside:
        beside.write_text(printed, encoding="utf-8")
    return child.returncode, printed, time.perf_counter() - start


def expect_same(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Note the options in the output folder; or exit, if `--resume` is given with others than those of before."""
    options, path = {"seed": args.seed, "check": args.check}, args.out / "all.json"
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        if args.resume and path.exists() and (before := json.loads(path.read_text(encoding="utf-8"))) != options:
            parser.error(f"{args.out} was begun with the options {before}: give the same ones, or another --out")
        with replacing(path) as beside:
            beside.write_text(json.dumps(options), encoding="utf-8")
    except OSError as error:
        parser.error(f"cannot write to {args.out}: {error.strerror}")
    except ValueError:
        parser.error(f"{path} is damaged: leave out --resume, or give another --out")


def main(names: Sequence[str], argv: Sequence[str]) -> int:
    """Run the demos, one per core. Return 0; 1 if one failed; 130 after Ctrl-C, with a page of the finished."""
    parser = argparse.ArgumentParser(prog=f"python -m {__package__} all", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/all"), help="output folder (default: %(default)s)")
    parser.add_argument("--seed", type=natural, default=0, help="first seed of every demo (default: 0)")
    parser.add_argument("--check", action="store_true", help="quick runs that fail if a claim does not hold")
    parser.add_argument("--resume", action="store_true", help="keep what is finished in the output folder, and go on")
    args = parser.parse_args(argv)
    page, command = args.out / "index.html", html.escape(" ".join([f"python -m {__package__} all", *argv]))
    console, sections, code = Console(), dict[str, str](), 0
    terminated: list[int] = []

    def terminate(number: int, _: Any) -> None:
        terminated.append(number)
        raise KeyboardInterrupt

    expect_same(parser, args)
    former = signal.signal(signal.SIGTERM, terminate)
    with ThreadPoolExecutor(WORKERS) as pool:
        children: list[Any] = []
        runs = {name: pool.submit(run_demo, name, args, children) for name in names}
        try:
            for name, run in runs.items():
                with console.status(name):
                    status, printed, seconds = run.result()
                verdict = "FAILED" if status else "ok    "
                console.print(f"{name:18} {verdict} {seconds:6.1f} s", highlight=False)
                if status:
                    code = 1
                    console.print(printed, markup=False, highlight=False)
                sections[name] = section(name, args.out / name, printed)
        except OSError as error:
            pool.shutdown(cancel_futures=True)
            parser.error(f"cannot write to {args.out}: {error.strerror}")
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)  # none begins now
            for child in children:
                child.terminate()  # it writes a checkpoint
            code = 143 if terminated else 130
            console.print(f"interrupted: {len(sections)} of {len(names)} demos are finished")
            console.print(f"to go on: python -m {__package__} all --resume --out {args.out}", soft_wrap=True)
    signal.signal(signal.SIGTERM, former)
    contents = "".join(f'<li><a href="#{name}">{name}</a></li>' for name in sections)
    try:
        with replacing(page) as beside:
            text = PAGE.substitute(command=command, contents=contents, sections="".join(sections.values()))
            beside.write_text(text, encoding="utf-8")
    except OSError as error:
        parser.error(f"cannot write {page}: {error.strerror}")
    console.print(f"wrote {page}", soft_wrap=True)
    return code
