"""FastSAE, screens and a training step on the operations' CUDA functions, here interpreted.

The functions stand in for the CPU's, and the package is told that the tensors lie on a GPU: all
between the public call and the kernel is what a GPU's user gets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from r1sae_fast import FastSAE, ops
from r1sae_fast.errors import NonFiniteError
from r1sae_fast.ops import _cuda, _device, choice
from r1sae_fast.train import TrainConfig
from r1sae_fast.train.step import Learner

from .conftest import ON_GPU
from .test_encode_topk import whole_numbers

D_IN, D_SAE, K = 24, 70, 5


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the CUDA functions called."""
    names: list[str] = []

    def listed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            names.append(name)
            return function(*arguments)

        return call

    library = torch.library.Library("r1sae_fast", "IMPL")
    key = "CUDA" if ON_GPU else "CPU"
    for name, function in _cuda.KERNELS.items():
        library.impl(name, listed(name, function), key, allow_override=True)
    if not ON_GPU:
        monkeypatch.setattr(_device, "on_gpu", lambda tensor: True)
    monkeypatch.setattr(choice, "_FEWEST_OF_ALL", 1)
    yield names
    library._destroy()


def sae_and_x(mode: str, dtype: torch.dtype, device: torch.device) -> tuple[FastSAE, torch.Tensor]:
    """Whole numbers, so that no order of adding shows."""
    x, W_enc, b_enc = whole_numbers(6, D_IN, D_SAE, dtype, 0)
    sae = FastSAE(D_IN, D_SAE, K, mode, dtype=dtype, device=device)  # type: ignore[arg-type]  # a mode
    with torch.no_grad():
        sae.W_enc.copy_(W_enc)
        sae.b_enc.copy_(b_enc)
        sae.b_dec.fill_(0.5)
        sae.threshold.fill_(3.0)
        sae.W_dec.copy_(W_enc.T)
    return sae, x.to(device)


