"""Builds tables for a console."""

from rich.table import Table


def plain_table(first: str, *others: str) -> Table:
    """Builds a table without lines; columns after the first are numbers."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column(first)
    for other in others:
        table.add_column(other, justify="right")
    return table
