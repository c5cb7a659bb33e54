"""Prefill with a tap beside transformers' forward with output_hidden_states, the same weights.

At layer 2 of 0 to 3 the tap stops one block early, which is part of what a user gains; at layer 3
all blocks are run by both.
"""

import pytest
import torch


@pytest.mark.parametrize("layer", [2, 3])
@pytest.mark.parametrize(
    "sizes", [(16, 256), (1, 512)], ids=lambda sizes: "x".join(map(str, sizes))
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@torch.no_grad()
def test_prefill_with_a_tap(versus, generator, tiny_pair, dtype, sizes, layer) -> None:
    engine, twin = tiny_pair(dtype)
    tokens = torch.randint(3, engine.vocab_size, sizes, generator=generator)

    def theirs() -> torch.Tensor:
        return twin(tokens, output_hidden_states=True, use_cache=False).hidden_states[layer + 1]

    found, expected = engine.residuals(tokens, layer).float(), theirs().float()
    if layer == engine.num_layers - 1:  # transformers' last hidden state is normalised
        found = engine.model.norm(found.to(dtype)).float()
    error = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert float(error.median()) < (1e-4 if dtype == torch.float32 else 0.05)
    versus(
        f"TinyR1 prefill {sizes[0]} x {sizes[1]}, tap at layer {layer}, {dtype}",
        ours=lambda: engine.residuals(tokens, layer),
        torch=theirs,
        work=(tokens.numel(), "tokens"),
    )
