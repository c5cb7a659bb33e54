"""TrainConfig: bad settings are named; the schedule rises, holds and falls."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1sae_fast.train import TrainConfig


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"d_sae": 0}, "d_sae is 0"),
        ({"k": 0}, "k is 0"),
        ({"k": 65}, "k is 65, more than d_sae = 64"),
        ({"mode": "threshold"}, "mode is 'threshold'; expected one of batch_topk, topk, "),
        ({"tokens": 0}, "tokens is 0"),
        ({"batch_size": -1}, "batch_size is -1"),
        ({"seed": 2**63}, "seed"),
        ({"learning_rate": -1.0}, "learning_rate is -1"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"beta2": 1.0}, "beta2 is 1"),
        ({"topk_warmup": 1.5}, "topk_warmup is 1.5"),
        ({"topk_warmup": 0.5, "mode": "topk"}, "topk_warmup is given with mode 'topk'"),
        ({"warmup": 1.5}, "warmup is 1.5"),
        ({"gradient_clip": 0.0}, "gradient_clip is 0"),
        ({"outlier_factor": 0.5}, "outlier_factor is 0.5"),
        ({"aux_k": 0}, "aux_k is 0"),
        ({"matryoshka_widths": (8, 64)}, "given with mode 'batch_topk'; it is for matryoshka"),
        ({"k": None}, "k is missing: mode batch_topk needs"),
        ({"mode": "jumprelu", "k": None}, "k is missing: mode jumprelu, sparsity_loss target"),
        ({"mode": "relu"}, "k is 4 with mode relu, in which sparsity_coefficient decides"),
        ({"mode": "jumprelu", "sparsity_loss": "l0"}, "k is 4 with mode jumprelu, .* l0, in which"),
        ({"mode": "jumprelu", "sparsity_loss": "l1"}, "sparsity_loss is 'l1'; expected one of"),
        ({"mode": "jumprelu", "tanh_scale": 2.0}, "tanh_scale is given with .* 'target'"),
        ({"mode": "jumprelu", "bandwidth": 0.0}, "bandwidth is 0"),
        ({"mode": "jumprelu", "threshold_decay": 0.5}, "threshold_decay is given with mode 'jump"),
        ({"mode": "relu", "k": None, "tied": True}, 'tied is True with mode "relu"'),
        ({"mode": "relu", "k": None, "bandwidth": 0.1}, "with mode 'relu'; it is for jumprelu"),
        ({"sparsity_coefficient": 0.1}, "it is for jumprelu and relu"),
        ({"mode": "matryoshka", "matryoshka_widths": (8, 8, 64)}, r"8, 64\]; expected numbers"),
        ({"mode": "matryoshka", "matryoshka_widths": [8, 63]}, "that rise to d_sae = 64"),
        ({"mode": "matryoshka", "matryoshka_widths": ()}, "that rise to d_sae = 64"),
        ({"mode": "matryoshka", "matryoshka_widths": (0, 64)}, "a width of .* is 0"),
    ],
)
def test_settings_out_of_range_are_named(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TrainConfig(**{"d_sae": 64, "k": 4, **settings})


@pytest.mark.parametrize(
    "settings",
    [
        {"d_sae": 64.0},
        {"k": True},
        {"learning_rate": "fast"},
        {"matryoshka_widths": 64, "mode": "matryoshka"},
    ],
)
def test_settings_of_another_type_are_named(settings: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=next(iter(settings))):
        TrainConfig(**{"d_sae": 64, "k": 4, **settings})


@pytest.mark.parametrize(
    ("d_sae", "prefixes"), [(64, (4, 8, 16, 32, 64)), (5, (1, 2, 3, 5)), (1, (1,))]
)
def test_prefixes_without_settings(d_sae: int, prefixes: tuple[int, ...]) -> None:
    assert TrainConfig(d_sae=d_sae, k=1, mode="matryoshka").prefixes == prefixes


@given(
    tokens=st.integers(1, 10**6),
    batch_size=st.integers(1, 10**4),
    warmup=st.floats(0, 1),
    decay=st.floats(0, 1),
)
def test_schedule(tokens: int, batch_size: int, warmup: float, decay: float) -> None:
    config = TrainConfig(
        d_sae=64, k=4, tokens=tokens, batch_size=batch_size, warmup=warmup, decay=decay
    )
    assert (config.steps - 1) * batch_size < tokens <= config.steps * batch_size
    steps = range(0, config.steps, max(1, config.steps // 50))
    rates = [config.rate(step) for step in steps]
    assert all(0 < rate <= config.peak_learning_rate for rate in rates)
    top = rates.index(max(rates))
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)


def test_the_sparsity_loss_warms_up() -> None:
    settings: dict[str, Any] = {"d_sae": 64, "mode": "jumprelu", "tokens": 100, "batch_size": 1}
    quick = TrainConfig(k=4, sparsity_warmup=0.1, **settings)
    assert [quick.sparsity_share(step) for step in (0, 4, 9, 99)] == [0.1, 0.5, 1.0, 1.0]
    assert TrainConfig(k=4, sparsity_warmup=0.0, **settings).sparsity_share(0) == 1.0
    tanh = TrainConfig(sparsity_loss="tanh", **settings)
    assert tanh.sparsity_share(49) == 0.5


def test_schedule_in_numbers() -> None:
    config = TrainConfig(
        d_sae=64, k=4, tokens=100, batch_size=1, learning_rate=2.0, warmup=0.1, decay=0.5
    )
    assert [config.rate(step) for step in (0, 4, 9, 50, 75, 99)] == pytest.approx(
        [0.2, 1.0, 2.0, 2.0, 1.0, 0.04]
    )


def test_the_default_rate_grows_as_runs_get_shorter() -> None:
    def peak(steps: int, **settings: Any) -> float:
        config = TrainConfig(d_sae=2**14, tokens=steps, batch_size=1, **settings)
        return config.peak_learning_rate / 2e-4

    assert [round(peak(steps, k=4), 2) for steps in (10**6, 30_000, 3000, 100)] == [1, 1, 5.01, 20]
    assert round(peak(300, mode="relu"), 2) == 10
    assert peak(300, k=4, learning_rate=2e-4) == 1


def test_adam_looks_back_over_a_tenth_of_the_run() -> None:
    def memory(steps: int, **settings: Any) -> int:
        config = TrainConfig(d_sae=64, tokens=steps, batch_size=1, beta1=0.5, **settings)
        assert config.betas[0] == 0.5
        return round(1 / (1 - config.betas[1]))

    assert [memory(steps, k=4) for steps in (10, 2500, 10**6)] == [100, 250, 1000]
    assert memory(10, mode="relu") == 1000
    assert memory(10, k=4, beta2=0.75) == 4


def test_rows_share_codes_from_a_third_of_the_run_on() -> None:
    def first_shared(steps: int, mode: str = "batch_topk", share: float | None = None) -> int:
        config = TrainConfig(
            d_sae=64, k=4, mode=mode, tokens=steps, batch_size=1, topk_warmup=share
        )
        return next((step for step in range(steps) if not config.row_by_row(step)), steps)

    assert [first_shared(steps) for steps in (1, 399, 400, 1000)] == [0, 0, 120, 300]
    assert first_shared(1000, "matryoshka") == 300
    assert first_shared(1000, "topk") == first_shared(1000, "jumprelu") == 0
    assert [first_shared(10, share=share) for share in (0.0, 0.35, 1.0)] == [0, 4, 10]
