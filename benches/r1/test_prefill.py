"""Prefill with a tap beside transformers' forward with output_hidden_states, the same weights.

At layer 2 of 0 to 3 the tap stops one block early, which is part of what a user gains; at layer 3
all blocks are run by both.
"""

import pytest
import torch


def error_of(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The median over tokens, relative to the expected vectors' lengths."""
    return float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).median())


@pytest.mark.parametrize("layer", [2, 3])
@pytest.mark.parametrize("size", [(16, 256), (1, 512)], ids=lambda size: "x".join(map(str, size)))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@torch.no_grad()
def test_prefill_with_a_tap(versus, generator, tiny_pair, dtype, size, layer) -> None:
    engine, twin = tiny_pair(dtype)
    tokens = torch.randint(3, engine.vocab_size, size, generator=generator)

    def theirs() -> torch.Tensor:
        return twin(tokens, output_hidden_states=True, use_cache=False).hidden_states[layer + 1]

    def normed(residual: torch.Tensor) -> torch.Tensor:
        # transformers' last hidden state is normalised
        last = layer == engine.num_layers - 1
        return (engine.model.norm(residual) if last else residual).float()

    found, expected = normed(engine.residuals(tokens, layer)), theirs().float()
    if dtype == torch.float32:
        assert error_of(found, expected) < 1e-4
    else:
        # Rounding to bf16 sends some tokens to other experts: judged by the float32 truth.
        _, exact_twin = tiny_pair(torch.float32)
        states = exact_twin(tokens, output_hidden_states=True, use_cache=False).hidden_states
        truth = states[layer + 1]
        assert error_of(found, truth) < 1.5 * error_of(expected, truth)
    versus(
        f"TinyR1 prefill {size[0]} x {size[1]}, tap at layer {layer}, {dtype}",
        ours=lambda: engine.residuals(tokens, layer),
        torch=theirs,
        work=(tokens.numel(), "tokens"),
    )
