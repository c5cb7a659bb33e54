"""dictionary_learning's ``trainSAE`` with its BatchTopK trainers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
from dictionary_learning.training import trainSAE
from torch import Tensor

from quality.contenders import as_ours, less_b_dec
from quality.data import Batches, Task
from r1sae_fast import FastSAE


def batch_topk(task: Task, lr: float | None) -> FastSAE:
    """BatchTopK; activations normalised, as its authors advise."""
    state = _train(task, lr, BatchTopKTrainer, {})
    return _converted(
        task, state["encoder.weight"].T, state["encoder.bias"], state["decoder.weight"].T, state
    )


def matryoshka(task: Task, lr: float | None) -> FastSAE:
    """Matryoshka BatchTopK with the prefixes of ours."""
    fractions = {"group_fractions": [1 / 16, 1 / 16, 1 / 8, 1 / 4, 1 / 2]}
    state = _train(task, lr, MatryoshkaBatchTopKTrainer, fractions)
    return _converted(task, state["W_enc"], state["b_enc"], state["W_dec"], state)


def _train(
    task: Task, lr: float | None, trainer: Any, further: dict[str, Any]
) -> dict[str, Tensor]:
    class Trainer(trainer):  # type: ignore[misc]  # its package has no types
        """Its 10 million tokens until a feature is dead are more than the run has."""

        def __init__(self, **settings: Any) -> None:
            super().__init__(**settings)
            self.dead_feature_threshold = task.tokens // 10

    save = task.folder / "dictionary_learning"
    trainSAE(
        Batches(task),
        [
            {
                "trainer": Trainer,
                "steps": task.steps,
                "activation_dim": task.d_in,
                "dict_size": task.d_sae,
                "k": task.k,
                "layer": 0,
                "lm_name": "tiny-r1",
                "lr": lr,
                "warmup_steps": task.steps // 20,
                "decay_start": task.steps * 4 // 5,
                "threshold_start_step": task.steps // 20,
                "seed": task.seed,
                "device": "cpu",
                **further,
            }
        ],
        steps=task.steps,
        save_dir=str(save),
        normalize_activations=True,
        device="cpu",
    )
    weights: dict[str, Tensor] = torch.load(Path(save) / "trainer_0" / "ae.pt", weights_only=True)
    return weights


def _converted(
    task: Task, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, state: dict[str, Tensor]
) -> FastSAE:
    b_dec = state["b_dec"]
    bias = less_b_dec(W_enc, b_enc, b_dec)
    sae = as_ours(W_enc, W_dec, bias, b_dec, task.k, "batch_topk")
    sae.threshold = state["threshold"].float()
    return sae
