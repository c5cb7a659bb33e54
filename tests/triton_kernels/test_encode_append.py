"""Appending over a certified bound: encode_topk's codes, from the start where a list overflows."""

from __future__ import annotations

import pytest
import torch

from r1sae_fast.triton_kernels.encode_append import encode_append, encode_append_traffic
from r1sae_fast.triton_kernels.encode_topk import encode_topk_traffic

from .test_encode_topk import reference, whole_numbers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("rows", "d_sae", "k"), [(0, 40, 3), (5, 123, 7), (17, 160, 1), (3, 33, 33)]
)
@pytest.mark.usefixtures("grid_order")
def test_is_the_reference_to_the_index(
    dtype: torch.dtype, rows: int, d_sae: int, k: int, device: torch.device
) -> None:
    x, W_enc, b_enc = whole_numbers(rows, 30, d_sae, dtype, rows + k)
    found, redone = encode_append(x.to(device), W_enc.to(device), b_enc.to(device), k)
    assert not redone
    for mine, theirs in zip(found.compact(), reference(x, W_enc, b_enc, k), strict=True):
        assert torch.equal(mine.cpu(), theirs)


def test_overflow_starts_over(device: torch.device) -> None:
    """All values equal: every feature reaches the bound."""
    x, W_enc = torch.zeros(3, 16), torch.zeros(16, 100)
    b_enc = torch.ones(100)
    found, redone = encode_append(x.to(device), W_enc.to(device), b_enc.to(device), 5, capacity=32)
    assert redone
    assert found.indices.tolist() == [[0, 1, 2, 3, 4]] * 3
    roomy, redone = encode_append(x.to(device), W_enc.to(device), b_enc.to(device), 5, capacity=128)
    assert not redone
    assert torch.equal(roomy.indices, found.indices)


def test_no_room_for_k() -> None:
    x, W_enc, b_enc = whole_numbers(1, 16, 100, torch.float32, 0)
    for capacity in (4, 24):
        with pytest.raises(ValueError, match=f"capacity is {capacity}; expected a power of two"):
            encode_append(x, W_enc, b_enc, 5, capacity=capacity)


@pytest.mark.usefixtures("guarded", "grid_order")
def test_writes_all_of_its_output_and_nothing_else(device: torch.device) -> None:
    x, W_enc, b_enc = whole_numbers(20, 40, 123, torch.float32, 1)
    found, _ = encode_append(x.to(device), W_enc.to(device), b_enc.to(device), 9)
    for mine, theirs in zip(found.compact(), reference(x, W_enc, b_enc, 9), strict=True):
        assert torch.equal(mine.cpu(), theirs)


def test_traffic_has_no_scratch_of_pre_activations() -> None:
    shape = (4096, 7168, 28672, 64)
    appended, scratched = encode_append_traffic(*shape), encode_topk_traffic(*shape)
    assert appended.hbm_written < scratched.hbm_written / 4
    assert appended.flops < 1.07 * scratched.flops
