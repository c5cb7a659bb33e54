"""r1sae-fast's trainer with its defaults."""

from __future__ import annotations

from typing import Any

from quality.data import Task
from r1sae_fast import FastSAE
from r1sae_fast.train import TrainConfig, train


def batch_topk(task: Task, lr: float | None) -> FastSAE:
    """BatchTopK (arXiv:2412.06410)."""
    return _train(task, lr, "batch_topk")


def sparse_adam(task: Task, lr: float | None) -> FastSAE:
    """BatchTopK with rows that have no codes left as they are."""
    return _train(task, lr, "batch_topk", adam="sparse")


def topk(task: Task, lr: float | None) -> FastSAE:
    """TopK (arXiv:2406.04093)."""
    return _train(task, lr, "topk")


def matryoshka(task: Task, lr: float | None) -> FastSAE:
    """Matryoshka BatchTopK (arXiv:2503.17547)."""
    return _train(task, lr, "matryoshka")


def _train(task: Task, lr: float | None, mode: str, **others: Any) -> FastSAE:
    config = TrainConfig(
        task.d_sae,
        task.k,
        mode,
        tokens=task.tokens,
        batch_size=task.batch_size,
        learning_rate=lr,
        seed=task.seed,
        **others,
    )
    return train(task.shards, task.folder / "run", config)
