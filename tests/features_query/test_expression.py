"""Conditions mean what Python's own arithmetic gives, row by row, and nothing else runs."""

import math
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1sae_fast.features.query import Expression

NUMBERS = ("density", "count", "density_thinking")
Row = dict[str, Any]

VALUES = st.one_of(st.none(), st.sampled_from([0.0, 1.0, -2.5, 1e-3, 7.0, 1e200]))
ROWS = st.lists(
    st.fixed_dictionaries(
        {
            "density": VALUES,
            "count": st.one_of(st.none(), st.integers(-3, 9)),
            "density_thinking": VALUES,
            "label": st.one_of(st.none(), st.sampled_from(["", "Wait a bit", "WAIT", "é[x]%_"])),
            "alive": st.one_of(st.none(), st.booleans()),
        }
    ),
    min_size=1,
    max_size=6,
)


def table(rows: list[Row]) -> pa.Table:
    return pa.Table.from_pylist(
        rows,
        schema=pa.schema(
            [
                ("density", pa.float64()),
                ("count", pa.int64()),
                ("density_thinking", pa.float32()),
                ("label", pa.string()),
                ("alive", pa.bool_()),
            ]
        ),
    )


# A condition is drawn together with what it means: text, and a function of a row that gives a
# value, or None for unknown.
Meant = tuple[str, Callable[[Row], Any]]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _column(name: str) -> Meant:
    return name, lambda row: None if row[name] is None else _finite(float(row[name]))


def _binary(sign: str, a: Meant, b: Meant) -> Meant:
    def value(row: Row) -> float | None:
        x, y = a[1](row), b[1](row)
        if x is None or y is None:
            return None
        if sign == "/":
            return _finite(x / y) if y else None
        return _finite({"+": x + y, "-": x - y, "*": x * y}[sign])

    return f"({a[0]} {sign} {b[0]})", value


def _log10(a: Meant) -> Meant:
    def value(row: Row) -> float | None:
        x = a[1](row)
        return math.log10(x) if x is not None and x > 0 else None

    return f"log10({a[0]})", value


def _largest(a: Meant, b: Meant) -> Meant:
    def value(row: Row) -> float | None:
        x, y = a[1](row), b[1](row)
        return None if x is None or y is None else max(x, y)

    return f"max({a[0]}, {b[0]})", value


def _negative(a: Meant) -> Meant:
    return f"-{a[0]}", lambda row: None if a[1](row) is None else -a[1](row)


LEAVES = st.one_of(
    st.sampled_from([_column(name) for name in NUMBERS]),
    st.just(("thinking_density", _column("density_thinking")[1])),
    st.sampled_from([("0", lambda row: 0.0), ("1e-3", lambda row: 1e-3), ("7", lambda row: 7.0)]),
)
ARITHMETIC: st.SearchStrategy[Meant] = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.builds(_binary, st.sampled_from("+-*/"), inner, inner),
        st.builds(_log10, inner),
        st.builds(_largest, inner, inner),
        st.builds(_negative, inner),
    ),
    max_leaves=5,
)


def _compared(sign: str, a: Meant, b: Meant) -> Meant:
    def value(row: Row) -> bool | None:
        x, y = a[1](row), b[1](row)
        if x is None or y is None:
            return None
        return bool({"<": x < y, "<=": x <= y, ">": x > y, ">=": x >= y, "==": x == y}[sign])

    return f"{a[0]} {sign} {b[0]}", value


def _contains(part: str) -> Meant:
    def value(row: Row) -> bool | None:
        return None if row["label"] is None else part.lower() in row["label"].lower()

    return f"{part!r} in label", value


def _not(a: Meant) -> Meant:
    return f"(not {a[0]})", lambda row: None if a[1](row) is None else not a[1](row)


def _and(a: Meant, b: Meant) -> Meant:
    def value(row: Row) -> bool | None:
        both = a[1](row), b[1](row)
        return False if False in both else None if None in both else True

    return f"({a[0]} and {b[0]})", value


def _or(a: Meant, b: Meant) -> Meant:
    def value(row: Row) -> bool | None:
        both = a[1](row), b[1](row)
        return True if True in both else None if None in both else False

    return f"({a[0]} or {b[0]})", value


