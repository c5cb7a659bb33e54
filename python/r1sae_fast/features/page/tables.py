"""Tables of features as HTML."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from r1sae_fast.features.page.style import escaped, framed

_ROWS = 50


def table_html(table: pa.Table) -> str:
    """The table's first rows; nested columns are left out."""
    names = [n for n in table.column_names if not pa.types.is_nested(table[n].type)]
    numeric = {
        n: pa.types.is_integer(table[n].type) or pa.types.is_floating(table[n].type) for n in names
    }
    head = "".join(f'<th class="{_align(numeric[n])}">{escaped(n)}</th>' for n in names)
    rows = [
        "<tr>"
        + "".join(f'<td class="{_align(numeric[n])}">{cell(row[n], n)}</td>' for n in names)
        + "</tr>"
        for row in table.slice(0, _ROWS).select(names).to_pylist()
    ]
    left = table.num_rows - len(rows)
    more = f"<p class='r1-dim'>{left:,} more rows</p>" if left > 0 else ""
    return framed(
        f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>{more}"
    )


def cell(value: Any, name: str) -> str:
    """A value, short and harmless."""
    if value is None:
        return '<span class="r1-dim">–</span>'
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int):
        return str(value) if name.endswith("_id") else f"{value:,}"
    return escaped(str(value))


def _align(number: bool) -> str:
    return "r1-n" if number else "r1-t"
