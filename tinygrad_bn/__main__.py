"""`python -m tinygrad_bn`: `ops`, `kernels`, `checkpoint FILE` show what there is; `new-op NAME` starts a file."""

import argparse


def main() -> None:
    """Parse the command line and print what it asks for."""
    parser = argparse.ArgumentParser(prog="python -m tinygrad_bn", description="Information about this installation.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("kernels", help="list the kernels, and the largest error of each against float64")
    file = commands.add_parser("checkpoint", help="show what a checkpoint or a safetensors file holds")
    file.add_argument("file")
    ops = commands.add_parser("ops", help="every op: formula, gradients, kernels, errors, and what was checked")
    ops.add_argument("what", nargs="*", metavar="NAME or FILE", help="ops to show at length; files that declare ops")
    ops.add_argument("--no-check", action="store_true", help="do not run the checks, which take a minute for all ops")
    new = commands.add_parser("new-op", help="write a commented file that declares an op, and its test")
    new.add_argument("name")
    new.add_argument("--fused", action="store_true", help="a composition with kernels, in place of gradient rules")
    options = parser.parse_args()
    if options.command == "checkpoint":
        show_checkpoint(options.file)
    elif options.command == "ops":
        show_ops(options.what, not options.no_check)
    elif options.command == "new-op":
        write_new_op(options.name, options.fused)
    else:
        show_kernels()


def show_checkpoint(path: str) -> None:
    """Print a summary of the file. Exits with the reason if it cannot be read."""
    from tinygrad_bn.checkpoint import CheckpointError, read

    try:
        print(read(path))
    except CheckpointError as error:
        raise SystemExit(str(error)) from None
    except OSError as error:
        raise SystemExit(f"cannot read {path}: {error.strerror}") from None


def show_ops(what: list[str], checks: bool) -> None:
    """Print all ops, the ops of files, or those that are named at length. Exits with 1 if a check fails."""
    import os
    import sys

    from tinygrad_bn.op_table import entry
    from tinygrad_bn.tensor import OPS
    from tinygrad_bn.testing.check import no_such_op
    from tinygrad_bn.testing.files import ops_of

    try:
        of_files = [name for file in what if file.endswith(".py") for name in ops_of(file)]
    except (ValueError, OSError, SyntaxError) as error:
        raise SystemExit(str(error)) from None
    named = [name for name in what if not name.endswith(".py")]
    if unknown := [name for name in named if name not in OPS]:
        raise SystemExit(no_such_op(unknown[0]))
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # formulas, on a terminal without their letters
    failed = 0
    for i, name in enumerate([*of_files, *named] or sorted(OPS)):
        examples = (25 if what else 2) if checks else 0
        shown = entry(name, examples)
        try:
            print("\n" * (i > 0) + "\n".join(shown.lines(at_length=name in named)), flush=True)
        except BrokenPipeError:  # as of `| head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return
        failed += bool(shown.failure)
    if failed:
        raise SystemExit(1)


def write_new_op(name: str, fused: bool) -> None:
    """Write the two files, and print what to do with them."""
    from tinygrad_bn.new_op import write

    try:
        op, test = write(name, fused)
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from None
    print(f"wrote {op} and {test}; run: python -m pytest {test}, and python -m tinygrad_bn ops {op}")


def show_kernels() -> None:
    """Print the table of kernels."""

    from rich import box
    from rich.console import Console
    from rich.table import Table

    from tinygrad_bn.kernels import kernel_errors

    table = Table(box=box.SIMPLE, title="Kernels, and their largest error against float64", title_justify="left")
    for head in ("kernel", "device", "dtype", "computes", "error"):
        table.add_column(head, no_wrap=True)
    for row in kernel_errors():
        table.add_row(*row[:4], f"{row.error:.1e}" if row.error else "0")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
