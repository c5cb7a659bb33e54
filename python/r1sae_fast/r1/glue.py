"""What stands between the products of a forward, in Rust: norms, rotary positions, routing, and
attention on the cache.

For inference on CPUs. In a small model, and in every step of a generation, these operations in
torch (half a dozen each, all of which read and write memory) take longer than the products do. The
torch code beside each call is the reference: it serves all other devices and dtypes, training and
torch.compile, and the tests compare the two.
"""

from __future__ import annotations

import torch
from torch import Tensor

from r1sae_fast import _core
from r1sae_fast.r1.fp8 import array

_DTYPES = (torch.float32, torch.bfloat16)


def serves(x: Tensor, *others: Tensor) -> bool:
    """Whether Rust may take these: contiguous plain tensors of one dtype, no gradients wanted."""
    return (
        type(x) is Tensor
        and x.device.type == "cpu"
        and x.dtype in _DTYPES
        and x.is_contiguous()
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and all(other.dtype == x.dtype and other.is_contiguous() for other in others)
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """:class:`r1sae_fast.r1.norm.RMSNorm` of ``x`` [..., width]."""
    output = torch.empty_like(x)
    width = x.shape[-1]
    rows, target = array(x.view(-1, width)), array(output.view(-1, width))
    _core.r1_rms_norm(rows, array(weight), eps, target, torch.get_num_threads())
    return output


def _table(rotary: Tensor, tokens: int) -> Tensor | None:
    """A rotary table [batch or 1, seq, pairs, 2] as rows that repeat over ``tokens`` tokens."""
    table = rotary.reshape(-1, 2 * rotary.shape[-2])
    return table if table.shape[0] and tokens % table.shape[0] == 0 else None


def rotate_(queries: Tensor, rotary: Tensor) -> bool:
    """Turns the end of every head of ``queries`` [batch, seq, heads, head], in place.

    ``rotary``: [batch or 1, seq, pairs, 2]. False if that was not possible.
    """
    table = _table(rotary, queries.shape[0] * queries.shape[1])
    if table is None or not serves(queries):
        return False
    flat = queries.view(-1, queries.shape[-2] * queries.shape[-1])
    _core.r1_rotate(array(flat), queries.shape[-1], array(table), torch.get_num_threads())
    return True


def latents_(rows: Tensor, weight: Tensor, eps: float, rotary: Tensor) -> bool:
    """Makes cache rows, in place, of what ``kv_a_proj_with_mqa`` gives [batch, seq, width]: the
    latent normalised, the rest turned. False if that was not possible."""
    table = _table(rotary, rows.shape[0] * rows.shape[1])
    if table is None or not serves(rows, weight):
        return False
    flat = array(rows.view(-1, rows.shape[-1]))
    _core.r1_latents(flat, array(weight), eps, array(table), torch.get_num_threads())
    return True


# With more heads torch's attention, which multiplies matrices, is the faster one, and in float32 at
# any number. Waking a second thread while torch's own still spin costs more than it saves on a
# small batch. (Measured, DESIGN.md.)
_FEW_HEADS = 8
_ATTENDED = (torch.bfloat16,)
_SMALL_BATCH = 64


def attend(
    rows: Tensor, absorbed: Tensor, query: Tensor, cache: Tensor, slots: Tensor, scale: float
) -> Tensor | None:
    """Writes new rows to the cache, and attends to it: the mixed latents [heads, tokens, rank].
    None, and nothing done, where torch does better or Rust cannot.

    Args:
        rows: [batch, new, width], of the cache.
        absorbed: [heads, batch * new, rank].
        query: [batch, new, heads, qk_head_dim]; the rotary part is its end.
        cache: [batch, capacity, width].
        slots: int64 [batch, new]; a token sees those up to its own.
    """
    heads, _, rank = absorbed.shape
    if heads * rows.shape[1] > _FEW_HEADS or rows.dtype not in _ATTENDED:
        return None
    if not slots.is_contiguous() or not serves(cache, rows, absorbed, query):
        return None
    output = torch.empty_like(absorbed)
    _core.r1_attend(
        array(rows.view(-1, rows.shape[-1])),
        array(absorbed.view(heads, -1)),
        array(query.view(slots.numel(), -1)),
        array(slots.view(-1)),
        array(cache.view(cache.shape[0], -1)),
        array(output.view(heads, -1)),
        rank,
        scale,
        1 if slots.numel() <= _SMALL_BATCH else torch.get_num_threads(),
    )
    return output


def route(
    logits: Tensor,
    bias: Tensor,
    *,
    groups: int,
    kept_groups: int,
    experts: int,
    normalise: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Each token's experts int64 and their weights float32, both [tokens, experts], of the
    router's logits float32 [tokens, count]."""
    chosen = torch.empty(logits.shape[0], experts, dtype=torch.int64)
    weights = torch.empty(logits.shape[0], experts, dtype=torch.float32)
    _core.r1_route(
        array(logits),
        array(bias),
        groups,
        kept_groups,
        normalise,
        scale,
        array(chosen),
        array(weights),
        torch.get_num_threads(),
    )
    return chosen, weights
