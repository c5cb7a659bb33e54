"""SAELens' ``SAETrainer`` with its BatchTopK training SAEs."""

from __future__ import annotations

from typing import Any

import torch
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.matryoshka_batchtopk_sae import (
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
)
from sae_lens.training.sae_trainer import SAETrainer

from quality.contenders import as_ours, less_b_dec
from quality.data import Batches, Task
from r1sae_fast import FastSAE

_NORM_BATCHES = 16


def batch_topk(task: Task, lr: float | None) -> FastSAE:
    """BatchTopK; activations scaled to a mean norm, as its authors do."""
    return _train(task, lr, BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, {})


def matryoshka(task: Task, lr: float | None) -> FastSAE:
    """Matryoshka BatchTopK with the prefixes of ours."""
    widths = {"matryoshka_widths": [task.d_sae // part for part in (16, 8, 4, 2, 1)]}
    made = MatryoshkaBatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAEConfig
    return _train(task, lr, *made, widths)


def _train(
    task: Task, lr: float | None, kind: Any, settings: Any, further: dict[str, Any]
) -> FastSAE:
    torch.manual_seed(task.seed)
    sae = kind(
        settings(
            d_in=task.d_in,
            d_sae=task.d_sae,
            k=task.k,
            dtype="float32",
            device="cpu",
            normalize_activations="expected_average_only_in",
            topk_threshold_lr=1.0 / max(10, task.steps // 20),
            **further,
        )
    )
    trainer: Any = SAETrainer(
        cfg=SAETrainerConfig(
            total_training_samples=task.tokens,
            train_batch_size_samples=task.batch_size,
            lr=3e-4 if lr is None else lr,
            lr_end=(3e-4 if lr is None else lr) / 10,
            lr_warm_up_steps=max(2, task.steps // 20),
            lr_decay_steps=task.steps // 5,
            dead_feature_window=task.steps // 10,
            n_batches_for_norm_estimate=_NORM_BATCHES,
            logger=LoggingConfig(log_to_wandb=False),
        ),
        sae=sae,
        data_provider=iter(Batches(task)),
    )
    # From batches that are then trained on, too, rather than from the first thousand of the run.
    trainer.activation_scaler.estimate_scaling_factor(task.d_in, iter(Batches(task)), _NORM_BATCHES)
    trainer.fit()
    with torch.no_grad():
        W_enc, W_dec, b_enc, b_dec = sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec
        if sae.cfg.rescale_acts_by_decoder_norm:
            norms = W_dec.norm(dim=-1)
            W_enc, b_enc, W_dec = W_enc * norms, b_enc * norms, W_dec / norms[:, None]
        if sae.cfg.apply_b_dec_to_input:
            b_enc = less_b_dec(W_enc, b_enc, b_dec)
        made = as_ours(W_enc, W_dec, b_enc, b_dec, task.k, "batch_topk")
    made.threshold = sae.topk_threshold.float()
    return made
