"""Which features fire on a text: the model reads it, the SAE encodes, the database tells more."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import torch

from r1sae_fast.encode import choose_mode, encode_rows
from r1sae_fast.features.identity import Origin
from r1sae_fast.r1.engines.base import Engine
from r1sae_fast.sae import FastSAE

FIRST = ("feature_id", "strength", "relative", "tokens", "token", "segment", "density", "label")
"""The columns that are given where none are named."""


@torch.no_grad()
def firing(
    text: str | Sequence[int],
    sae: FastSAE,
    engine: Engine,
    layer: int | None,
    origin: Origin,
    statistics: pa.Table,
    *,
    bos: bool,
) -> pa.Table:
    """A row for each feature that is active anywhere; see :meth:`FeatureDB.firing`."""
    origin.require_sae(sae)
    origin.require_model(engine)
    if sae.d_in != engine.hidden_size:
        raise ValueError(
            f"the SAE reads {sae.d_in} numbers, the model's residual stream has "
            f"{engine.hidden_size}; use the model that the SAE was trained on"
        )
    if layer is None:
        layer = origin.layer
    if layer is None:
        raise ValueError(f"{origin.path} does not say of which layer it is; give layer (--layer)")
    ids = engine.encode_text(text) if isinstance(text, str) else engine.encode_prompt(text)
    residuals = engine.residuals([ids], layer)[0].float()
    was = sae.mode
    try:
        sae.mode = choose_mode(sae, origin.mode)
        codes = encode_rows(sae, residuals.to(sae.device), origin.norm_limit)
    finally:
        sae.mode = was
    feature = codes.indices.cpu().numpy().astype(np.int64)
    strength = codes.values.float().cpu().numpy()
    place = codes.row_ids.cpu().numpy()
    active = strength > 0
    begins = engine.tokenizer is not None and ids[0] == engine.tokenizer.bos_id
    if begins and not bos:
        active &= place > 0
    feature, strength, place = feature[active], strength[active], place[active]
    # By feature, the strongest first, the earliest of equal ones.
    order = np.lexsort((place, -strength, feature))
    feature, strength, place = feature[order], strength[order], place[order]
    found, first, times = np.unique(feature, return_index=True, return_counts=True)
    pieces = _texts(engine, ids)
    peak = place[first]
    names = {0: "prompt", 1: "thinking", 2: "response"}
    segments = [names.get(int(segment)) for segment in engine.segments(ids)]
    columns = {
        "feature_id": pa.array(found.astype(np.int32)),
        "strength": pa.array(strength[first]),
        "tokens": pa.array(times.astype(np.int64)),
        "token_idx": pa.array(peak.astype(np.int32)),
        "token": pa.array([pieces[at] for at in peak.tolist()], pa.string()),
        "segment": pa.array([segments[at] for at in peak.tolist()], pa.string()),
    }
    return _joined(pa.table(columns), statistics)


def _texts(engine: Engine, ids: Sequence[int]) -> list[str | None]:
    if engine.tokenizer is None:
        return [None] * len(ids)
    decode = engine.tokenizer.decode
    # Half of a surrogate pair can't be stored as UTF-8.
    return [decode([token]).encode("utf-8", "replace").decode("utf-8") for token in ids]


def _joined(found: pa.Table, statistics: pa.Table) -> pa.Table:
    """With the statistics of each feature, and ``relative``: strength as a share of the largest."""
    # Both sides are sorted by feature; one that is never active in the database may be missing.
    known = statistics["feature_id"].to_numpy()
    wanted = found["feature_id"].to_numpy()
    at = np.searchsorted(known, wanted)
    present = at < len(known)
    present[present] = known[at[present]] == wanted[present]
    rows = statistics.take(pa.array(at, mask=~present))
    largest = rows["max"].cast(pa.float64()).to_numpy().copy()
    largest[~(largest > 0)] = np.nan
    relative = found["strength"].to_numpy() / largest
    table = found.append_column("relative", pa.array(relative, from_pandas=True))
    for name in rows.column_names:
        if name not in table.column_names:
            table = table.append_column(name, rows[name])
    return table