def outcome(sae: FastSAE, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Reconstruction, codes and gradients."""
    x = x.clone().requires_grad_()
    reconstruction, codes = sae(x)
    (reconstruction * (1 + x.detach())).float().sum().backward()
    gradients = [x.grad, *(p.grad for p in sae.parameters())]
    sae.zero_grad()
    dense = codes.to_dense()
    return tuple(t.detach().float().cpu() for t in (reconstruction, dense, *gradients))  # type: ignore[union-attr]  # all have one


@pytest.mark.parametrize(
    ("dtype", "screen"),
    [(torch.float32, "int8"), (torch.float32, "none"), (torch.bfloat16, "none")],
    ids=str,
)
@pytest.mark.parametrize("mode", ["topk", "batch_topk", "threshold"])
def test_an_sae_is_the_cpus(
    mode: str, dtype: torch.dtype, screen: str, device: torch.device, request: Any
) -> None:
    sae, x = sae_and_x(mode, dtype, torch.device("cpu"))
    sae.screen = "none"
    expected = outcome(sae, x)
    called = request.getfixturevalue("called")
    own, x = sae_and_x(mode, dtype, device)
    own.screen = screen  # type: ignore[assignment]  # a kind
    found = outcome(own, x)
    for mine, theirs in zip(found, expected, strict=True):
        tolerance = 8 * torch.finfo(dtype).eps
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance * 20)
    assert torch.equal(found[1], expected[1])
    encode = ["int8_weights", "int8_encode"] if screen == "int8" else [f"encode_{mode}"]
    assert called[: len(encode) + 1] == [*encode, "decode"]
    assert {"sums_by_feature", "decode_gradient_of_values"} <= set(called)
    report = own.explain()
    assert (report.kind, report.kernel) == (screen, "triton")
    if screen == "int8":
        assert (report.rows, report.violations) == (6, 0)
        assert 0 < report.candidates <= 6 * 2 * D_SAE
        assert report.bytes == D_SAE * (D_IN + 8)


def test_a_screen_follows_its_weights(called: list[str], device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    x, W = (torch.randn(n, D_IN, generator=generator).to(device) for n in (3, D_SAE))
    b = torch.zeros(D_SAE, device=device)
    screen = ops.Screen(W, b)
    assert (screen.kind, screen.explain().kernel) == ("int8", "triton")
    with torch.no_grad():
        screen.topk(x, K)
        W[7] = 100 * x[1]
        assert int(screen.topk(x, K).indices[K]) == 7
        assert called.count("int8_weights") == 2
        W[9] = 200 * x[1]
        screen.refresh(torch.tensor([9]))
        assert int(screen.topk(x, K).indices[K]) == 9
        with pytest.raises(ValueError, match="row is out of range; expected 0 to 69"):
            screen.refresh(torch.tensor([D_SAE]))
        W[3] = torch.nan
        assert screen.topk(x, K, check_finite=False).nnz
        assert called[-1] == "encode_topk"  # which knows what to do with NaN
    with pytest.raises(ValueError, match=r"they are torch\.bfloat16, whose products are as fast"):
        ops.Screen(W.bfloat16(), b.bfloat16(), "int8")


@pytest.mark.usefixtures("called")
def test_a_screen_made_in_inference_mode_goes_on_outside(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    x, W = (torch.randn(n, D_IN, generator=generator).to(device) for n in (3, D_SAE))
    screen = ops.Screen(W, torch.zeros(D_SAE, device=device))
    with torch.inference_mode():
        inside = screen.topk(x, K)
    with torch.no_grad():
        assert torch.equal(screen.topk(x, K).indices, inside.indices)
        W[9] = 200 * x[1]
        with torch.inference_mode():
            rows = torch.tensor([9])
        screen.refresh(rows)
        assert int(screen.topk(x, K).indices[K]) == 9
    assert screen.explain().rows == 9


@pytest.mark.filterwarnings("ignore:invalid value")  # numpy, in the interpreter
@pytest.mark.parametrize("screen", ["int8", "none"])
def test_a_bad_row_is_named(called: list[str], screen: str, device: torch.device) -> None:
    sae, x = sae_and_x("topk", torch.float32, device)
    sae.screen = screen  # type: ignore[assignment]  # a kind
    x[4, 2] = torch.nan
    with pytest.raises(NonFiniteError, match="x holds a NaN or infinite value in row 4"):
        sae.encode_sparse(x)
    sae.check_finite = False
    assert sae.encode_sparse(x).counts[4] == 0


@pytest.mark.parametrize("k", [3, 600])
def test_any_k(k: int, called: list[str], device: torch.device) -> None:
    """Beyond 512 another kernel selects."""
    x, W_enc, b_enc = (t.to(device) for t in whole_numbers(2, 8, 700, torch.float32, 1))
    found = ops.encode_topk(x, W_enc.T, b_enc, k)
    expected = ops.topk(x @ W_enc + b_enc, k)
    for name in ("values", "indices", "row_offsets"):
        assert torch.equal(getattr(found, name), getattr(expected, name))
    assert called == ["encode_topk"]


@pytest.mark.parametrize("tied", [False, True])
def test_a_training_step_is_plain_torchs(
    tied: bool, called: list[str], device: torch.device
) -> None:
    """The auxiliary loss over dead features included."""
    config = TrainConfig(d_sae=D_SAE, k=K, tied=tied, aux_k=6, dead_after_tokens=9)
    x = torch.randn(12, D_IN, generator=torch.Generator().manual_seed(1)).to(device)
    steps = []
    for by_kernels in (True, False):
        step = Learner(config, D_IN, device, in_factors=False, by_kernels=by_kernels)
        step.parameters["b_enc"][7:60] = -3.0
        step.unfired_tokens[7:60] = 9
        figures = step.step(x, 1e-2)
        assert figures.dead > 20
        assert float(figures.aux_loss) > 0
        if by_kernels:
            for name in ("int8_encode", "decode", "code_gradients", "encode_topk"):
                assert name in called
            called.clear()
        steps.append(step)
    # The truth called none but the decoding of nothing.
    assert "code_gradients" not in called
    for name, expected in steps[1].parameters.items():
        torch.testing.assert_close(steps[0].parameters[name], expected, rtol=1e-4, atol=1e-5)
