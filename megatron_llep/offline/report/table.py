"""Text tables with aligned columns."""

from collections.abc import Sequence


def format_table(rows: Sequence[Sequence[object]], align: str = "<>", *, rule: bool = False) -> str:
    """Lay out rows of cells in columns.

    Args:
        rows: cells are shown as `str` shows them; a short row ends with empty ones.
        align: `<` or `>` for each column; what the last one says goes for all that follow.
        rule: whether there is a line of dashes below the first row.
    """
    shown = [[str(cell) for cell in row] for row in rows]
    widths = [
        max(len(row[column]) for row in shown if column < len(row))
        for column in range(max(map(len, shown)))
    ]
    align += align[-1] * (len(widths) - len(align))
    lines = [
        "  ".join(
            f"{cell:{side}{width}}" for cell, side, width in zip(row, align, widths, strict=False)
        ).rstrip()
        for row in shown
    ]
    if rule:
        lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join(lines)
