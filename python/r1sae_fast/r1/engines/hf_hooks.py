"""Taps in a transformers model: forward hooks on its decoder blocks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from r1sae_fast.r1.taps.run import BlockTaps, TapRun

# What models call their parts; the first that is there counts.
_BLOCKS = ("layers", "h", "blocks")
_PARTS = {
    "self_attn": ("self_attn", "self_attention", "attention", "attn"),
    "mlp": ("mlp", "feed_forward", "block_sparse_moe", "moe", "ffn"),
}


class StoppedAfterBlock(Exception):  # a way out, not an error
    """Leaves a forward once the last block that is needed has run; ``value`` is its output."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value


def find_blocks(decoder: nn.Module) -> nn.ModuleList:
    """The decoder's list of blocks.

    Raises:
        ValueError: it has none under a known name.
    """
    for name in _BLOCKS:
        blocks = getattr(decoder, name, None)
        if isinstance(blocks, nn.ModuleList):
            return blocks
    raise ValueError(
        f"{type(decoder).__name__} has no list of blocks called {', '.join(_BLOCKS)}; this engine "
        "knows decoders such as Qwen2, Llama, Mistral or DeepSeek-V3"
    )


def _part(block: nn.Module, place: str) -> nn.Module:
    for name in _PARTS[place]:
        part = getattr(block, name, None)
        if isinstance(part, nn.Module):
            return part
    raise ValueError(
        f"{type(block).__name__} has no part called {', '.join(_PARTS[place])}, which a tap at "
        f"{place!r} needs; tap the block's input or output"
    )


def _first(output: Any) -> Tensor:
    """The hidden states of a module's output, which may be a tuple that begins with them."""
    value = output[0] if isinstance(output, tuple) else output
    assert isinstance(value, Tensor)
    return value


def _replaced(output: Any, value: Tensor) -> Any:
    return (value, *output[1:]) if isinstance(output, tuple) else value


@contextlib.contextmanager
def hooked(
    blocks: nn.ModuleList, taps: TapRun | None, stop_after: int | None = None
) -> Iterator[None]:
    """Hooks for the taps within a ``with`` block; nothing stays on the model after it.

    ``stop_after``: raise :class:`StoppedAfterBlock` from that block's output, edits included.
    """
    with contextlib.ExitStack() as stack:
        for layer in taps.layers if taps is not None else ():
            assert taps is not None
            tap = taps.at(layer)
            if tap is not None and layer < len(blocks):
                _hook(stack, blocks[layer], tap)
        if stop_after is not None:

            def stop(_module: nn.Module, _args: Any, output: Any) -> None:
                raise StoppedAfterBlock(_first(output))

            stack.callback(blocks[stop_after].register_forward_hook(stop).remove)
        yield


def _hook(stack: contextlib.ExitStack, block: nn.Module, tap: BlockTaps) -> None:
    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (tap("input", args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": tap("input", kwargs["hidden_states"])}

    if tap.has("input"):
        handle = block.register_forward_pre_hook(before, with_kwargs=True)
        stack.callback(handle.remove)
    for place in ("self_attn", "mlp", "output"):
        if tap.has(place):
            module = block if place == "output" else _part(block, place)

            def after(_module: nn.Module, _args: Any, output: Any, place: str = place) -> Any:
                value = _first(output)
                changed = tap(place, value)
                return output if changed is value else _replaced(output, changed)

            stack.callback(module.register_forward_hook(after).remove)
