"""Activations to sparse codes, shard by shard; killed at any point, the same call goes on.

What a row's codes are must not depend on where an encoding was interrupted. In the modes "topk"
and "threshold" each row stands alone. In "batch_topk" a row's codes depend on its batch, so batches
are cut at multiples of ``batch_rows`` from the first row, whatever happened in between, and the
manifest says how they were cut.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from r1sae_fast.codes import SparseCodes
from r1sae_fast.errors import NonFiniteError
from r1sae_fast.progress import progress_bar
from r1sae_fast.sae import FastSAE, Mode
from r1sae_fast.shards import ActivationShards, CodeShards, CodeWriter
from r1sae_fast.shards.activations import first_non_finite

__all__ = ["choose_mode", "encode_shards"]

_ROWS_PER_SHARD = 1 << 18


def choose_mode(sae: FastSAE, mode: Mode | None = None) -> Mode:
    """The mode to encode a data set in: ``mode`` if given, else the SAE's own, but "threshold"
    instead of "batch_topk" where it is calibrated, since then codes do not depend on batches.

    Raises:
        ValueError: no such mode, or "threshold" without calibration.
    """
    calibrated = bool((sae.threshold >= 0).all())
    if mode is None:
        return "threshold" if sae.mode == "batch_topk" and calibrated else sae.mode
    if mode not in ("topk", "batch_topk", "threshold"):
        raise ValueError(f"mode is {mode!r}; expected one of topk, batch_topk, threshold")
    if mode == "threshold" and not calibrated:
        raise ValueError(
            "mode is 'threshold', but this SAE has none; calibrate it with "
            "sae.calibrate_threshold(activations), or use mode 'batch_topk'"
        )
    return mode


@torch.no_grad()
def encode_shards(
    sae: FastSAE,
    shards: ActivationShards | str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    batch_rows: int = 4096,
    mode: Mode | None = None,
    values_dtype: str = "float32",
    norm_limit: float | None = None,
    resume: bool = True,
    progress: bool | None = None,
    on_rows: Callable[[int], None] | None = None,
) -> CodeShards:
    """Encodes every row of ``shards``, in order, into code shards in ``out_dir``.

    Row i of the codes is row i of the activations, with the same token columns. The manifest's
    metadata say which SAE, mode and activations they come from.

    Args:
        sae: on any device; left as it was.
        shards: of the SAE's d_in.
        out_dir: new, empty, or of an encoding that is gone on with.
        batch_rows: rows at a time; in mode "batch_topk" they share ``k * batch_rows`` codes.
        mode: default :func:`choose_mode`.
        values_dtype: "float32" or "bfloat16".
        norm_limit: rows of a larger norm get no codes (attention sinks would be the strongest
            examples of whatever fires on them); default: all rows are encoded.
        resume: go on in a folder that holds a part of the same codes (all of them: just opens
            them); False refuses a folder with shards.
        progress: show a bar on stderr; default if that is a terminal.
        on_rows: called with the number of rows done, after every batch.

    Raises:
        ValueError: another d_in, a bad mode, or a folder with codes of other settings.
        NonFiniteError: a NaN or infinite activation; the row is named. Finished shards stay.
        FileExistsError: shards are there and ``resume`` is False; or other files.
        ShardError: another process writes to the folder, or a shard is damaged.
    """
    if not isinstance(shards, ActivationShards):
        shards = ActivationShards(shards)
    if shards.d_in != sae.d_in:
        raise ValueError(
            f"{shards.folder}: activations have d_in = {shards.d_in}, the SAE {sae.d_in}; "
            "give activations of the layer it was trained on"
        )
    if isinstance(batch_rows, bool) or not isinstance(batch_rows, int) or batch_rows < 1:
        raise ValueError(f"batch_rows is {batch_rows!r}; expected a positive int")
    chosen = choose_mode(sae, mode)
    # Whole batches to a shard, so that what is resumed starts at a batch's first row.
    rows_per_shard = batch_rows * max(1, _ROWS_PER_SHARD // batch_rows)
    metadata = describe(sae, shards, chosen, batch_rows, norm_limit)
    was, sae.mode = sae.mode, chosen
    try:
        with (
            CodeWriter(
                out_dir,
                sae.d_sae,
                metadata,
                values_dtype,
                rows_per_shard=rows_per_shard,
                explicit_shards=True,
                resume=resume,
            ) as writer,
            progress_bar("encoding", len(shards), unit="rows", shown=progress) as shown,
        ):
            for start in range(writer.rows, len(shards), batch_rows):
                stop = min(start + batch_rows, len(shards))
                _encode_batch(sae, shards, slice(start, stop), norm_limit, writer)
                if stop % rows_per_shard == 0 or stop == len(shards):
                    writer.finish_shard()
                shown(stop)
                if on_rows is not None:
                    on_rows(stop)
    finally:
        sae.mode = was
    return CodeShards(out_dir)


def describe(
    sae: FastSAE,
    shards: ActivationShards,
    mode: Mode,
    batch_rows: int,
    norm_limit: float | None,
) -> dict[str, Any]:
    """What decides the codes, as the manifest keeps it."""
    described = {
        **describe_sae(sae, mode, norm_limit),
        "activations": shards.metadata,
        "activations_fingerprint": shards.fingerprint,
    }
    if mode == "batch_topk":
        described["batch_rows"] = batch_rows
    return described


def describe_sae(sae: FastSAE, mode: Mode, norm_limit: float | None) -> dict[str, Any]:
    """The SAE's part in that."""
    described: dict[str, Any] = {
        "sae": {"d_in": sae.d_in, "d_sae": sae.d_sae, "k": sae.k, "tied": sae.tied},
        "sae_fingerprint": fingerprint(sae),
        "mode": mode,
    }
    if mode == "threshold" and sae.threshold.dim() == 0:
        described["threshold"] = float(sae.threshold)
    if norm_limit is not None:
        described["norm_limit"] = norm_limit
    return described


def fingerprint(sae: FastSAE) -> str:
    """16 hex digits that differ when any weight does."""
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(sae.state_dict().items()):
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(flat.numpy())
    return digest.hexdigest()


def _encode_batch(
    sae: FastSAE,
    shards: ActivationShards,
    rows: slice,
    norm_limit: float | None,
    writer: CodeWriter,
) -> None:
    batch = shards[rows]
    bad = first_non_finite(batch.activations)
    if bad is not None:
        raise NonFiniteError(
            f"{shards.folder}: activations hold a NaN or infinite value in row {rows.start + bad}; "
            "remove or mask that row before encoding"
        )
    writer.write(
        encode_rows(sae, batch.activations.to(sae.device), norm_limit),
        tokens=batch.tokens,
        sequence_id=batch.sequence_id,
        position=batch.position,
        segment=batch.segment,
    )


def encode_rows(sae: FastSAE, x: Tensor, norm_limit: float | None) -> SparseCodes:
    """The codes of ``x [n, d_in]``; none for rows of a larger norm than ``norm_limit``."""
    if norm_limit is None:
        return sae.encode_sparse(x)
    keep = x.float().norm(dim=1) <= norm_limit
    return with_empty_rows(sae.encode_sparse(x[keep]), keep)


def with_empty_rows(codes: SparseCodes, keep: Tensor) -> SparseCodes:
    """``codes`` of the rows where ``keep [n]`` is true, and no codes in the others."""
    counts = torch.zeros(keep.shape[0], dtype=torch.int64, device=codes.device)
    counts[keep] = codes.row_offsets.diff()
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    return SparseCodes(codes.values, codes.indices, offsets, codes.d_sae)
