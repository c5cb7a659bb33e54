"""A small language for conditions on features' statistics, such as

    density < 1e-3 and thinking_density > 5 * prompt_density
    1 < mean < 3 and "wait" in label

It is Python's syntax, read by Python's own parser and computed column by column with numpy; of its
nodes only those below are known, so nothing is executed that is not arithmetic. What is unknown
(NULL, NaN, a division by zero, the logarithm of 0) makes a comparison neither true nor false, as
in SQL, and a feature is found only where the whole is true.
"""

from __future__ import annotations

import ast
import math
import operator
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]

MAX_LENGTH = 4000  # characters: no condition that a person writes is longer

FUNCTIONS: Mapping[str, str] = {
    "abs": "abs(x)",
    "sqrt": "sqrt(x)",
    "log": "log(x) (natural)",
    "log2": "log2(x)",
    "log10": "log10(x)",
    "min": "min(x, y, ...)",
    "max": "max(x, y, ...)",
    "known": "known(column): whether it has a value",
}
"""What may be called, with how."""

_ARITHMETIC: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}
_COMPARISONS: Mapping[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}
_ONE: Mapping[str, Callable[[Any], Any]] = {
    "abs": np.abs,
    "sqrt": np.sqrt,
    "log": np.log,
    "log2": np.log2,
    "log10": np.log10,
}
_SEVERAL: Mapping[str, Callable[[Any, Any], Any]] = {"min": np.minimum, "max": np.maximum}


@dataclass(frozen=True)
class _Numbers:
    """NaN where unknown."""

    values: Floats


@dataclass(frozen=True)
class _Text:
    values: pa.ChunkedArray


@dataclass(frozen=True)
class _Truth:
    """Three values: true, false, and neither where unknown."""

    true: Flags
    false: Flags


_Value = _Numbers | _Text | _Truth
_KINDS: Mapping[type, str] = {_Numbers: "a number", _Text: "text", _Truth: "a condition"}


