"""Opening and querying a feature database."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cached_property
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from r1sae_fast.errors import DatabaseError
from r1sae_fast.features.build import Plan, build
from r1sae_fast.features.clustering import Keep, default_threads, require_memory
from r1sae_fast.features.contexts import contexts
from r1sae_fast.features.database_file import DatabaseFile
from r1sae_fast.features.labelled import choose, labellers, labels_of
from r1sae_fast.features.opening import open_for_reading
from r1sae_fast.features.questions import Questions
from r1sae_fast.features.released import open_source, recognise
from r1sae_fast.features.results import TopExample, TopExamples
from r1sae_fast.features.schema import SEGMENTS, TABLES
from r1sae_fast.features.summary import FeatureSummary, Label, Labeller
from r1sae_fast.features.writing import Decode

if TYPE_CHECKING:
    from r1sae_fast.examples import Examples
    from r1sae_fast.sae import FastSAE
    from r1sae_fast.shards import CodeShards

StrPath = str | os.PathLike[str]


class FeatureDB(Questions):
    """A feature database, opened for reading (so several programs may read it at once).

    Built ones (:meth:`build`) and Goodfire's released ones: of the latter ``tokens`` and
    ``activations`` must be in the file; without ``autointerp`` there are no labels (:meth:`open`
    joins a file of labels beside it, such as the released autointerp.db).

    Args:
        path: the DuckDB file.

    Raises:
        FileNotFoundError: no such file.
        DatabaseError: not a DuckDB file, a damaged one, one that another program is writing, or
            one without the tables above.
    """

    _chosen: Labeller | None = None

    def __init__(self, path: StrPath) -> None:
        super().__init__(Path(path), open_for_reading(Path(path)))

    @classmethod
    def open(cls, path: StrPath, labels: StrPath | Literal[False] | None = None) -> FeatureDB:
        """Opens a database of any kind that is known here, and joins the labels beside it.

        - a file that :meth:`build` or ``r1sae features import`` wrote;
        - Goodfire's ``math.ddb``, ``logic.ddb`` and their samples, with ``autointerp.db`` or
          ``autointerp.csv`` beside them. The release's tables are in the schema ``ds`` too, so
          that its notebook's queries run unchanged;
        - the SQLite files of the first release (``tokens.db``, ``feature_activations.db``,
          ``autointerp.db``), up to 256 MiB: these are read into memory. Larger ones are to be
          imported.

        Args:
            path: the file, or a folder with one database in it; of SQLite files any of them.
            labels: the file of labels; default: the one beside a database that holds none; False:
                none.

        Raises:
            FileNotFoundError: no such file.
            DatabaseError: a schema that is none of these (the message describes it), a damaged
                file, or SQLite files too large to be read into memory.
            ValueError: labels for a database that holds its own.
        """
        path = Path(path)
        chosen = labels if labels is None or labels is False else Path(labels)
        source = recognise(path, chosen)
        self = cls.__new__(cls)
        DatabaseFile.__init__(self, source.path, open_source(source))
        return self

    @classmethod
    def build(
        cls,
        path: StrPath,
        codes: CodeShards | StrPath,
        examples: Examples | None = None,
        decode: Decode | Any | None = None,
        metadata: Mapping[str, object] | None = None,
        *,
        sae: FastSAE | None = None,
        n: int = 20,
        per_sequence: int | None = 1,
        quantiles: int = 5,
        per_quantile: int = 5,
        negatives: int = 50,
        coactivations: int = 20,
        neighbours: int = 20,
        seed: int = 0,
        max_memory: int = 2 << 30,
        threads: int | None = None,
        overwrite: bool = False,
        progress: bool | None = None,
    ) -> FeatureDB:
        """Builds a database from code shards and opens it.

        Memory is bounded: activations are sorted by way of ``<path>.work.tmp`` (12 bytes each).
        The file is written as ``<path>.tmp`` and renamed, so a build that is stopped leaves the
        old file. After a kill the same call goes on where it was; an error or ctrl-c clears up.

        Args:
            path: the file to write.
            codes: code shards with tokens, sequence_id and position of every row, or their folder.
            examples: of the same codes, whose counts are compared and whose ``n`` is used.
            decode: token id -> text, or a tokenizer (anything with ``decode([id])``); without it
                tokens have no text.
            metadata: whatever should be kept in ``meta``; values that are not text become JSON.
            sae: the SAE that made the codes; its checksum is noted, its decoder gives neighbours.
            n: strongest examples of each feature.
            per_sequence: at most so many of them from one sequence; None: any number.
            quantiles: intervals of equal numbers into which a feature's activations are cut.
            per_quantile: activations drawn from each interval.
            negatives: random places where the feature is not active, nor near them.
            coactivations: features that are active with it most of all; 0 saves the time.
            neighbours: features of nearest decoder directions.
            seed: decides, with the codes alone, what is drawn.
            max_memory: bytes that may be used, about; a feature's activations (64 bytes each)
                must fit into half.
            threads: at most so many; default: all CPUs. They don't change what is written.
            overwrite: whether a file at ``path`` may be replaced.
            progress: a bar on stderr; default: when stderr is a terminal.

        Raises:
            FileExistsError: ``path`` exists and ``overwrite`` is false.
            DatabaseError: another build of the same file is running, this process has the file
                open (close it first), or the disk or memory is full (the old file stays).
            ValueError: examples of other codes; codes whose rows don't say what token they are, or
                two rows at the same place; a number out of range; a feature that is active too
                often for ``max_memory``.
        """
        from r1sae_fast.shards import CodeShards

        path = Path(path)
        if path.exists() and not overwrite:
            raise FileExistsError(
                f"{path}: exists already; pass overwrite=True (--overwrite) to replace it"
            )
        if not path.parent.is_dir():
            raise FileNotFoundError(f"{path.parent}: no such folder; make it first")
        if not isinstance(codes, CodeShards):
            codes = CodeShards(codes)
        keep = Keep(
            examples=n if examples is None else examples.n,
            per_sequence=0 if per_sequence is None else per_sequence,
            quantiles=quantiles,
            per_quantile=per_quantile,
            negatives=negatives,
            coactivations=coactivations,
            seed=seed,
        )
        plan = Plan(keep, neighbours, require_memory(max_memory), default_threads(threads))
        build(path, codes, examples, _decoder(decode), sae, metadata or {}, plan, progress)
        return cls(path)

    # -- a feature --------------------------------------------------------------------------------

    def feature(self, feature: int) -> FeatureSummary:
        """A feature's statistics and labels.

        Raises:
            ValueError: no such feature.
        """
        feature = self._known(feature)
        labels = self.labels(feature)
        names = list(SEGMENTS.values())
        if "features" not in self._columns:
            count, mean, largest = self._fetch(
                "SELECT count(*), avg(strength) FILTER (isfinite(strength)), "
                "coalesce(max(strength) FILTER (isfinite(strength)), 0) FROM activations "
                "WHERE feature_id = ?",
                [feature],
            )[0]
            no_segments = dict.fromkeys(names)
            return FeatureSummary(
                feature, count, None, mean, largest, None, no_segments, None, labels
            )
        segments = ", ".join(f"density_{name}" for name in names)
        found = self._fetch(
            f"SELECT count, density, mean, max, histogram, clarity, {segments} FROM features "
            "WHERE feature_id = ?",
            [feature],
        )
        if not found:
            raise DatabaseError(
                f"{self.path}: no row of feature {feature} in the table features; restore the file "
                "or build it again"
            )
        count, density, mean, largest, histogram, clarity, *densities = found[0]
        edges = self.histogram_edges
        fits = histogram is not None and edges is not None and len(edges) == len(histogram) + 1
        if not fits or None in histogram:
            histogram = None
        return FeatureSummary(
            feature,
            count or 0,
            density,
            mean,
            # Of a file by somebody else it may be anything.
            largest if largest is not None and isfinite(largest) else 0.0,
            None if histogram is None else tuple(histogram),
            dict(zip(names, densities, strict=True)),
            clarity,
            labels,
        )

    # -- labels ---------------------------------------------------------------------------------

    @cached_property
    def labellers(self) -> tuple[Labeller, ...]:
        """Who labelled: models and versions of prompts, the best scored first, counting last."""
        return labellers(self._fetch, self._columns)

    @property
    def labeller(self) -> Labeller | None:
        """Whose labels come first: by default the best of :attr:`labellers`; None: no labels.

        Set it by a model's name, or by ``name@prompt version``.
        """
        if self._chosen is None:
            return self.labellers[0] if self.labellers else None
        return self._chosen

    @labeller.setter
    def labeller(self, wanted: str | Labeller | None) -> None:
        if isinstance(wanted, Labeller):
            wanted = f"{wanted.model_name}@{wanted.prompt_version}"
        self._chosen = None if wanted is None else choose(self.labellers, wanted)

    def labels(self, feature: int) -> tuple[Label, ...]:
        """A feature's labels with their scores.

        That of :attr:`labeller` first, then others by score; the counted one is the last.

        Raises:
            ValueError: no such feature.
        """
        who = self.labeller
        chosen = None if who is None else (who.model_name, who.prompt_version)
        return labels_of(self._fetch, self._columns, self._known(feature), chosen)

    # -- queries --------------------------------------------------------------------------------

    def top(
        self, feature: int, n: int = 10, window: int = 5, *, per_sequence: int | None = None
    ) -> TopExamples:
        """A feature's strongest activations, each with the tokens around it.

        Args:
            feature: its id.
            n: how many, the strongest first; equal ones in the order of the text.
            window: tokens of context on either side.
            per_sequence: at most so many of any one sequence; default: no limit.

        Returns:
            A sequence of :class:`TopExample`, with ``to_arrow()`` and ``to_pandas()``.

        Raises:
            ValueError: no such feature, or a negative number.
        """
        feature = self._known(feature)
        for name, number, least in (
            ("n", n, 0),
            ("window", window, 0),
            ("per_sequence", per_sequence, 1),
        ):
            if number is not None and number < least:
                raise ValueError(f"{name} is {number}; expected at least {least}")
        limit = (
            ""
            if per_sequence is None
            else f"""
            QUALIFY row_number() OVER (PARTITION BY sequence_id
                ORDER BY strength DESC, token_idx) <= {int(per_sequence)}"""
        )
        hits = self._fetch(
            "SELECT sequence_id, token_idx, strength FROM activations WHERE feature_id = ?"
            f"{limit} ORDER BY strength DESC, sequence_id, token_idx LIMIT {int(n)}",
            [feature],
        )
        around = contexts(
            self._fetch,
            feature,
            [(hit[0], hit[1]) for hit in hits],
            window,
            with_segment="segment" in self._columns["tokens"],
        )
        return TopExamples(
            [
                TopExample(feature, rank, sequence, place, strength, around[sequence, place])
                for rank, (sequence, place, strength) in enumerate(hits, 1)
            ]
        )

    def export(self, folder: StrPath, *, overwrite: bool = False) -> list[Path]:
        """Writes each table to ``folder/<table>.parquet``, each whole or not at all.

        Raises:
            FileExistsError: one of the files is there already and ``overwrite`` is false.
            DatabaseError: the database is damaged (what was exported before stays).
        """
        from r1sae_fast.features.export import export

        tables = [table for table in TABLES if table in self._columns]
        with self._cursor() as cursor:
            return export(cursor, self.path, tables, Path(folder), overwrite=overwrite)


def _decoder(decode: Decode | Any | None) -> Decode | None:
    if decode is None or not hasattr(decode, "decode"):
        if decode is not None and not callable(decode):
            raise TypeError(
                f"decode is a {type(decode).__name__}; expected a function from token id to text, "
                "or a tokenizer"
            )
        return decode
    tokenizer = decode

    def text_of(token: int) -> str:
        # Special tokens are tokens like any other here.
        text: str = tokenizer.decode([token], skip_special_tokens=False)
        return text

    return text_of
