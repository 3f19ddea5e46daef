"""Tables: as aligned text for a terminal, and as markdown. The first row is the head."""

from collections.abc import Container, Sequence


def align(cells: Sequence[Sequence[str]], right: Container[int] = ()) -> str:
    """Columns as wide as their widest cell, two blanks apart.

    Args:
        right: the columns, from 0, that are set to the right, such as numbers.
    """
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if place in right else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    )


def markdown(cells: Sequence[Sequence[str]]) -> str:
    """The same cells as a table of GitHub's markdown."""
    head, *rows = ("|" + "|".join(f" {cell} " if cell else " " for cell in row) + "|" for row in cells)
    return "\n".join([head, "|---" * len(cells[0]) + "|", *rows])