class Expression:
    """A condition, parsed.

    Args:
        text: the condition.

    Raises:
        ValueError: a mistake in it; says where.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        if len(text) > MAX_LENGTH:
            raise ValueError(
                f"the condition has {len(text):,} characters; expected at most {MAX_LENGTH:,}"
            )
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a backslash in a text
                self._tree = ast.parse(text.strip(), mode="eval").body
        except SyntaxError as error:
            advice = "; to compare, write ==" if _assigns(text) else ""
            where = f" at character {error.offset}" if error.offset else ""
            raise ValueError(
                f"the condition {text[:80]!r} can't be read ({error.msg}{where}){advice}; expected "
                "one like: density < 1e-3 and thinking_density > 5 * prompt_density"
            ) from None
        except (RecursionError, MemoryError, ValueError, OverflowError):
            # Nested beyond what Python's parser takes; NUL bytes; numbers of thousands of digits.
            raise ValueError(
                f"the condition {text[:80]!r} can't be read; write it simpler"
            ) from None

    def __repr__(self) -> str:
        return f"Expression({self.text!r})"

    @property
    def names(self) -> frozenset[str]:
        """The columns it speaks of, as they stand there."""
        called = {id(n.func) for n in ast.walk(self._tree) if isinstance(n, ast.Call)}
        return frozenset(
            node.id
            for node in ast.walk(self._tree)
            if isinstance(node, ast.Name) and id(node) not in called
        )

    def mask(self, table: pa.Table) -> Flags:
        """Where the condition is true ``[rows]``.

        Args:
            table: columns of numbers, booleans and text; others can't be named.

        Raises:
            ValueError: an unknown name or function, a comparison of text with a number, or
                anything that is no part of the language; says which.
        """
        with np.errstate(all="ignore"):
            try:
                found = _Evaluation(table, self.text).value(self._tree)
            except RecursionError:
                raise ValueError(
                    f"the condition {self.text[:80]!r} is nested too deep; write it simpler"
                ) from None
        if not isinstance(found, _Truth):
            raise ValueError(
                f"{self.text!r} is {_KINDS[type(found)]}, expected a condition that is true or "
                "false, such as: density < 1e-3"
            )
        return found.true


def column_name(name: str, columns: list[str]) -> str | None:
    """The column that ``name`` means: itself, or ``thinking_density`` for ``density_thinking``."""
    if name in columns:
        return name
    first, _, second = name.rpartition("_")
    turned = f"{second}_{first}"
    return turned if first and turned in columns else None


def no_such_column(name: str, columns: list[str]) -> ValueError:
    """The error, which names the nearest and all others."""
    near = get_close_matches(name, columns, 1)
    meant = f"; did you mean {near[0]}?" if near else "."
    return ValueError(f"no column {name!r}{meant} There are: {', '.join(sorted(columns))}")


class _Evaluation:
    def __init__(self, table: pa.Table, text: str) -> None:
        self._table = table
        self._text = text

    def value(self, node: ast.expr) -> _Value:
        match node:
            case ast.BoolOp():
                return self._joined(node)
            case ast.UnaryOp(op=ast.Not()):
                truth = self._truth(node.operand)
                return _Truth(truth.false, truth.true)
            case ast.UnaryOp(op=ast.USub()):
                return self._finite(-self._numbers(node.operand))
            case ast.UnaryOp(op=ast.UAdd()):
                return self._finite(self._numbers(node.operand))
            case ast.BinOp() if type(node.op) in _ARITHMETIC:
                operation = _ARITHMETIC[type(node.op)]
                return self._finite(operation(self._numbers(node.left), self._numbers(node.right)))
            case ast.Compare():
                return self._compared(node)
            case ast.Call():
                return self._called(node)
            case ast.Name():
                return self._column(node)
            case ast.Constant():
                return self._constant(node)
        raise self._wrong(node, "is not part of the language of conditions")

    # -- leaves ---------------------------------------------------------------------------------

    def _column(self, node: ast.Name) -> _Value:
        columns = [f.name for f in self._table.schema if _kind(f.type) is not None]
        name = column_name(node.id, columns)
        if name is None:
            raise no_such_column(node.id, columns)
        column = self._table.column(name)
        kind = _kind(column.type)
        if kind == "text":
            return _Text(column.cast(pa.string()))
        if kind == "truth":
            values = column.to_numpy(zero_copy_only=False)
            true, false = values == np.True_, values == np.False_
            return _Truth(true.astype(np.bool_), false.astype(np.bool_))
        return self._finite(column.cast(pa.float64()).to_numpy())

    def _constant(self, node: ast.Constant) -> _Value:
        rows = self._table.num_rows
        match node.value:
            case bool():
                true = np.full(rows, node.value)
                return _Truth(true, ~true)
            case int() | float():
                try:
                    number = float(node.value)
                except OverflowError:
                    number = math.inf
                if not math.isfinite(number):
                    raise self._wrong(node, "is too large a number")
                return _Numbers(np.full(rows, number))
            case str():
                return _Text(pa.chunked_array([pa.array([node.value] * rows, pa.string())]))
        raise self._wrong(node, "is neither a number nor text")

    # -- operations -----------------------------------------------------------------------------

    def _joined(self, node: ast.BoolOp) -> _Truth:
        parts = [self._truth(part) for part in node.values]
        true, false = parts[0].true, parts[0].false
        for part in parts[1:]:
            if isinstance(node.op, ast.And):
                true, false = true & part.true, false | part.false
            else:
                true, false = true | part.true, false & part.false
        return _Truth(true, false)

    def _compared(self, node: ast.Compare) -> _Truth:
        result: _Truth | None = None
        left = node.left
        for operation, right in zip(node.ops, node.comparators, strict=True):
            part = self._pair(operation, left, right)
            result = (
                part
                if result is None
                else _Truth(result.true & part.true, result.false | part.false)
            )
            left = right
        assert result is not None  # the parser gives at least one
        return result

    def _pair(self, operation: ast.cmpop, left: ast.expr, right: ast.expr) -> _Truth:
        if isinstance(operation, (ast.In, ast.NotIn)):
            found = self._within(left, right)
            return found if isinstance(operation, ast.In) else _Truth(found.false, found.true)
        compare = _COMPARISONS.get(type(operation))
        if compare is None:
            raise self._wrong(left, "is compared by `is`; write ==, or known(column)")
        a, b = self.value(left), self.value(right)
        if type(a) is not type(b) or isinstance(a, _Truth):
            raise ValueError(
                f"{self._source(left)} is {_KINDS[type(a)]}, {self._source(right)} is "
                f"{_KINDS[type(b)]}; compare numbers with numbers and text with text"
            )
        if isinstance(a, _Numbers) and isinstance(b, _Numbers):
            known = ~(np.isnan(a.values) | np.isnan(b.values))
            true = compare(a.values, b.values) & known
            return _Truth(true, known & ~true)
        assert isinstance(a, _Text)
        assert isinstance(b, _Text)
        if not isinstance(operation, (ast.Eq, ast.NotEq)):
            raise ValueError(f"{self._source(left)} is text; compare text by ==, != or in")
        names = {ast.Eq: pc.equal, ast.NotEq: pc.not_equal}
        return _three_valued(names[type(operation)](a.values, b.values))

    def _within(self, left: ast.expr, right: ast.expr) -> _Truth:
        if isinstance(right, (ast.Tuple, ast.List, ast.Set)):  # feature_id in (1, 2, 3)
            parts = [self._pair(ast.Eq(), left, element) for element in right.elts]
            rows = self._table.num_rows
            true, false = np.zeros(rows, np.bool_), np.ones(rows, np.bool_)
            for part in parts:
                true, false = true | part.true, false & part.false
            return _Truth(true, false)
        text = self.value(right)
        if not isinstance(text, _Text):
            raise ValueError(
                f"{self._source(right)} is {_KINDS[type(text)]}; expected text "
                '("wait" in label) or a list of values (feature_id in (1, 2))'
            )
        if not (isinstance(left, ast.Constant) and isinstance(left.value, str)):
            raise self._wrong(left, 'stands before `in`; expected text in quotes ("wait" in label)')
        return _three_valued(pc.match_substring(text.values, left.value, ignore_case=True))

    def _called(self, node: ast.Call) -> _Value:
        if not isinstance(node.func, ast.Name) or node.func.id not in FUNCTIONS:
            raise self._wrong(
                node.func, f"is no function here; there are {', '.join(FUNCTIONS.values())}"
            )
        name = node.func.id
        if node.keywords or any(isinstance(argument, ast.Starred) for argument in node.args):
            raise self._wrong(node, f"is not called so; expected {FUNCTIONS[name]}")
        several = name in _SEVERAL
        if len(node.args) < 1 + several or (not several and len(node.args) > 1):
            raise self._wrong(node, f"is not called so; expected {FUNCTIONS[name]}")
        if name == "known":
            known = self._known(self.value(node.args[0]))
            return _Truth(known, ~known)
        numbers = [self._numbers(argument) for argument in node.args]
        if not several:
            return self._finite(_ONE[name](numbers[0]))
        result = numbers[0]
        for further in numbers[1:]:
            result = _SEVERAL[name](result, further)
        return self._finite(result)

    @staticmethod
    def _known(value: _Value) -> Flags:
        if isinstance(value, _Numbers):
            known: Flags = ~np.isnan(value.values)
            return known
        if isinstance(value, _Truth):
            return value.true | value.false
        flags: Flags = value.values.is_valid().to_numpy()
        return flags

    # -- kinds ----------------------------------------------------------------------------------

    def _numbers(self, node: ast.expr) -> Floats:
        value = self.value(node)
        if not isinstance(value, _Numbers):
            raise ValueError(f"{self._source(node)} is {_KINDS[type(value)]}; expected a number")
        return value.values

    def _truth(self, node: ast.expr) -> _Truth:
        value = self.value(node)
        if not isinstance(value, _Truth):
            raise ValueError(
                f"{self._source(node)} is {_KINDS[type(value)]}; expected a condition, such as "
                f"{self._source(node)} > 0"
            )
        return value

    @staticmethod
    def _finite(values: Floats) -> _Numbers:
        return _Numbers(np.where(np.isfinite(values), values, np.nan))

    def _source(self, node: ast.expr) -> str:
        return ast.get_source_segment(self._text.strip(), node) or ast.unparse(node)

    def _wrong(self, node: ast.expr, why: str) -> ValueError:
        return ValueError(f"in the condition, {self._source(node)[:80]!r} {why}")


def _kind(kind: pa.DataType) -> Literal["number", "text", "truth"] | None:
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        return "number"
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return "text"
    return "truth" if pa.types.is_boolean(kind) else None


def _three_valued(found: pa.ChunkedArray) -> _Truth:
    true = found.fill_null(False).to_numpy()
    false = pc.invert(found).fill_null(False).to_numpy()
    return _Truth(true, false)


def _assigns(text: str) -> bool:
    """Whether a single = stands in it."""
    bare = text
    for sign in ("==", "<=", ">=", "!="):
        bare = bare.replace(sign, "")
    return "=" in bare
