"""What can be asked of a feature database beyond one feature: search, statistics, pictures."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pyarrow as pa

from r1sae_fast.errors import DatabaseError
from r1sae_fast.features.database_file import DatabaseFile
from r1sae_fast.features.identity import Origin, require_same_sae
from r1sae_fast.features.labelled import Who
from r1sae_fast.features.query.columns import find, statistics_query
from r1sae_fast.features.query.frame import Frame
from r1sae_fast.features.results import SearchHits
from r1sae_fast.features.search import search
from r1sae_fast.features.view import FeatureView, gather

if TYPE_CHECKING:
    from r1sae_fast.features.exporting.logits import Logits
    from r1sae_fast.features.results import TopExamples
    from r1sae_fast.features.semantic import TextEncoder
    from r1sae_fast.features.semantic.search import Labels
    from r1sae_fast.features.summary import FeatureSummary, Labeller
    from r1sae_fast.r1.engines.base import Engine
    from r1sae_fast.sae import FastSAE

StrPath = str | os.PathLike[str]


class Questions(DatabaseFile, ABC):
    """The questions; :class:`FeatureDB` gives the answers' source."""

    _embedded: tuple[StrPath | TextEncoder, Labels] | None = None

    @abstractmethod
    def feature(self, feature: int) -> FeatureSummary: ...

    @abstractmethod
    def top(
        self, feature: int, n: int = 10, window: int = 5, *, per_sequence: int | None = None
    ) -> TopExamples: ...

    @property
    @abstractmethod
    def labeller(self) -> Labeller | None: ...

    @property
    def searched(self) -> tuple[str, ...]:
        """What :meth:`search` looks at in this file: ``labels``, ``tokens``, both or neither."""
        places = {"autointerp": "labels", "token_lift": "tokens"}
        return tuple(name for table, name in places.items() if table in self._columns)

    def search(
        self, text: str, n: int = 20, *, semantic: StrPath | TextEncoder | None = None
    ) -> SearchHits:
        """Features whose label holds words of ``text``, or that fire on (or beside) such tokens.

        Case does not matter; words may be parts of words. Labels that a model wrote are ranked by
        BM25, those with all words first; tokens, of the table ``token_lift`` (the ten that tell
        most about each feature), by the share of the feature's strength. A file without that
        table is searched by label alone.

        With ``semantic``, features whose label means about the same, whatever its words: ``score``
        is the cosine of their vectors. The first such search embeds all labels and keeps the
        vectors in ``<database>.vectors/``, for labels and a model that are the same to the letter.

        Args:
            text: words.
            n: at most so many features.
            semantic: a static embedding model (model2vec): its folder, or its name in the Hugging
                Face cache (nothing is fetched). Or any object with ``encode(texts) -> [texts,
                dimensions]``, such as a loaded SentenceTransformer: its vectors are kept in memory.

        Raises:
            ValueError: empty text, or of words that the model does not know.
            DatabaseError: the file has neither labels nor token_lift; kept vectors are damaged.
            MissingExtraError: model2vec is not installed (extra ``search``).
            FileNotFoundError, CheckpointError: no such model, or not one that can be read.
        """
        if not text.strip() if semantic is not None else not text:
            raise ValueError("the text to search for is empty; expected a word or a part of one")
        if semantic is not None:
            return SearchHits(self._labels_by_meaning(semantic).search(text, n))
        if not self.searched:
            raise DatabaseError(
                f"{self.path}: nothing to search: it has neither labels (table autointerp) nor "
                "token_lift. Released databases keep their labels in a file of their own "
                "(autointerp.db), which FeatureDB.open joins where it lies beside the database"
            )
        return SearchHits(search(self._fetch, self._columns, text, self._who)[: max(n, 0)])

    def _labels_by_meaning(self, semantic: StrPath | TextEncoder) -> Labels:
        from r1sae_fast.features.semantic.model import load_model
        from r1sae_fast.features.semantic.search import Labels

        last = self._embedded
        if last is None or (last[0] is not semantic and last[0] != semantic):
            labels = Labels(self._fetch, self._columns, self.path, load_model(semantic))
            self._embedded = last = (semantic, labels)
        return last[1]

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

    @cached_property
    def origin(self) -> Origin:
        """Of which SAE, model and layer the database is, as far as its ``meta`` says."""
        return Origin.read(self.path, self.d_sae, self.metadata)

    def require_sae(self, sae: FastSAE) -> None:
        """Refuses an SAE that the database is not of.

        Raises:
            DatabaseError: d_sae or the checksum differ.
        """
        self.origin.require_sae(sae)

    def require_same_sae(self, other: Questions) -> None:
        """Refuses another database whose features are other features.

        Raises:
            DatabaseError: d_sae or the SAE's checksum differ.
        """
        require_same_sae(self.origin, other.origin)

    def firing(
        self,
        text: str | Sequence[int],
        sae: FastSAE | StrPath,
        engine: Engine | StrPath = "tiny-r1",
        *,
        layer: int | None = None,
        where: str | None = None,
        sort: str | Sequence[str] = "-relative",
        n: int | None = 20,
        columns: Sequence[str] | None = None,
        bos: bool = False,
    ) -> Frame:
        """Features that fire on a text, by running the model and the SAE.

        Args:
            text: raw, with whatever special tokens it has; or token ids.
            sae: the SAE that the database is of, or its folder.
            engine: the model, or its checkpoint; ``"tiny-r1"`` is the shipped one.
            layer: default: the database's.
            where, sort, n, columns: as of :meth:`find`, on the statistics and on ``strength`` (the
                largest in the text), ``relative`` (to the feature's largest in the database),
                ``tokens`` (how many it is active on), ``token_idx``, ``token`` and ``segment``
                (where it is strongest).
            bos: whether the token that begins every text counts: many features fire on it, and
                that says nothing of the text.

        Raises:
            DatabaseError: the database is of another SAE or model.
            ValueError: text that can't be read, or a mistake in a condition.
        """
        from r1sae_fast.features.firing import FIRST, firing
        from r1sae_fast.r1.engines.base import Engine
        from r1sae_fast.sae import FastSAE

        if not isinstance(sae, FastSAE):
            sae = FastSAE.load(sae)
        self.require_sae(sae)  # before a model is loaded
        if not isinstance(engine, Engine):
            from r1sae_fast.r1.engines.local import LocalEngine

            at = self.origin.layer if layer is None else layer
            engine = LocalEngine.from_pretrained(os.fspath(engine), last_layer=at)
        found = firing(text, sae, engine, layer, self.origin, self.statistics, bos=bos)
        return find(found, where, sort, n, columns, FIRST)

    def export_pages(
        self,
        folder: StrPath,
        kind: Literal["jsonl", "neuronpedia", "saedashboard", "saevis"],
        features: Sequence[int] | None = None,
        *,
        n: int = 20,
        window: int = 32,
        batch: int = 128,
        model_id: str | None = None,
        source_set: str = "r1sae-fast",
        creator: str = "r1sae-fast",
        sae: FastSAE | StrPath | None = None,
        model: StrPath | None = None,
        overwrite: bool = False,
        progress: bool | None = None,
    ) -> list[Path]:
        """Writes features so that other tools can show them.

        - ``"jsonl"``: one feature a line: statistics, labels, neighbours, contexts;
        - ``"neuronpedia"``: the folder that Neuronpedia imports in bulk;
        - ``"saedashboard"``: the ``batch-N.json`` that SAEDashboard's NeuronpediaRunner writes;
        - ``"saevis"``: the JSON of SAEDashboard's ``SaeVisData``, for ``load_json`` and its own
          HTML page; features that are never active are left out.

        All is ASCII; control characters in tokens and labels are made visible (but line breaks and
        tabs). What a feature adds to the logits takes ``sae`` and ``model``; neurons and
        correlations are left empty.

        Args:
            folder: new or empty, unless ``overwrite``.
            kind: the format.
            features: which; default: all.
            n: of the strongest examples, at most as many as the database holds of each feature.
            window: tokens on either side.
            batch: features in a file.
            model_id, source_set, creator: names on Neuronpedia; the model's default is the
                database's.
            sae: the SAE that the database is of, or its folder, for logits.
            model: its model's checkpoint, ``"tiny-r1"`` the shipped one; nothing but the head is
                read. Default: none is known to the file, so logits are left out.

        Raises:
            FileExistsError: the folder holds files and ``overwrite`` is false.
            DatabaseError: the database is of another SAE or model.
            ValueError: no such feature or format, one of ``sae`` and ``model`` alone, or (saevis)
                no feature that is ever active.
        """
        from r1sae_fast.features.exporting.pages import pages
        from r1sae_fast.features.exporting.sae_vis import Activity
        from r1sae_fast.features.exporting.target import Target
        from r1sae_fast.features.exporting.write import FORMATS, export_pages
        from r1sae_fast.progress import progress_bar

        if kind not in FORMATS:
            raise ValueError(f"no format {kind!r}; expected one of {', '.join(FORMATS)}")
        for name, number, least in (("n", n, 0), ("window", window, 0), ("batch", batch, 1)):
            if number < least:
                raise ValueError(f"{name} is {number}; expected at least {least}")
        chosen = range(self.d_sae) if features is None else [self._known(f) for f in features]
        logits = self._logits(sae, model)
        tokens = self._fetch("SELECT count(*) FROM tokens")[0][0]
        changed = datetime.fromtimestamp(self.path.stat().st_mtime, timezone.utc)
        target = Target(
            model_id or self.origin.model or "deepseek-r1",
            self.origin.layer or 0,
            source_set,
            creator,
            changed.isoformat(timespec="milliseconds"),
            self._fetch("SELECT count(DISTINCT sequence_id) FROM tokens")[0][0],
            2 * window + 1,
            self.histogram_edges,
        )
        read = pages(
            self._fetch,
            self._fetch_arrow,
            self._columns,
            chosen,
            n=n,
            window=window,
            who=self._who,
            batch=batch,
        )
        with progress_bar("exporting", len(chosen), unit="features", shown=progress) as advance:
            done = 0

            def shown(count: float) -> None:
                nonlocal done
                done += int(count)
                advance(done)

            return export_pages(
                read,
                Path(folder),
                kind,
                target,
                Activity(self.sql, tokens, logits),
                overwrite=overwrite,
                progress=shown,
            )

    def _logits(self, sae: FastSAE | StrPath | None, model: StrPath | None) -> Logits | None:
        """What features of this database add to the logits of its model."""
        if (sae is None) != (model is None):
            raise ValueError("only one of sae and model is given; logits take both, or give none")
        if sae is None or model is None:
            return None
        from r1sae_fast.features.exporting.logits import Logits
        from r1sae_fast.r1.engines.base import checkpoint_name, fingerprint, resolve_checkpoint
        from r1sae_fast.sae import FastSAE

        if not isinstance(sae, FastSAE):
            sae = FastSAE.load(sae)
        self.require_sae(sae)
        name = os.fspath(model)
        folder = resolve_checkpoint(name)
        found = Logits(sae, folder)
        self.origin.require_checkpoint(checkpoint_name(name), fingerprint(folder))
        return found

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
