"""`python -m tinygrad_bn kernels`: a table of all kernels and their errors against float64."""

import argparse


def main() -> None:
    """Parse the command line and print the table."""
    parser = argparse.ArgumentParser(prog="python -m tinygrad_bn", description="Information about this installation.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("kernels", help="list the kernels, and the largest error of each against float64")
    parser.parse_args()

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
