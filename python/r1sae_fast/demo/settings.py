"""What decides a demo's outcome, and the two sizes it comes in."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from r1sae_fast.train import TrainConfig


@dataclass(frozen=True)
class DemoSettings:
    """Everything that, together with the model, decides what the demo finds."""

    model: str = "tiny-r1"
    """A checkpoint folder, or the shipped model."""
    layer: int = 2
    """The block whose output is read."""
    own_traces: int = 384
    """Held-out problems that the model thinks about itself, at temperature 1."""
    corpus_tokens: int = 400_000
    """Tokens of the corpus: the model's own traces, then written ones with planted slips."""
    test_traces: int = 900
    """Written traces of held-out problems that neither the SAE nor the corpus sees."""
    slip_rate: float = 0.25
    """Share of the steps of written traces that slip."""
    d_sae: int = 2048
    k: int = 16
    train_tokens: int = 3_000_000
    batch_size: int = 2048
    learning_rate: float = 5e-3
    seed: int = 0

    def training(self) -> TrainConfig:
        """The SAE's training."""
        return TrainConfig(
            d_sae=self.d_sae,
            k=self.k,
            tokens=self.train_tokens,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            aux_k=4 * self.k,
            seed=self.seed,
        )

    def check(self, layers: int) -> None:
        """Refuses what no stage could work with, before anything is written.

        Args:
            layers: how many blocks the model has.

        Raises:
            TypeError, ValueError: a setting out of its range, named.
        """
        if not 0 <= self.layer < layers:
            raise ValueError(
                f"layer is {self.layer}; expected one of the model's {layers} blocks, "
                f"0 to {layers - 1}"
            )
        for name in ("own_traces", "corpus_tokens", "test_traces"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")
        if not 0 < self.slip_rate < 1:
            raise ValueError(f"slip_rate is {self.slip_rate}; expected more than 0, less than 1")
        self.training()

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return asdict(self)


SCALES = {
    "full": DemoSettings(),
    # A few seconds: to see that everything works. Too little data to find much.
    "test": DemoSettings(
        own_traces=8,
        corpus_tokens=6_000,
        test_traces=40,
        d_sae=256,
        k=8,
        train_tokens=40_000,
        batch_size=512,
        learning_rate=1e-2,
    ),
}
"""Settings by the name that ``r1sae demo --scale`` takes."""
