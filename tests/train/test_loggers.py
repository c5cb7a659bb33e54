"""TensorBoard and Weights & Biases are extras: asked for by name, and only then imported."""

import builtins
import importlib.util
from pathlib import Path
from typing import Any

import pytest

from r1sae_fast.errors import MissingExtraError
from r1sae_fast.train.loggers import logging_to
from r1sae_fast.train.metrics import Metrics

LINE = Metrics(7, 100, 0.5, 0.0, 0.25, 4.0, 0.0, 0.1, 1e-3, 0, 50.0, 0.1, 0.4, 0.3, 0.1)


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_what_is_missing_is_said(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = builtins.__import__

    def without(module: str, *rest: Any) -> Any:
        if module.partition(".")[0] == "wandb" or "tensorboard" in module:
            raise ImportError(f"No module named {module!r}")
        return plain(module, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtraError, match=rf"pip install 'r1sae-fast\[{name}\]'"):
        logging_to([name], tmp_path, {"": {}}).__enter__()


def test_names(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown logger 'csv'; expected tensorboard or wandb"):
        logging_to(["csv"], tmp_path, {"": {}}).__enter__()
    with logging_to([], tmp_path, {"": {}}) as tell:
        assert tell is None


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="an extra")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # its own
def test_tensorboard_gets_the_figures(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with logging_to(["tensorboard"], tmp_path, {"a": {}, "b": {}}) as tell:
        assert tell is not None
        tell("b", LINE)
    events = EventAccumulator(str(tmp_path / "b" / "tensorboard"))
    events.Reload()
    ((step, value),) = [(event.step, event.value) for event in events.Scalars("fvu")]
    assert (step, value) == (7, 0.25)
    assert not EventAccumulator(str(tmp_path / "a" / "tensorboard")).Reload().Tags()["scalars"]


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="an extra")
@pytest.mark.filterwarnings("ignore")  # its own
def test_wandb_gets_the_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    with logging_to(["wandb"], tmp_path, {"": {"k": 4}}) as tell:
        assert tell is not None
        tell("", LINE)
