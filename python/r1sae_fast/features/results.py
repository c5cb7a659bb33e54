"""What queries give: sequences of plain records, which become an Arrow table or a data frame."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar, overload

import pyarrow as pa

from r1sae_fast.features.query.frame import ArrowFrame
from r1sae_fast.features.text import brief

Record = TypeVar("Record", bound="TopExample | SearchHit")


@dataclass(frozen=True)
class ContextToken:
    """A token near an example. ``strength`` is 0 where the feature is not active."""

    token_idx: int
    token: int
    text: str | None
    strength: float
    segment: str | None


@dataclass(frozen=True)
class TopExample:
    """One place where a feature is strongly active, with the tokens around it."""

    feature_id: int
    rank: int
    sequence_id: int
    token_idx: int
    strength: float
    context: tuple[ContextToken, ...]

    @property
    def token(self) -> ContextToken | None:
        """The token itself; None if the database does not hold it."""
        return next((t for t in self.context if t.token_idx == self.token_idx), None)

    @property
    def text(self) -> str:
        """The context as text, the token marked «so»; unprintable characters made visible."""
        pieces = []
        for token in self.context:
            piece = f"[{token.token}]" if token.text is None else brief(token.text, 200)
            pieces.append(f"«{piece}»" if token.token_idx == self.token_idx else piece)
        return "".join(pieces)

    def to_dict(self) -> dict[str, Any]:
        """Plain values: the fields, and ``text``."""
        return {**asdict(self), "context": [asdict(t) for t in self.context], "text": self.text}


@dataclass(frozen=True)
class SearchHit:
    """A feature that a search found.

    ``matched`` says by what: ``"label"`` (one that a model wrote), ``"token"`` alone, or
    ``"meaning"`` (of the label; ``score`` is then a cosine). ``token``
    is the text of the best token found and ``token_offset`` where it is (0: the feature fires on
    it, -1: after it, 1: before it). ``label`` is the label that matched, or the feature's best.
    ``score`` orders hits: a label's is from 0 to 2 (more than 1 if it has all words), a token's
    the share of the feature's strength on it, from 0 to 1, less for neighbours and for parts of
    tokens; one that is found by both has the sum.
    """

    feature_id: int
    matched: str
    label: str | None
    model_name: str | None
    token: str | None
    token_offset: int | None
    count: int | None
    score: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values: the fields."""
        return asdict(self)


class Records(Sequence[Record], ArrowFrame):
    """An immutable sequence of records."""

    def __init__(self, records: Sequence[Record]) -> None:
        self._records = tuple(records)

    def __len__(self) -> int:
        return len(self._records)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Record, ...]: ...
    def __getitem__(self, index: int | slice) -> Record | tuple[Record, ...]:
        return self._records[index]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Records) and self._records == other._records

    def __hash__(self) -> int:
        return hash(self._records)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} records)"

    def to_arrow(self) -> pa.Table:
        """One row a record, one column a field."""
        return pa.Table.from_pylist([r.to_dict() for r in self._records], schema=self._SCHEMA)

    def _repr_html_(self) -> str:
        from r1sae_fast.features.page.tables import table_html

        return table_html(self.to_arrow())

    _SCHEMA: pa.Schema


class TopExamples(Records[TopExample]):
    """A feature's strongest examples, the strongest first."""

    _SCHEMA = pa.schema(
        [
            ("feature_id", pa.int32()),
            ("rank", pa.int32()),
            ("sequence_id", pa.int64()),
            ("token_idx", pa.int32()),
            ("strength", pa.float32()),
            ("text", pa.string()),
            (
                "context",
                pa.list_(
                    pa.struct(
                        [
                            ("token_idx", pa.int32()),
                            ("token", pa.int32()),
                            ("text", pa.string()),
                            ("strength", pa.float32()),
                            ("segment", pa.string()),
                        ]
                    )
                ),
            ),
        ]
    )


class SearchHits(Records[SearchHit]):
    """The features that a search found, the best first."""

    _SCHEMA = pa.schema(
        [
            ("feature_id", pa.int32()),
            ("matched", pa.string()),
            ("label", pa.string()),
            ("model_name", pa.string()),
            ("token", pa.string()),
            ("token_offset", pa.int32()),
            ("count", pa.int64()),
            ("score", pa.float64()),
        ]
    )
