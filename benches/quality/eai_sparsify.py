"""sparsify's ``Trainer`` with its default, schedule-free signum; TopK, as it has no BatchTopK."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from sparsify.config import SparseCoderConfig, TrainConfig
from sparsify.sparse_coder import SparseCoder
from sparsify.trainer import Trainer
from torch import Tensor, nn

from quality.contenders import as_ours, less_b_dec
from quality.data import Batches, Task
from r1sae_fast import FastSAE


def topk(task: Task, lr: float | None) -> FastSAE:
    """TopK with the auxiliary loss of the paper (its README's advice where latents die)."""
    torch.manual_seed(task.seed)
    model = _Residuals(task)
    config = TrainConfig(
        SparseCoderConfig(num_latents=task.d_sae, k=task.k),
        batch_size=1,
        lr=lr,
        auxk_alpha=1 / 32,
        dead_feature_threshold=task.tokens // 10,
        hookpoints=["residual"],
        init_seeds=[task.seed],
        save_every=10 * task.steps,
        log_to_wandb=False,
        save_dir=str(task.folder),
        run_name="sparsify",
    )
    trainer = Trainer(config, _Steps(task, model), model)  # type: ignore[arg-type]  # as far as it looks
    trainer.fit()
    # What it saved is the average that its optimizer keeps; the module has the moving weights.
    coder: Any = SparseCoder.load_from_disk(task.folder / "sparsify" / "residual")
    with torch.no_grad():
        W_enc, W_dec, b_dec = coder.encoder.weight.T, coder.W_dec, coder.b_dec
        # It scales rows to norm 1 before each step, not after the last.
        W_dec = W_dec / W_dec.norm(dim=1, keepdim=True)
        bias = less_b_dec(W_enc, coder.encoder.bias, b_dec)
        return as_ours(W_enc, W_dec, bias, b_dec, task.k, "topk")


class _Residuals(nn.Module):
    """A model whose one module puts out the next rows."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.residual = nn.Identity()
        self.rows = torch.zeros(1, task.d_in)
        self.device = torch.device("cpu")

    @property
    def base_model(self) -> nn.Module:
        return self

    @property
    def dummy_inputs(self) -> dict[str, Tensor]:
        return {"input_ids": torch.zeros(1, 1, dtype=torch.long)}

    def forward(self, input_ids: Tensor) -> Tensor:
        del input_ids
        rows: Tensor = self.residual(self.rows[None])
        return rows


class _Steps:
    """A dataset whose entries are steps: the ids of rows, which it lays before the model."""

    def __init__(self, task: Task, model: _Residuals) -> None:
        self._steps, self._model = task.steps, model
        self._batches: Iterator[Tensor] = iter(Batches(task))

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        if step >= self._steps:
            raise IndexError(step)
        self._model.rows = next(self._batches)
        return {"input_ids": torch.arange(len(self._model.rows))}
