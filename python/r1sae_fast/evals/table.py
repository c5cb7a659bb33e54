"""Reports as a table for the terminal: a column an SAE; segments below one another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

Entry = dict[str, Any]


def _number(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}"


def _share(value: Any) -> str:
    return "-" if value is None else f"{value:.1%}"


def _count(value: Any) -> str:
    return "-" if value is None else f"{value:,}"


def _text(value: Any) -> str:
    return "-" if value is None else str(value)


_Line = tuple[str, tuple[str, ...], Callable[[Any], str]]

_DECODER: list[_Line] = [
    ("nearest other direction, median", ("quantiles", "0.5"), _number),
    ("directions with one above 0.9", ("alike_fraction",), _share),
]
_ROWS: list[_Line] = [
    ("rows", ("rows",), _count),
    ("FVU", ("fvu",), _number),
    ("explained variance", ("explained_variance",), _number),
    ("cosine", ("cosine",), _number),
    ("norm ratio", ("norm_ratio",), _number),
    ("L0", ("l0",), _number),
    ("L0, 5% of rows below", ("l0_quantiles", "0.05"), _count),
    ("L0, 95% of rows below", ("l0_quantiles", "0.95"), _count),
    ("dead features", ("dead_fraction",), _share),
    ("dense features", ("dense_fraction",), _share),
]
_RECONSTRUCTION: list[_Line] = [
    ("codes chosen by", ("mode",), _text),
    *_ROWS,
    ("outliers left out", ("outliers",), _count),
    ("rows with NaN or infinities", ("non_finite",), _count),
]
_SEGMENT: list[_Line] = [
    line for line in _ROWS if line[1][0] in ("rows", "fvu", "cosine", "l0", "dead_fraction")
]
_LOSSES: list[_Line] = [
    ("tokens predicted", ("tokens",), _count),
    ("cross-entropy, undisturbed", ("ce_clean",), _number),
    ("... with the SAE", ("ce_sae",), _number),
    ("... with zeros", ("ce_zero",), _number),
    ("... with the mean", ("ce_mean",), _number),
    ("CE recovered, of zeros", ("ce_recovered_zero",), _number),
    ("CE recovered, of the mean", ("ce_recovered_mean",), _number),
    ("KL with the SAE", ("kl_sae",), _number),
]
_IN_MODEL: list[_Line] = [
    ("codes chosen by", ("mode",), _text),
    ("L0", ("l0",), _number),
    ("FVU", ("fvu",), _number),
    *_LOSSES,
]
_LOSSES_SEGMENT: list[_Line] = [
    line
    for line in _LOSSES
    if line[1][0] in ("tokens", "ce_clean", "ce_sae", "ce_recovered_zero", "kl_sae")
]
_ANSWERS: list[_Line] = [
    ("problems", ("problems",), _count),
    ("right answers, undisturbed", ("accuracy_clean",), _share),
    ("right answers with the SAE", ("accuracy",), _share),
    ("same text as undisturbed", ("same_text",), _share),
]


def make_table(entries: Sequence[Entry]) -> Table:
    """Of a report's entries; parts and segments that none of them has are left out."""
    from rich.table import Table
    from rich.text import Text

    from r1sae_fast.features.text import visible

    table = Table(show_lines=False)
    table.add_column("", no_wrap=True)
    for one in entries:
        table.add_column(Text(visible(one["name"])), justify="right", overflow="fold")
    sizes = [f"{one['d_sae']:,} features" for one in entries]
    table.add_row("", *sizes)
    for title, part, lines, of_segment in (
        ("Decoder", "decoder", _DECODER, None),
        ("On activations", "reconstruction", _RECONSTRUCTION, _SEGMENT),
        ("In the model (nats a token)", "in_model", _IN_MODEL, _LOSSES_SEGMENT),
        ("In its answers", "answers", _ANSWERS, None),
    ):
        found = [one.get(part) for one in entries]
        if not any(found):
            continue
        table.add_section()
        table.add_row(Text(title, style="bold"))
        _add_lines(table, found, lines, "")
        if of_segment is not None:
            _add_segments(table, found, of_segment)
    return table


def _add_segments(table: Table, found: Sequence[Entry | None], lines: Sequence[_Line]) -> None:
    names: dict[str, None] = {}
    for part in found:
        names.update(dict.fromkeys((part or {}).get("segments") or {}))
    # Where all rows are of one segment, it has been told already.
    for name in names if len(names) > 1 else ():
        of_segment = [((part or {}).get("segments") or {}).get(name) for part in found]
        _add_lines(table, of_segment, lines, f"{name}: ")


def _add_lines(
    table: Table, found: Sequence[Entry | None], lines: Sequence[_Line], prefix: str
) -> None:
    for what, keys, shown in lines:
        table.add_row(prefix + what, *(shown(_get(part, keys)) for part in found))


def _get(part: Any, keys: Sequence[str]) -> Any:
    for key in keys:
        part = part.get(key) if isinstance(part, dict) else None
    return part
