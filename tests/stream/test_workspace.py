"""The memory that the plan says a micro-batch takes, against what torch allocates for it."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from r1sae_fast.r1.blocks import Fp8Mode, empty_block, fill_block
from r1sae_fast.r1.checkpoint import write_checkpoint
from r1sae_fast.r1.config import R1Config
from r1sae_fast.r1.model import R1Model
from r1sae_fast.r1.rope import rotary_table
from r1sae_fast.r1.stream.workspace import workspace_bytes
from r1sae_fast.r1.weights import CheckpointReader

# R1's proportions at an eighth of its width.
CONFIG = R1Config(
    vocab_size=64,
    hidden_size=896,
    intermediate_size=2304,
    moe_intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=16,
    n_routed_experts=16,
    num_experts_per_tok=2,
    n_group=4,
    topk_group=2,
    first_k_dense_replace=1,
    q_lora_rank=192,
    kv_lora_rank=64,
)


class Allocated(TorchDispatchMode):
    """Counts the bytes of living storages that were made under it."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_iter(args) if isinstance(t, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in given | self._seen:
                    self._count(storage)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._seen.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)

        def gone() -> None:
            self.now -= size
            self._seen.discard(key)

        weakref.finalize(storage, gone)


@pytest.mark.parametrize("fp8", ["w8a8", "dequantize"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("index", [0, 1])
def test_covers_what_a_block_allocates(
    tmp_path: Any, fp8: Fp8Mode, dtype: torch.dtype, index: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    model = R1Model(CONFIG).requires_grad_(False)
    for parameter in model.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    write_checkpoint(tmp_path, CONFIG, model.state_dict())
    batch, seq = 3, 128
    with CheckpointReader(tmp_path) as reader, torch.no_grad():
        block = empty_block(reader, CONFIG, index, dtype=dtype, fp8=fp8, weight_cache="once")
        fill_block(reader, block, CONFIG, index)
        x = torch.randn(batch, seq, CONFIG.hidden_size, generator=generator).to(dtype)
        rotary = rotary_table(CONFIG, torch.arange(seq)[None])
        block(x, rotary)  # the dequantised weights are no workspace
        with Allocated() as allocated:
            block(x, rotary)
    expected = workspace_bytes(CONFIG, fp8, dtype.itemsize, batch * seq)
    own = x.nbytes
    assert allocated.peak + own <= expected
    # A plan that asks for far more than is needed refuses machines that would do.
    if index == 0:
        assert expected <= 3 * (allocated.peak + own)
