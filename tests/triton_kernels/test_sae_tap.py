"""The tap: encode_topk's codes, a residual steered by the formula, rows that are off untouched."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from r1sae_fast.ops import tap as ops_tap
from r1sae_fast.triton_kernels.encode_topk import encode_topk
from r1sae_fast.triton_kernels.launch import recording
from r1sae_fast.triton_kernels.sae_tap import ADD, SET, SaeTap, run_tap, sae_tap_traffic

from .test_encode_topk import whole_numbers

ROWS, D_IN, D_SAE, K = 5, 40, 123, 7


def parts(dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, ...]:
    x, W_enc, b_enc = whole_numbers(ROWS, D_IN, D_SAE, dtype, 4)
    generator = torch.Generator().manual_seed(0)
    W_dec = torch.randn(D_SAE, D_IN, generator=generator).to(dtype)
    return tuple(t.to(device) for t in (x, W_enc, b_enc, W_dec))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("limit", [None, 9.0])
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
    tap.features[3] = torch.tensor([D_SAE, 2**30])  # no such features: no entries
    tap.strengths[3] = 100.0
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
    with pytest.raises(ValueError, match="not contiguous"):
        tap(torch.ones(D_IN, 2, device=device).T)
    with pytest.raises(ValueError, match=r"is torch\.float16 on .*; expected torch\.float32"):
        tap(x[:2].half())


class Dispatched(TorchDispatchMode):
    """Lists every torch operation below the one that was called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]  # torch's own
        self.names.add(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("k", [0, 64, 200])
@pytest.mark.parametrize("limit", [False, True])
def test_a_call_allocates_nothing_and_waits_for_nothing(k: int, limit: bool) -> None:
    """All that a CUDA graph may hold: views of what is there, and launches. On tensors without data
    a launcher that looked at one would fail."""
    bf16 = torch.bfloat16

    def meta(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=bf16, device="meta")

    threshold = torch.empty(1, device="meta") if limit else None
    with recording("sm_90") as launches:
        weight = meta(28672, 7168)
        tap = SaeTap(weight.T, meta(28672), weight, k, 2048, entries=4, threshold=threshold)
        x = meta(2000, 7168)
        with Dispatched() as dispatched:
            tap(x)
    views = {"aten.slice.Tensor"} | ({"aten.zero_.default"} if k == 0 else set())
    assert dispatched.names <= views
    names = [launch.name for launch in launches]
    chunk = ["encode_gemm_kernel", *(["select_topk_kernel"] if k else [])]
    assert names == [*chunk, *chunk, "sae_tap_kernel", "trim_kernel"]


def test_on_cuda_it_is_one_operation() -> None:
    with FakeTensorMode():
        weight = torch.empty(64, 32, device="cuda")
        tap = SaeTap(weight.T, None, weight, 4, 8)
        x = torch.empty(5, 32, device="cuda")
        with Dispatched() as dispatched:
            codes = tap(x)
    assert "r1sae_fast.sae_tap.default" in dispatched.names
    assert not [name for name in dispatched.names if "mm" in name or "empty" in name]
    assert tuple(codes.values.shape) == (5, 4)


@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float32, None), (torch.bfloat16, 9.0)], ids=str
)
def test_the_operation_is_the_kernels(
    dtype: torch.dtype, limit: float | None, device: torch.device
) -> None:
    """Whole numbers: to the bit."""
    x, W_enc, b_enc, W_dec = parts(dtype, device)
    W_dec = W_dec.round()
    threshold = None if limit is None else torch.tensor([limit], device=device)
    outcomes = []
    for run in (run_tap, ops_tap.tap_reference):
        tap = SaeTap(W_enc, b_enc, W_dec, K, ROWS, entries=3, threshold=threshold)
        tap.active[1] = 0
        tap.features[:, 0], tap.strengths[:, 0], tap.kinds[:, 0] = 5, 2.0, SET
        tap.features[3, 2], tap.strengths[3, 2], tap.kinds[3, 2] = 7, -3.0, ADD
        codes, room = tap.codes, tap.chunk
        run(
            x, W_enc, b_enc, W_dec, threshold, tap.active, tap.features, tap.strengths, tap.kinds,
            K, True, codes.values, codes.indices, codes.counts, tap.output, room.scratch,
            room.maxima, tap.keys, room.bad_row, room.group,
        )  # fmt: skip
        outcomes.append((codes.values, codes.indices, codes.counts, tap.output))
    for mine, theirs in zip(*outcomes, strict=True):
        assert torch.equal(mine, theirs)


def test_opcheck() -> None:
    x, W_enc, b_enc, W_dec = parts(torch.float32, torch.device("cpu"))
    tap = SaeTap(W_enc, b_enc, W_dec, K, ROWS, entries=2)
    codes, room = tap.codes, tap.chunk
    for buffer in (codes.values, codes.indices, codes.counts, tap.output, room.scratch, room.maxima,
                   tap.keys):  # fmt: skip
        buffer.zero_()
    arguments = (
        x, W_enc, b_enc, W_dec, None, tap.active, tap.features, tap.strengths, tap.kinds,
        K, True, codes.values, codes.indices, codes.counts, tap.output, room.scratch,
        room.maxima, tap.keys, room.bad_row, room.group,
    )  # fmt: skip
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.r1sae_fast.sae_tap.default, arguments, test_utils=checks)


def test_traffic() -> None:
    traffic = sae_tap_traffic(2048, 7168, 28672, 64)
    # Beside the encoder's own, the residual once in and once out.
    from r1sae_fast.triton_kernels.encode_topk import encode_topk_traffic

    own = traffic.hbm - encode_topk_traffic(2048, 7168, 28672, 64).hbm
    assert own < 1.1 * 2 * 2048 * 7168 * 2
