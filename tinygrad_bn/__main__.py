"""`python -m tinygrad_bn`: `kernels`, a table with their errors; `checkpoint FILE`, what is in a file."""

import argparse


def main() -> None:
    """Parse the command line and print what it asks for."""
    parser = argparse.ArgumentParser(prog="python -m tinygrad_bn", description="Information about this installation.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("kernels", help="list the kernels, and the largest error of each against float64")
    file = commands.add_parser("checkpoint", help="show what a checkpoint or a safetensors file holds")
    file.add_argument("file")
    options = parser.parse_args()
    if options.command == "checkpoint":
        show_checkpoint(options.file)
    else:
        show_kernels()


def show_checkpoint(path: str) -> None:
    """Print a summary of the file. Exits with the reason if it cannot be read."""
    from tinygrad_bn.checkpoint import CheckpointError, read

    try:
        print(read(path))
    except (CheckpointError, OSError) as error:
        raise SystemExit(str(error)) from None


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
