"""The tap: encode_topk's codes, a residual steered by the formula, rows that are off untouched."""

from __future__ import annotations

import pytest
import torch

from r1sae_fast.triton_kernels.encode_topk import encode_topk
from r1sae_fast.triton_kernels.launch import recording
from r1sae_fast.triton_kernels.sae_tap import ADD, SET, SaeTap, sae_tap_traffic

from .test_encode_topk import whole_numbers

ROWS, D_IN, D_SAE, K = 5, 40, 123, 7


def parts(dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, ...]:
    x, W_enc, b_enc = whole_numbers(ROWS, D_IN, D_SAE, dtype, 4)
    generator = torch.Generator().manual_seed(0)
    W_dec = torch.randn(D_SAE, D_IN, generator=generator).to(dtype)
    return tuple(t.to(device) for t in (x, W_enc, b_enc, W_dec))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("limit", [None, 9.0])
@pytest.mark.usefixtures("grid_order")
def test_codes_and_steering(dtype: torch.dtype, limit: float | None, device: torch.device) -> None:
    x, W_enc, b_enc, W_dec = parts(dtype, device)
    threshold = None if limit is None else torch.tensor([limit], device=device)
    tap = SaeTap(W_enc, b_enc, W_dec, K, ROWS + 3, entries=2, threshold=threshold)
    expected = encode_topk(x, W_enc, b_enc, K)
    values = expected.values.float()
    if limit is not None:
        values = torch.where(values > limit, values, 0.0)
    strongest = expected.indices[:, 0]
    tap.active[1] = 0
    tap.features[0] = torch.stack([strongest[0], torch.tensor(3, device=device)])
    tap.strengths[0] = torch.tensor([2.5, -4.0])
    tap.kinds[0] = torch.tensor([SET, ADD], dtype=torch.int8)
    tap.features[1, 0] = 5  # off: must not show
    tap.strengths[1, 0] = 100.0
    tap.features[2, 1] = strongest[2]  # set to what it is
    tap.strengths[2, 1] = values[2, 0]
    found = tap(x)

    values[1] = 0
    assert torch.equal(found.values.float(), values)
    assert torch.equal(found.counts.long(), (values > 0).sum(1))
    kept = values > 0
    assert torch.equal(found.indices[kept], expected.indices[kept])
    assert not found.indices[~kept].any()

    truth = x.double().clone()
    present = float(values[0, 0])
    truth[0] += (2.5 - present) * W_dec[int(strongest[0])].double() - 4.0 * W_dec[3].double()
    steered = tap.output[:ROWS].double()
    bound = torch.finfo(dtype).eps * (truth[0].abs() + 20 * W_dec[3].abs().double() + 20)
    assert bool(((steered[0] - truth[0]).abs() <= bound).all())
    assert torch.equal(steered[1:], x.double()[1:])


def test_without_steering_nothing_is_written(device: torch.device) -> None:
    x, W_enc, b_enc, W_dec = parts(torch.float32, device)
    tap = SaeTap(W_enc, b_enc, W_dec, K, ROWS)
    tap.output.fill_(-1)
    tap(x, steer=False)
    assert bool((tap.output == -1).all())


def test_shapes_that_do_not_fit(device: torch.device) -> None:
    x, W_enc, b_enc, W_dec = parts(torch.float32, device)
    with pytest.raises(ValueError, match=r"expected \(123, 40\), contiguous"):
        SaeTap(W_enc, b_enc, W_dec.T, K, ROWS)
    tap = SaeTap(W_enc, b_enc, W_dec, K, ROWS - 1)
    with pytest.raises(ValueError, match="at most 4 rows of 40"):
        tap(x)


def test_a_call_allocates_nothing_and_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """On tensors without data a launcher that looked at one would fail; buffers stay the same."""
    bf16 = torch.bfloat16

    def meta(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=bf16, device="meta")

    with recording("sm_90") as launches:
        tap = SaeTap(meta(28672, 7168).T, meta(28672), meta(28672, 7168), 64, 2048, entries=4)
        x = meta(2000, 7168)
        for name in ("new_empty", "new_zeros", "new_ones", "new_full"):
            monkeypatch.setattr(torch.Tensor, name, None)
        tap(x)
    names = [launch.name for launch in launches]
    chunk = ["encode_gemm_kernel", "select_topk_kernel"]
    assert names == [*chunk, *chunk, "sae_tap_kernel", "trim_kernel"]


def test_traffic() -> None:
    traffic = sae_tap_traffic(2048, 7168, 28672, 64)
    # Beside the encoder's own, the residual once in and once out.
    from r1sae_fast.triton_kernels.encode_topk import encode_topk_traffic

    own = traffic.hbm - encode_topk_traffic(2048, 7168, 28672, 64).hbm
    assert own < 1.1 * 2 * 2048 * 7168 * 2
