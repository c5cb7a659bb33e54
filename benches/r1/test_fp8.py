"""R1's fp8 codec: weights in blocks and activations in groups, beside plain torch."""

import pytest
import torch

from r1sae_fast.r1.act_quant import (
    fake_quantize_activations,
    fake_quantize_activations_reference,
)
from r1sae_fast.r1.fp8 import (
    dequantize_blocks,
    dequantize_blocks_reference,
    quantize_blocks,
    quantize_blocks_reference,
)

ROWS = {"small": 1024, "r1": 7168}


@pytest.fixture
def weight(shape, generator) -> torch.Tensor:
    return torch.randn(ROWS[shape.name], 2 * ROWS[shape.name], generator=generator).bfloat16()


def test_quantize_blocks(versus, weight) -> None:
    ours, reference = quantize_blocks(weight), quantize_blocks_reference(weight)
    assert torch.equal(ours[0].view(torch.uint8), reference[0].view(torch.uint8))
    assert torch.equal(ours[1], reference[1])
    versus(
        f"a weight to block fp8, {tuple(weight.shape)}",
        ours=lambda: quantize_blocks(weight),
        torch=lambda: quantize_blocks_reference(weight),
        work=(weight.numel(), "weights"),
    )


def test_dequantize_blocks(versus, weight) -> None:
    quantised = quantize_blocks(weight)
    arguments = (*quantised, torch.bfloat16)
    assert torch.equal(dequantize_blocks(*arguments), dequantize_blocks_reference(*arguments))
    versus(
        f"a weight from block fp8, {tuple(weight.shape)}",
        ours=lambda: dequantize_blocks(*arguments),
        torch=lambda: dequantize_blocks_reference(*arguments),
        work=(weight.numel(), "weights"),
    )


def test_activations(versus, shape, generator) -> None:
    x = torch.randn(shape.rows, ROWS[shape.name], generator=generator).bfloat16()
    assert torch.equal(fake_quantize_activations(x), fake_quantize_activations_reference(x))
    versus(
        f"activations to fp8 and back, {tuple(x.shape)}",
        ours=lambda: fake_quantize_activations(x),
        torch=lambda: fake_quantize_activations_reference(x),
        work=(x.numel(), "numbers"),
    )
