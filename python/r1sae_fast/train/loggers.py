"""Figures of a run sent elsewhere besides ``metrics.jsonl``: extras, imported when asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from r1sae_fast.errors import MissingExtraError
from r1sae_fast.train.metrics import Metrics

__all__ = ["LOGGERS", "logging_to"]

Tell = Callable[[str, Metrics], None]


@contextmanager
def logging_to(
    names: Sequence[str], folder: Path, settings: dict[str, dict[str, Any]]
) -> Iterator[Tell | None]:
    """Gives what is to be told an SAE's name and each line of its metrics; None for no loggers.

    Args:
        names: "tensorboard" (into ``folder/<SAE>/tensorboard``) and "wandb" (a run an SAE, as
            ``WANDB_PROJECT`` and ``WANDB_MODE`` say; project "r1sae" where nothing does).
        folder: of the run.
        settings: by name of an SAE, "" for a run of one: what is said to have trained it.

    Raises:
        ValueError: another name.
        MissingExtraError: it isn't installed.
    """
    require(names)
    with ExitStack() as stack:
        tellers = [stack.enter_context(LOGGERS[name](folder, settings)) for name in names]

        def tell(name: str, line: Metrics) -> None:
            for each in tellers:
                each(name, line)

        yield tell if tellers else None


def require(names: Sequence[str]) -> None:
    """Raises what :func:`logging_to` does for loggers that there are not, before it is needed."""
    for name in names:
        if name not in LOGGERS:
            raise ValueError(
                f"unknown logger {name!r}; expected {' or '.join(LOGGERS)} "
                "(metrics.jsonl is always written)"
            )
        if find_spec(name) is None:
            raise _missing(name, ModuleNotFoundError(f"No module named {name!r}"))


@contextmanager
def _tensorboard(folder: Path, settings: dict[str, dict[str, Any]]) -> Iterator[Tell]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise _missing("tensorboard", error) from None
    make: Any = SummaryWriter  # torch's has no types
    writers = {name: make(folder / name / "tensorboard") for name in settings}

    def tell(name: str, line: Metrics) -> None:
        for key, value in _figures(line).items():
            writers[name].add_scalar(key, value, line.step)
        writers[name].flush()

    try:
        yield tell
    finally:
        for writer in writers.values():
            writer.close()


@contextmanager
def _wandb(folder: Path, settings: dict[str, dict[str, Any]]) -> Iterator[Tell]:
    try:
        import wandb
    except ImportError as error:
        raise _missing("wandb", error) from None
    import os

    runs: dict[str, Any] = {}
    for name, said in settings.items():
        runs[name] = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "r1sae"),
            name=f"{folder.name}/{name}" if name else folder.name,
            config=said,
            dir=str(folder / name),
            reinit="create_new",
        )
    try:
        yield lambda name, line: runs[name].log(_figures(line), step=line.step)
    finally:
        for run in runs.values():
            run.finish()


def _figures(line: Metrics) -> dict[str, float]:
    return {name: value for name, value in asdict(line).items() if name != "step"}


def _missing(name: str, error: ImportError) -> MissingExtraError:
    return MissingExtraError(
        f"logging to {name} needs a package that isn't there ({error}); install it with "
        f"`pip install 'r1sae-fast[{name}]'`, or leave {name} out: metrics.jsonl is always written"
    )


LOGGERS = {"tensorboard": _tensorboard, "wandb": _wandb}
