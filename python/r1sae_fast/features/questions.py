"""What can be asked of a feature database beyond one feature: search, statistics, pictures."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import duckdb
import pyarrow as pa

from r1sae_fast.errors import DatabaseError
from r1sae_fast.features.labelled import Who
from r1sae_fast.features.query.columns import find, statistics_query
from r1sae_fast.features.query.frame import Frame
from r1sae_fast.features.results import SearchHits
from r1sae_fast.features.search import search
from r1sae_fast.features.view import FeatureView, gather

if TYPE_CHECKING:
    from r1sae_fast.features.results import TopExamples
    from r1sae_fast.features.summary import FeatureSummary, Labeller

StrPath = str | os.PathLike[str]


class Questions(ABC):
    """The questions; :class:`FeatureDB` gives the answers' source."""

    path: Path
    _columns: dict[str, set[str]]

    @abstractmethod
    def _fetch(self, query: str, parameters: Sequence[object] = ()) -> list[tuple[Any, ...]]: ...

    @abstractmethod
    def _fetch_arrow(self, query: str) -> pa.Table: ...

    @contextmanager
    @abstractmethod
    def _cursor(self) -> Iterator[duckdb.DuckDBPyConnection]: ...

    @abstractmethod
    def feature(self, feature: int) -> FeatureSummary: ...

    @abstractmethod
    def top(
        self, feature: int, n: int = 10, window: int = 5, *, per_sequence: int | None = None
    ) -> TopExamples: ...

    @cached_property
    @abstractmethod
    def histogram_edges(self) -> tuple[float, ...] | None: ...

    @property
    @abstractmethod
    def labeller(self) -> Labeller | None: ...

    @property
    def searched(self) -> tuple[str, ...]:
        """What :meth:`search` looks at in this file: ``labels``, ``tokens``, both or neither."""
        places = {"autointerp": "labels", "token_lift": "tokens"}
        return tuple(name for table, name in places.items() if table in self._columns)

    def search(self, text: str, n: int = 20) -> SearchHits:
        """Features whose label holds words of ``text``, or that fire on (or beside) such tokens.

        Case does not matter; words may be parts of words. Labels that a model wrote are ranked by
        BM25, those with all words first; tokens, of the table ``token_lift`` (the ten that tell
        most about each feature), by the share of the feature's strength. A file without that
        table is searched by label alone.

        Raises:
            ValueError: empty text.
            DatabaseError: the file has neither labels nor token_lift.
        """
        if not text:
            raise ValueError("the text to search for is empty; expected a word or a part of one")
        if not self.searched:
            raise DatabaseError(
                f"{self.path}: nothing to search: it has neither labels (table autointerp) nor "
                "token_lift. Released databases keep their labels in a file of their own "
                "(autointerp.db), which FeatureDB.open joins where it lies beside the database"
            )
        return SearchHits(search(self._fetch, self._columns, text, self._who)[: max(n, 0)])

    def find(
        self,
        where: str | None = None,
        *,
        sort: str | Sequence[str] = "feature_id",
        n: int | None = 20,
        columns: Sequence[str] | None = None,
    ) -> Frame:
        """Features by their statistics.

        Args:
            where: a condition on the columns of :attr:`statistics`, such as
                ``"density < 1e-3 and thinking_density > 5 * prompt_density"`` or
                ``"'wait' in label and clarity > 0.5"``. Python's comparisons and arithmetic,
                ``and``, ``or``, ``not``, ``in``, and abs, sqrt, log, log2, log10, min, max,
                known. A comparison with what is unknown is not true.
            sort: columns; ``"-density"``: the largest first. What is unknown comes last, ties in
                the order of feature_id.
            n: at most so many; None: all.
            columns: which to give; default: the usual ones, and those of ``where`` and ``sort``.

        Returns:
            A frame, with ``to_arrow()``, ``to_pandas()``, ``to_polars()`` and ``write(path)``.

        Raises:
            ValueError: a mistake in the condition, or no such column (the message lists them).
        """
        return find(self.statistics, where, sort, n, columns)

    @property
    def statistics(self) -> pa.Table:
        """All features with all that they can be chosen by, sorted by id.

        Labels are those of :attr:`labeller`. Of a released file, which holds no statistics, they
        are counted at the first call: that reads its whole table of activations.
        """
        if self._who not in self._counted:
            self._counted[self._who] = self._fetch_arrow(statistics_query(self._columns, self._who))
        return self._counted[self._who]

    @cached_property
    def _counted(self) -> dict[Who | None, pa.Table]:
        return {}

    @property
    def _who(self) -> Who | None:
        who = self.labeller
        return None if who is None else (who.model_name, who.prompt_version)

    def show(
        self, feature: int, n: int = 5, window: int = 10, *, per_interval: int = 2
    ) -> FeatureView:
        """A feature, to be looked at: ``rich.print`` draws it, a notebook shows it by itself.

        Statistics, labels with their scores, the ``n`` strongest contexts (one a sequence),
        ``per_interval`` from each interval of strengths, neighbours; ``window`` tokens on either
        side.

        Raises:
            ValueError: no such feature, or a negative number.
        """
        if per_interval < 0:
            raise ValueError(f"per_interval is {per_interval}; expected at least 0")
        summary = self.feature(feature)
        examples = self.top(feature, n, window, per_sequence=1)
        edges = self.histogram_edges
        return gather(
            self._fetch, self._columns, summary, examples, edges, window, per_interval, self._who
        )


__all__ = ["Questions"]
