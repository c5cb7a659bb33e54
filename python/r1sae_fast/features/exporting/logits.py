"""What a feature adds to the logits: its decoder direction through the model's head."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from r1sae_fast.features.text import harmless
from r1sae_fast.r1.weights import CheckpointReader

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from r1sae_fast.sae import FastSAE

ROWS = 10
"""Tokens at either end."""
BINS = 50


class Logits:
    """The direct effect of features on the logits: W_dec, times the final norm's weight, times the
    unembedding, less its mean over the vocabulary (which changes no probability).

    As SAEDashboard's on a model whose norm is folded into the unembedding. Later layers and the
    norm's division are left out, so it tells directions, not what the model will say. The head is
    read in bands from the checkpoint; nothing else of the model is.

    Args:
        sae: whose decoder.
        checkpoint: the folder of the model, in R1's layout.

    Raises:
        FileNotFoundError, CheckpointError: no such checkpoint, or without a head.
        ValueError: the decoder doesn't write to this model's residual stream.
    """

    def __init__(self, sae: FastSAE, checkpoint: Path) -> None:
        self._checkpoint = checkpoint
        with CheckpointReader(checkpoint) as reader:
            norm = reader.raw("model.norm.weight").float().clone()
            self.vocabulary, hidden = reader.entry("lm_head.weight").shape
        if sae.W_dec.shape[1] != hidden:
            raise ValueError(
                f"the SAE's decoder writes {sae.W_dec.shape[1]} numbers, the residual stream of "
                f"{checkpoint} has {hidden}; expected the SAE's own model"
            )
        self._directions = sae.W_dec
        self._tokenizer = _tokenizer(checkpoint)
        self._norm = norm

    def of(self, features: Sequence[int]) -> NDArray[np.float32]:
        """[features, vocabulary]"""
        found = torch.empty(len(features), self.vocabulary)
        if features:
            rows = self._directions.detach()[list(features)].cpu().float() * self._norm
            with CheckpointReader(self._checkpoint) as reader:
                for part, band in reader.bands("lm_head.weight"):
                    found[:, part] = rows @ band.float().T
        found -= found.mean(1, keepdim=True)
        return found.numpy()

    def text(self, token: int) -> str:
        """A token's text, harmless; its number where the checkpoint has no tokenizer."""
        text = "" if self._tokenizer is None else self._tokenizer.decode([token], False)
        return harmless(text) if text else f"[{token}]"

    def shown(self, features: Sequence[int]) -> list[dict[str, Any]]:
        """Of each feature what Neuronpedia and SAEDashboard's batches show of it: the tokens that
        it makes likelier and less likely, most first, and a histogram."""
        found = []
        for logits in self.of(features):
            order = np.argsort(logits, kind="stable")
            ends = {"neg": order[:ROWS].tolist(), "pos": order[::-1][:ROWS].tolist()}
            heights, edges = np.histogram(logits.astype(np.float64), BINS)
            one: dict[str, Any] = {
                "logits_hist_data_bar_heights": heights.astype(float).tolist(),
                "logits_hist_data_bar_values": np.round((edges[:-1] + edges[1:]) / 2, 5).tolist(),
            }
            for name, ids in ends.items():
                one[f"{name}_str"] = [self.text(token) for token in ids]
                one[f"{name}_values"] = [round(float(logits[token]), 4) for token in ids]
            found.append(one)
        return found


def _tokenizer(checkpoint: Path) -> Tokenizer | None:
    file = checkpoint / "tokenizer.json"
    if not file.is_file():
        return None
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(file))