CONDITIONS: st.SearchStrategy[Meant] = st.recursive(
    st.one_of(
        st.builds(_compared, st.sampled_from(["<", "<=", ">", ">=", "=="]), ARITHMETIC, ARITHMETIC),
        st.sampled_from(["wait", "[x]%_", "É", ""]).map(_contains),
        st.just(("alive", lambda row: row["alive"])),
        st.just(("known(count)", lambda row: row["count"] is not None)),
    ),
    lambda inner: st.one_of(
        st.builds(_not, inner), st.builds(_and, inner, inner), st.builds(_or, inner, inner)
    ),
    max_leaves=6,
)


@given(ROWS, CONDITIONS)
def test_a_condition_means_what_python_means(rows: list[Row], condition: Meant) -> None:
    text, value = condition
    # density_thinking is stored in 32 bits; both sides see what is stored.
    stored = table(rows)
    expected = [value(row) is True for row in stored.to_pylist()]
    assert Expression(text).mask(stored).tolist() == expected, text


ROW: list[Row] = [
    {"density": 1e-4, "count": 3, "density_thinking": 0.5, "label": "Wait", "alive": True},
    {"density": 0.2, "count": 4, "density_thinking": None, "label": None, "alive": None},
]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("1e-5 < density < 1e-3", [True, False]),
        ("count in (1, 3)", [True, False]),
        ("count not in (1, 3)", [False, True]),
        ("label == 'Wait'", [True, False]),
        ("label != 'Wait'", [False, False]),
        ("'wait' not in label", [False, False]),
        ("not known(label)", [False, True]),
        ("2 ** count == 8", [True, False]),
        ("count / 0 > 0 or not (count / 0 > 0)", [False, False]),
        (" density<1 # a remark", [True, True]),
        ("min(density, 0.1) == 0.1", [False, True]),
        ("True", [True, True]),
        ("'\\d' in label", [False, False]),
    ],
)
def test_examples(text: str, found: list[bool]) -> None:
    assert Expression(text).mask(table(ROW)).tolist() == found


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "can't be read"),
        ("density = 1", "to compare, write =="),
        ("density <= 1 = 2", "to compare, write =="),
        ("density", "is a number, expected a condition"),
        ("dens < 1", "no column 'dens'; did you mean density?"),
        ("label < 'b'", "compare text by ==, != or in"),
        ("label > 3", "label is text, 3 is a number"),
        ("density + label > 1", "label is text; expected a number"),
        ("density and alive", "density is a number; expected a condition"),
        ("label in 'Wait'", "expected text in quotes"),
        ("'a' in density", "density is a number; expected text"),
        ("log(1, 2) > 1", "is not called so"),
        ("max(1) > 1", "is not called so"),
        ("max(*(1, 2)) > 1", "is not called so"),
        ("abs(x=1) > 1", "is not called so"),
        ("1e999 > density", "too large a number"),
        ("1j > density", "neither a number nor text"),
        ("density is None", "compared by `is`"),
        ("x" * 5000, "5,000 characters"),
        ("(" * 3000, "can't be read"),
        ("-" * 3000 + "1 > 0", "(can't be read|nested too deep)"),
        ("\0", "can't be read"),
        ("__import__('os').system('true') > 0", "no function here"),
        ("eval('1') > 0", "no function here"),
        ("density.real > 0", "not part of the language"),
        ("density[0] > 0", "not part of the language"),
        ("(lambda: 1) > 0", "not part of the language"),
        ("[x for x in (1,)] > 0", "not part of the language"),
        ("(density := 1) > 0", "not part of the language"),
        ("f'{density}' == label", "not part of the language"),
        ("density % 2 > 0", "not part of the language"),
        ("density if alive else 1", "not part of the language"),
    ],
)
def test_anything_else_is_refused(text: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        Expression(text).mask(table(ROW))


@given(st.text(max_size=40))
def test_no_text_does_anything_but_answer_or_be_refused(text: str) -> None:
    try:
        found = Expression(text).mask(table(ROW))
    except ValueError:
        return
    assert found.shape == (2,)
