"""Run every demo, and write one page, index.html, with their output, figures and claims."""

import argparse
import base64
import html
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Any

from rich.console import Console

from demos.options import natural

PAGE = Template("""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>tinygrad_bn: the demos</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
h2 { margin-top: 3rem; border-top: 1px solid #ccc; padding-top: 1rem }
img { max-width: 100%; height: auto } pre { overflow-x: auto; background: #f6f6f6; padding: 1rem; font-size: 13px }
.fails { color: #b00 } code { background: #f6f6f6 } summary { cursor: pointer }
</style>
<h1>BatchNorm, experiment by experiment</h1>
<p>Made by <code>$command</code>. All figures and numbers come from the runs shown here.</p>
<ul>$contents</ul>
$sections
</html>
""")
SECTION = Template("""<h2 id="$name">$title</h2>
<p>$text</p>
<ul>$claims</ul>
$figures
<details><summary>output of <code>python -m demos $name</code>, $seconds s</summary><pre>$printed</pre></details>
""")


def figure(path: Path) -> str:
    """An embedded image, as HTML."""
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<p><img alt="{html.escape(path.stem)}" src="data:image/png;base64,{data}"></p>'


def section(folder: Path) -> str:
    """The results in the folder of one demo, as HTML."""
    results: dict[str, Any] = json.loads((folder / "results.json").read_text())
    claims = "".join(
        f"<li>{html.escape(text)}</li>" if holds else f'<li class="fails">does not hold: {html.escape(text)}</li>'
        for text, holds in results["claims"].items()
    )
    return SECTION.substitute(
        name=results["demo"],
        title=html.escape(results["title"]),
        text=html.escape(results["text"]),
        claims=claims,
        figures="".join(figure(folder / name) for name in results["figures"]),
        seconds=results["seconds"],
        printed=html.escape((folder / "output.txt").read_text()),
    )


def failure(folder: Path) -> str:
    """The output of a demo without results, as HTML."""
    printed = html.escape((folder / "output.txt").read_text())
    return f'<h2 id="{folder.name}">{folder.name}</h2><p class="fails">failed</p><pre>{printed}</pre>'


def main(names: Sequence[str], argv: Sequence[str]) -> int:
    """Run the demos one after the other; return 1 if one failed, else 0."""
    parser = argparse.ArgumentParser(prog="python -m demos all", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/all"), help="output folder (default: %(default)s)")
    parser.add_argument("--seed", type=natural, default=0, help="seed of every demo (default: 0)")
    parser.add_argument("--check", action="store_true", help="quick runs that fail if a claim does not hold")
    args = parser.parse_args(argv)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"cannot write to {args.out}: {error.strerror}")
    console = Console()
    failed, sections = [], []
    for name in names:
        folder = args.out / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "results.json").unlink(missing_ok=True)  # of an earlier run
        command = [sys.executable, "-m", "demos", name, "--out", str(folder), "--seed", str(args.seed)]
        start = time.perf_counter()
        with console.status(name):
            process = subprocess.run(
                command + ["--check"] * args.check, capture_output=True, text=True, env=os.environ | {"COLUMNS": "110"}
            )
        (folder / "output.txt").write_text(process.stdout + process.stderr)
        console.print(
            f"{name:18} {'ok    ' if process.returncode == 0 else 'FAILED'} {time.perf_counter() - start:6.1f} s"
        )
        if process.returncode:
            failed.append(name)
            console.print(process.stdout + process.stderr, markup=False, highlight=False)
        sections.append(section(folder) if (folder / "results.json").exists() else failure(folder))
    page = args.out / "index.html"
    page.write_text(
        PAGE.substitute(
            command=html.escape(" ".join(["python -m demos all", *argv])),
            contents="".join(f'<li><a href="#{name}">{name}</a></li>' for name in names),
            sections="".join(sections),
        )
    )
    console.print(f"wrote {page}", soft_wrap=True)
    return int(bool(failed))
