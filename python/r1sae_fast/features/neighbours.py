"""The features whose decoder directions are nearest to each feature's."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

if TYPE_CHECKING:
    from r1sae_fast.sae import FastSAE

_CELLS = 1 << 24  # cosines at a time


def neighbours(sae: FastSAE, n: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Features ``[d_sae, min(n, d_sae - 1)]`` and cosines, the nearest first, equal ones by id.

    Cosines are those of float32 directions. A direction of length 0 is at right angles to all.
    """
    directions = torch.nn.functional.normalize(sae.W_dec.detach().cpu().float(), dim=1)
    d_sae = len(directions)
    n = max(0, min(n, d_sae - 1))
    features = np.empty((d_sae, n), dtype=np.int64)
    cosines = np.empty((d_sae, n), dtype=np.float32)
    rows = max(1, _CELLS // d_sae)
    for start in range(0, d_sae, rows):
        end = min(d_sae, start + rows)
        found = directions[start:end] @ directions.T
        found[torch.arange(end - start), torch.arange(start, end)] = -2.0
        if n:
            # Those that equal the last one compete by their ids: few rows have any beyond it.
            values, ids = found.topk(n + 1, dim=1)
            tied = torch.nonzero(values[:, n - 1] == values[:, n])[:, 0]
            ids = ids[:, :n].sort(dim=1).values
            values = found.gather(1, ids)
            order = torch.argsort(values, dim=1, descending=True, stable=True)
            features[start:end] = ids.gather(1, order).numpy()
            cosines[start:end] = values.gather(1, order).numpy()
            for row in tied.tolist():
                line = found[row]
                candidates = torch.nonzero(line >= cosines[start + row, -1])[:, 0]
                order = torch.argsort(line[candidates], descending=True, stable=True)[:n]
                features[start + row] = candidates[order].numpy()
                cosines[start + row] = line[candidates[order]].numpy()
    return features, cosines


def checksum(sae: FastSAE) -> str:
    """SHA-256 of the decoder and the biases, which tells this SAE from others."""
    digest = hashlib.sha256()
    for tensor in (sae.W_dec, sae.b_enc, sae.b_dec):
        digest.update(str(tuple(tensor.shape)).encode())
        digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()
