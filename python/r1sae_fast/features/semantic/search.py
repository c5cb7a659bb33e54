"""Features whose labels mean about what a text means."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from r1sae_fast.errors import DatabaseError
from r1sae_fast.features.contexts import Fetch
from r1sae_fast.features.labelled import Columns
from r1sae_fast.features.labels import MODEL_NAME
from r1sae_fast.features.results import SearchHit
from r1sae_fast.features.semantic.model import TextModel, Vectors
from r1sae_fast.features.semantic.vectors import vectors_of, vectors_path


class Labels:
    """All labels of a database with their vectors.

    The counted label of a feature stands only where no model wrote one, and where it names tokens
    on which the feature fires.

    Raises:
        DatabaseError: there are no labels.
    """

    def __init__(self, fetch: Fetch, tables: Columns, path: Path, model: TextModel) -> None:
        from r1sae_fast.progress import progress_bar

        if "autointerp" not in tables:
            raise DatabaseError(
                f"{path}: no labels to search by meaning (no table autointerp); label features "
                "with `r1sae label`, or open the file of labels with it"
            )
        counts = "LEFT JOIN features USING (feature_id)" if "features" in tables else ""
        self._model = model
        self._rows = fetch(
            f"""SELECT feature_id, label, model_name, {"count" if counts else "NULL"}
            FROM autointerp {counts}
            WHERE label IS NOT NULL AND (model_name IS DISTINCT FROM ? OR label LIKE 'fires %')
            QUALIFY model_name IS DISTINCT FROM ? OR NOT bool_or(model_name IS DISTINCT FROM ?)
                OVER (PARTITION BY feature_id)
            ORDER BY feature_id, label, model_name""",
            [MODEL_NAME] * 3,
        )
        texts = list(dict.fromkeys(row[1] for row in self._rows))
        if not texts:
            raise DatabaseError(f"{path}: no labels to search by meaning: autointerp is empty")
        with progress_bar("embedding labels", len(texts), unit="labels") as advance:
            self._vectors: Vectors = vectors_of(texts, model, vectors_path(path, model), advance)
        places = {text: at for at, text in enumerate(texts)}
        self._places = np.array([places[row[1]] for row in self._rows])

    def search(self, text: str, n: int) -> list[SearchHit]:
        """The ``n`` features with the most similar label; of each feature its best.

        Raises:
            ValueError: the model knows nothing of the text.
        """
        # A command line may hold bytes that are no UTF-8, which tokenizers take ill.
        asked = text.encode("utf-8", "replace").decode()
        query = self._model.vectors([asked])[0]
        if not query.any():
            raise ValueError(
                f"the embedding model {self._model.name} knows no word of {text!r}; use others, or "
                "search without it"
            )
        similar = (self._vectors @ query)[self._places]
        found: dict[int, SearchHit] = {}
        for row in np.argsort(-similar, kind="stable"):
            if len(found) >= n or similar[row] <= 0:
                break
            feature, label, model, count = self._rows[row]
            if feature not in found:
                score = float(similar[row])
                found[feature] = SearchHit(
                    feature, "meaning", label, model, None, None, count, score
                )
        return list(found.values())
