"""Ours: codes, the database with all that is counted, and the pages of all features."""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from r1sae_fast import FastSAE
from r1sae_fast.features import FeatureDB
from r1sae_fast.shards import CodeWriter

TOP = 20
_ROWS = 4096


def main(work: Path) -> None:
    data = load_file(work / "data.safetensors")
    tokenizer = Tokenizer.from_file(str(work / "tokenizer.json"))
    sae = FastSAE.load(work / "sae")
    width, d_in = data["activations"].shape[1:]
    x, tokens = data["activations"].reshape(-1, d_in), data["tokens"].reshape(-1)
    segment = data["segment"].reshape(-1)
    for name in ("codes", "pages"):
        shutil.rmtree(work / name, ignore_errors=True)
    began = time.perf_counter()
    with torch.no_grad(), CodeWriter(work / "codes", sae.d_sae, {}) as writer:
        for start in range(0, len(x), _ROWS):
            part = slice(start, start + _ROWS)
            places = np.arange(start, min(start + _ROWS, len(x)))
            writer.write(
                sae.encode_sparse(x[part]),
                tokens=tokens[part],
                sequence_id=places // width,
                position=(places % width).astype(np.int32),
                segment=segment[part],
            )
    encoded = time.perf_counter()
    path = work / "ours.ddb"
    db = FeatureDB.build(
        path, work / "codes", decode=tokenizer, sae=sae, n=TOP, overwrite=True, progress=False
    )
    built = time.perf_counter()
    with db:
        db.export_pages(work / "pages", "saedashboard", n=TOP, window=width // 2, progress=False)
        ended = time.perf_counter()
        rows = db.sql(
            "SELECT feature_id, sequence_id, token_idx, strength FROM activations "
            "ORDER BY feature_id, strength DESC, sequence_id, token_idx"
        )
    np.savez(work / "ours.npz", **{name: rows[name].to_numpy() for name in rows.column_names})
    seconds = {"encode": encoded - began, "build": built - encoded, "pages": ended - built}
    told = {"seconds": ended - began, "features": sae.d_sae, "parts": seconds}
    sys.stdout.write(json.dumps(told) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
