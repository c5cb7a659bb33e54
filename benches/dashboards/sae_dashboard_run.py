"""SAEDashboard's own runner, in an environment of its own. Its model is one that has been run: each
batch of windows is answered with its rows from memory."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sae_dashboard.components_config import (
    ActsHistogramConfig,
    FeatureTablesConfig,
    LogitsHistogramConfig,
    LogitsTableConfig,
    SequencesConfig,
)
from sae_dashboard.layout import Column, SaeVisLayoutConfig
from sae_dashboard.sae_vis_data import SaeVisConfig
from sae_dashboard.sae_vis_runner import SaeVisRunner
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig
from safetensors.torch import load_file
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

TOP = 20
POINT = "blocks.0.hook_resid_post"


class Played(nn.Module):
    """The rows of the windows that are asked for, in the order in which they are asked for."""

    def __init__(self, activations: Tensor, W_U: Tensor) -> None:
        super().__init__()
        self._activations = activations
        self.W_U = W_U
        self.hook = HookPoint()
        self.hook_dict = {POINT: self.hook}
        self._at = 0

    def run_with_hooks(self, tokens: Tensor, stop_at_layer: int, fwd_hooks: Any) -> Tensor:
        rows = self._activations[self._at : self._at + len(tokens)]
        self._at = (self._at + len(tokens)) % len(self._activations)
        for _, function in fwd_hooks:
            function(rows, self.hook)
        return rows


def main(work: Path, features: int) -> None:
    data = load_file(work / "data.safetensors")
    d_in, d_sae = data["W_enc"].shape
    sae = JumpReLUSAE(
        JumpReLUSAEConfig(d_in=d_in, d_sae=d_sae, apply_b_dec_to_input=False, dtype="float32")
    )
    with torch.no_grad():
        for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
            getattr(sae, name).copy_(data[name])
        sae.threshold.fill_(float(data["threshold"]))
    layout = SaeVisLayoutConfig(
        columns=[
            Column(FeatureTablesConfig()),
            Column(ActsHistogramConfig(), LogitsTableConfig(), LogitsHistogramConfig()),
            Column(SequencesConfig(top_acts_group_size=TOP, n_quantiles=5)),
        ]
    )
    config = SaeVisConfig(
        hook_point=POINT,
        features=list(range(features)),
        feature_centric_layout=layout,
        minibatch_size_tokens=256,
    )
    model: Any = Played(data["activations"], data["W_U"])
    began = time.perf_counter()
    found = SaeVisRunner(config).run(encoder=sae, model=model, tokens=data["tokens"].long())
    found.save_json(work / "sae_dashboard.json")
    seconds = time.perf_counter() - began
    before, after = layout.seq_cfg.buffer
    strengths = np.zeros((features, TOP), dtype=np.float32)
    tokens = np.zeros((features, TOP, before + 1 + after), dtype=np.int64)
    for feature, shown in found.feature_data_dict.items():
        group = shown.sequence_data.seq_group_data[0].seq_data
        for rank, sequence in enumerate(group):
            tokens[feature, rank] = sequence.token_ids
            strengths[feature, rank] = sequence.feat_acts[before]
    np.savez(work / "sae_dashboard.npz", strengths=strengths, tokens=tokens)
    sys.stdout.write("\n" + json.dumps({"seconds": seconds, "features": features}) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
