"""delphi's own cache, constructor and sampler, in an environment of its own. Its model is one that
has been run: each batch of windows is answered with its rows from memory."""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from delphi.config import ConstructorConfig, SamplerConfig
from delphi.latents import LatentCache, LatentDataset
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

TOP = 20
BATCH = 32  # windows, delphi's default


class Played(nn.Module):
    """The rows of the windows that are asked for, in the order in which they are asked for."""

    def __init__(self, activations: Tensor) -> None:
        super().__init__()
        self.layer = nn.Identity()
        self._activations = activations
        self._at = 0
        self.device = torch.device("cpu")

    def forward(self, tokens: Tensor) -> Tensor:
        rows = self._activations[self._at : self._at + len(tokens)]
        self._at = (self._at + len(tokens)) % len(self._activations)
        played: Tensor = self.layer(rows)
        return played


def main(work: Path) -> None:
    data = load_file(work / "data.safetensors")
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(work / "tokenizer.json"))
    tokens = data["tokens"].long()
    windows, width = tokens.shape
    threshold = data["threshold"]

    def encode(x: Tensor) -> Tensor:
        pre = x @ data["W_enc"] + data["b_enc"]
        return pre * (pre > threshold)

    folder = work / "delphi"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    model: Any = Played(data["activations"])
    began = time.perf_counter()
    cache = LatentCache(model, {"layer": encode}, batch_size=BATCH)
    cache.run(windows * width, tokens)
    cache.save_splits(5, folder)
    (folder / "layer" / "config.json").write_text(json.dumps({"model_name": "", "ctx_len": width}))
    cached = time.perf_counter()
    constructor = ConstructorConfig(example_ctx_len=width, min_examples=1)
    # Its defaults but for the kind: quantiles need more examples than rare features have.
    sampler = SamplerConfig(n_examples_train=TOP, train_type="top", n_examples_test=0)
    dataset = LatentDataset(folder, sampler, constructor, tokenizer, modules=["layer"])
    d_sae = data["W_enc"].shape[1]
    strengths = np.zeros((d_sae, TOP), dtype=np.float32)
    shown = np.full((d_sae, TOP, width), -1, dtype=np.int64)
    found = 0
    for record in dataset:
        found += 1
        feature = record.latent.latent_index
        for rank, example in enumerate(record.examples[:TOP]):
            strengths[feature, rank] = float(example.activations.max())
            shown[feature, rank] = example.tokens.numpy()
    ended = time.perf_counter()
    np.savez(work / "delphi.npz", strengths=strengths, tokens=shown)
    parts = {"cache": cached - began, "construct": ended - cached}
    told = {"seconds": ended - began, "features": d_sae, "with_examples": found, "parts": parts}
    sys.stdout.write("\n" + json.dumps(told) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
