"""One function a library: trains with its own trainer, and gives the SAE as ours.

What each library recommends is kept (initial weights, optimizer, schedule's form, auxiliary loss).
What it counts in steps or tokens for runs a hundred times as long is brought to this run's length:
warm-up (5%), decay (the last 20%), when a feature counts as dead (a tenth of the tokens, as ours).
The learning rate is the library's default unless one is given.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable
from importlib import import_module

import torch
from torch import Tensor

from quality.data import Task
from r1sae_fast import FastSAE
from r1sae_fast.sae import Mode

Trained = Callable[[Task, float | None], FastSAE]

_WHERE = {
    "ours": ("quality.ours", "batch_topk"),
    "ours-sparse-adam": ("quality.ours", "sparse_adam"),
    "ours-topk": ("quality.ours", "topk"),
    "ours-matryoshka": ("quality.ours", "matryoshka"),
    "sparsify": ("quality.eai_sparsify", "topk"),
    "saelens": ("quality.saelens", "batch_topk"),
    "saelens-matryoshka": ("quality.saelens", "matryoshka"),
    "dictionary_learning": ("quality.dictionary", "batch_topk"),
    "dictionary_learning-matryoshka": ("quality.dictionary", "matryoshka"),
}
NAMES = tuple(_WHERE)


def contender(name: str) -> Trained:
    """The function of a contender; its library is imported now, whatever it prints swallowed."""
    os.environ.setdefault("WANDB_MODE", "disabled")
    os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")  # it fails on a CPU
    module, function = _WHERE[name]
    with contextlib.redirect_stdout(io.StringIO()):
        found: Trained = getattr(import_module(module), function)
    return found


def as_ours(
    W_enc: Tensor, W_dec: Tensor, b_enc: Tensor, b_dec: Tensor, k: int, mode: Mode
) -> FastSAE:
    """A peer's weights as they are applied to raw x by ``relu(x W_enc + b_enc)``.

    Args:
        W_enc: ``[d_in, d_sae]``; W_dec ``[d_sae, d_in]``.
    """
    d_in, d_sae = W_enc.shape
    sae = FastSAE(d_in, d_sae, k, mode, tied=False, dtype=torch.float32)
    with torch.no_grad():
        for name, value in zip(
            ("W_enc", "W_dec", "b_enc", "b_dec"), (W_enc, W_dec, b_enc, b_dec), strict=True
        ):
            getattr(sae, name).copy_(value)
    return sae


def less_b_dec(W_enc: Tensor, b_enc: Tensor, b_dec: Tensor) -> Tensor:
    """The encoder's bias for raw x, where a library encodes ``x - b_dec``."""
    return (b_enc.double() - b_dec.double() @ W_enc.double()).float()
