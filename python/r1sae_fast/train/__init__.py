"""Training of SAEs on shards of activations."""

from r1sae_fast.train.config import TrainConfig
from r1sae_fast.train.config_file import TrainFile, read_train_file
from r1sae_fast.train.curves import draw_curves
from r1sae_fast.train.engine_rows import EngineRows
from r1sae_fast.train.evaluate import evaluate
from r1sae_fast.train.geometric_median import geometric_median
from r1sae_fast.train.metrics import Metrics
from r1sae_fast.train.sweep import SweepResult, sweep_configs, train_sweep
from r1sae_fast.train.trainer import train

__all__ = [
    "EngineRows",
    "Metrics",
    "SweepResult",
    "TrainConfig",
    "TrainFile",
    "draw_curves",
    "evaluate",
    "geometric_median",
    "read_train_file",
    "sweep_configs",
    "train",
    "train_sweep",
]
