"""Run every demo, and write one page, index.html, with their output, figures and claims."""

import argparse
import base64
import html
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Any

from rich.console import Console

from tinygrad_bn.files import replacing

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


def main(names: Sequence[str], argv: Sequence[str]) -> int:
    """Run the demos one after the other. Return 0; 1 if one failed; 130 after Ctrl-C, with a page of the finished."""
    parser = argparse.ArgumentParser(prog=f"python -m {__package__} all", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/all"), help="output folder (default: %(default)s)")
    parser.add_argument("--seed", type=natural, default=0, help="first seed of every demo (default: 0)")
    parser.add_argument("--check", action="store_true", help="quick runs that fail if a claim does not hold")
    parser.add_argument("--resume", action="store_true", help="keep what is finished in the output folder, and go on")
    args = parser.parse_args(argv)
    page, command = args.out / "index.html", html.escape(" ".join([f"python -m {__package__} all", *argv]))
    console, sections, code = Console(), dict[str, str](), 0
    environment = os.environ | {"COLUMNS": "110", "PYTHONIOENCODING": "utf-8"}
    try:
        for name in names:
            folder = args.out / name
            folder.mkdir(parents=True, exist_ok=True)
            if args.resume and (printed := finished(folder)) is not None:
                sections[name] = section(name, folder, printed)
                continue
            options = ["--out", str(folder), "--seed", str(args.seed)] + ["--check"] * args.check
            if args.resume and (folder / "config.toml").exists():
                options = ["--resume", str(folder)]
            (folder / "results.json").unlink(missing_ok=True)  # of an earlier run
            start = time.perf_counter()
            with console.status(name):
                done = subprocess.run(
                    [sys.executable, "-m", str(__package__), name, *options],
                    capture_output=True, encoding="utf-8", errors="replace", env=environment,
                )  # fmt: skip
            verdict = "FAILED" if done.returncode else "ok    "
            console.print(f"{name:18} {verdict} {time.perf_counter() - start:6.1f} s", highlight=False)
            printed = done.stdout + done.stderr
            if done.returncode:
                code = 1
                console.print(printed, markup=False, highlight=False)
            with replacing(folder / PRINTED) as beside:
                beside.write_text(printed, encoding="utf-8")
            sections[name] = section(name, folder, printed)
    except OSError as error:
        parser.error(f"cannot write to {args.out}: {error.strerror}")
    except KeyboardInterrupt:
        code = 130
        console.print(f"interrupted: {len(sections)} of {len(names)} demos are finished")
    contents = "".join(f'<li><a href="#{name}">{name}</a></li>' for name in sections)
    try:
        with replacing(page) as beside:
            text = PAGE.substitute(command=command, contents=contents, sections="".join(sections.values()))
            beside.write_text(text, encoding="utf-8")
    except OSError as error:
        parser.error(f"cannot write {page}: {error.strerror}")
    console.print(f"wrote {page}", soft_wrap=True)
    return code
