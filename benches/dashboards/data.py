"""The rows of a demo in windows of so many tokens, its SAE and its tokenizer, for all tools."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

WINDOW = 32
"""Tokens: delphi's examples are as long, and lie in one window each."""


def prepare(demo: Path, work: Path, windows: int) -> None:
    """Writes ``work/data.safetensors``, ``work/sae`` and ``work/tokenizer.json``."""
    from r1sae_fast import FastSAE
    from r1sae_fast.r1 import LocalEngine
    from r1sae_fast.shards import ActivationShards
    from r1sae_fast.tiny_r1 import path as tiny_r1

    shards = ActivationShards(demo / "activations")
    sae = FastSAE.load(demo / "sae")
    columns = shards[: len(shards)]
    # Whole windows within one sequence each.
    new = np.flatnonzero(np.diff(columns.sequence_id.numpy(), prepend=-1))
    ends = np.append(new[1:], len(shards))
    starts = [s for a, b in zip(new, ends, strict=True) for s in range(a, b - WINDOW + 1, WINDOW)]
    rows = torch.from_numpy(np.add.outer(np.array(starts[:windows]), np.arange(WINDOW)))
    engine = LocalEngine.from_pretrained("tiny-r1", dtype=torch.float32)
    work.mkdir(parents=True, exist_ok=True)
    tensors = {
        "activations": columns.activations[rows].float(),
        "tokens": columns.tokens[rows],
        "segment": columns.segment[rows],
        "W_enc": sae.W_enc.detach(),
        "W_dec": sae.W_dec.detach(),
        "b_enc": sae.b_enc.detach(),
        "b_dec": sae.b_dec.detach(),
        "threshold": torch.as_tensor(float(sae.threshold)),
        "W_U": engine.model.lm_head.weight.detach().float().T,
    }
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(whole, work / "data.safetensors")
    sae.mode = "threshold"
    sae.save(work / "sae")
    shutil.copyfile(tiny_r1() / "tokenizer.json", work / "tokenizer.json")
