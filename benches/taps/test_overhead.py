"""What a tap costs: the same call with it and without it, in turns. The bar is 3% of a forward.

In the results ``ours`` is with the tap and ``torch`` without it: 0.97x is a cost of 3% (``cost``
in ``--versus-json``).

TinyR1 is 256 wide: an SAE of a thousand features is a tenth of all its arithmetic, so what an
attached one costs there says nothing about R1. ``--shapes r1`` therefore times one block of R1's
true shape (attention of 128 heads, a token's 8 experts and the shared one) beside the tap alone,
an SAE of 28,672 features attached; the residual after block 37 is 38 such blocks.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from r1sae_fast import FastSAE
from r1sae_fast.r1 import LocalEngine, R1Config, R1Model
from r1sae_fast.r1.taps import AddDirection, Capture, SetFeatures, Tap
from r1sae_fast.r1.taps.run import TapRun, make_call

BLOCKS = 38


@pytest.fixture(scope="module")
def tiny() -> LocalEngine:
    return LocalEngine.from_pretrained("tiny-r1")


@pytest.fixture(scope="module")
def block() -> LocalEngine:
    """One block of R1, in bfloat16, with as many experts as a token uses: 1.2 GB."""
    config = R1Config(
        vocab_size=64,
        num_hidden_layers=1,
        first_k_dense_replace=0,
        n_routed_experts=8,
        n_group=1,
        topk_group=1,
    )
    model = R1Model(config, dtype=torch.bfloat16).requires_grad_(False)
    noise = torch.randn(2**20, generator=torch.Generator().manual_seed(0)).bfloat16()
    for parameter in model.parameters():
        flat = parameter.view(-1)
        scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.0
        for start in range(0, flat.numel(), noise.numel()):
            part = flat[start : start + noise.numel()]
            part.copy_(noise[: part.numel()] * scale + float(parameter.ndim == 1))
    return LocalEngine(model)


def sparse_autoencoder(d_in: int, d_sae: int, k: int, x: Tensor) -> FastSAE:
    """Calibrated on x, so that mode "threshold" gives k codes a row."""
    torch.manual_seed(0)
    sae = FastSAE(d_in, d_sae, k, "topk", tied=True, dtype=torch.bfloat16).requires_grad_(False)
    sae.calibrate_threshold(x)
    return sae


def tapped(engine: LocalEngine, taps: list[Tap], tokens: Tensor, layer: int) -> Tensor:
    with engine.tap(*taps):
        return engine.residuals(tokens, layer)


@pytest.fixture
def tokens(generator: torch.Generator) -> Tensor:
    return torch.randint(5, 400, (32, 128), generator=generator)


def tiny_taps(engine: LocalEngine, tokens: Tensor) -> dict[str, list[Tap]]:
    x = engine.residuals(tokens, 3).flatten(0, 1)
    sae = sparse_autoencoder(256, 1024, 16, x)
    return {
        "capture of one layer": [Capture(3)],
        "captures of all layers": [Capture(layer) for layer in range(4)],
        "direction added from position 20 on": [AddDirection(2, torch.ones(256), start=20)],
        "feature set (threshold)": [SetFeatures(2, sae, {5: 3.0}, mode="threshold")],
        "FastSAE 1024, k=16 (threshold)": [Capture(3, sae=sae, mode="threshold")],
        "FastSAE 1024, k=16 (topk)": [Capture(3, sae=sae, mode="topk")],
    }


CASES = [
    "capture of one layer",
    "captures of all layers",
    "direction added from position 20 on",
    "feature set (threshold)",
    "FastSAE 1024, k=16 (threshold)",
    "FastSAE 1024, k=16 (topk)",
]


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_tiny_r1_prefill(versus, tiny, tokens, case) -> None:
    taps = tiny_taps(tiny, tokens)[case]
    if isinstance(taps[-1], Capture) and taps[-1].sae is None:
        expected = tapped(tiny, taps, tokens, 3).flatten(0, 1)
        assert torch.equal(taps[-1].values, expected)
    result = versus(
        f"TinyR1 prefill, {case}",
        ours=lambda: tapped(tiny, taps, tokens, 3),
        torch=lambda: tiny.residuals(tokens, 3),
        work=(tokens.numel(), "tokens"),
    )
    result.notes["cost"] = 1 / result.ratio() - 1


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_tiny_r1_generation(versus, tiny, tokens, case) -> None:
    taps = tiny_taps(tiny, tokens)[case]
    prompts = tokens[:, :12].tolist()

    def plain() -> object:
        return tiny.generate(prompts, max_new_tokens=24, seed=1, stop_ids=[])

    def ours() -> object:
        with tiny.tap(*taps):
            return plain()

    result = versus(
        f"TinyR1 generation, batch 32, {case}",
        ours=ours,
        torch=plain,
        work=(32 * 24, "tokens"),
        seconds=2.0,
    )
    result.notes["cost"] = 1 / result.ratio() - 1


R1_CASES = ["capture", "FastSAE (threshold)", "FastSAE (topk)", "feature set (threshold)"]


@pytest.fixture(scope="module")
def r1_sae(block, shape) -> FastSAE:
    x = block.residuals(torch.arange(64)[None], 0)[0]
    return sparse_autoencoder(shape.d_in, shape.d_sae, shape.k, x)


@pytest.mark.parametrize("case", R1_CASES)
@torch.no_grad()
def test_r1_block(versus, shape, request, case) -> None:
    """The tap alone beside one block: its cost after block 37 is 1 / (38 * ratio)."""
    if shape.name != "r1":
        pytest.skip("a block of R1 takes 1.2 GB; --shapes r1 asks for it")
    engine = request.getfixturevalue("block")
    sae = request.getfixturevalue("r1_sae")
    tap: Tap = {
        "capture": lambda: Capture(0),
        "FastSAE (threshold)": lambda: Capture(0, sae=sae, mode="threshold"),
        "FastSAE (topk)": lambda: Capture(0, sae=sae, mode="topk"),
        "feature set (threshold)": lambda: SetFeatures(0, sae, {5: 3.0}, mode="threshold"),
    }[case]()
    tokens = torch.randint(0, 64, (4, 128), generator=torch.Generator().manual_seed(0))
    rows = tokens.tolist()
    value = engine.residuals(tokens, 0)
    call = make_call(shape.d_in, engine.dtype, engine.device, [128] * 4, None)

    def alone() -> Tensor:
        run = TapRun([tap], call)
        run.begin(range(4), [0] * 4, rows)
        found = run.at(0)
        assert found is not None
        return found("output", value)

    result = versus(
        f"R1's shape, a block of 512 tokens and its tap: {case}",
        ours=alone,
        torch=lambda: engine.residuals(tokens, 0),
        work=(512, "tokens"),
        rounds=7,
    )
    result.notes["cost after 38 blocks"] = 1 / (BLOCKS * result.ratio())
