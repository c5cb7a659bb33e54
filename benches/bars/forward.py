"""P1 and P2: encode and decode, beside sparsify (row top-k) and Goodfire's sae.py (batch top-k)."""

from __future__ import annotations

import torch

from bars.data import inexact_rows, make_sae, make_x
from bars.report import Bar, Section
from harness.shapes import Shape
from harness.timing import Budget, Result, in_turns
from peers import installed

# Bars with AMX and without.
BARS = {
    ("P1", "sparsify"): (5.0, 4.0),
    ("P1", "goodfire"): (10.0, 8.0),
    ("P2", "sparsify"): (1.4, 1.4),
    ("P2", "goodfire"): (3.0, 3.0),
}


@torch.no_grad()
def forward(bar: str, dtype: torch.dtype, shape: Shape, rounds: int, amx: bool) -> Section:
    """Both contests, and for float32 a check of every row's codes."""
    sae = make_sae(shape, "topk", dtype).requires_grad_(False)
    x = make_x(shape.rows, shape.d_in, dtype)
    weights = sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec, shape.k
    build = installed()
    section = Section([], [])

    def contest(peer: str) -> Result:
        theirs = build[peer](*weights)
        name = f"{bar} encode and decode {sae.mode} {dtype}, {shape}"
        calls = {"ours": lambda: sae(x), peer: lambda: theirs.forward(x)}
        result = in_turns(name, calls, Budget(rounds=rounds))
        result.work = (shape.rows, "tokens")
        section.results.append(result)
        least = BARS[bar, peer][0 if amx else 1]
        section.bars.append(Bar(bar, f"{sae.mode} beside {peer}", result.ratio(peer), least))
        return result

    if "sparsify" in build:
        contest("sparsify")
    if dtype == torch.float32:
        wrong = inexact_rows(sae, x, sae.encode_sparse(x))
        for what, rows in zip(("features", "features or values"), wrong, strict=True):
            section.bars.append(Bar(bar, f"rows with other {what}", rows, most=0, unit="rows"))
    sae.mode = "batch_topk"
    contest("goodfire")
    return section


@torch.no_grad()
def small_batches(dtype: torch.dtype, shape: Shape, rounds: int) -> Section:
    """B = 1, 8, 64: never slower than torch's own path."""
    sae = make_sae(shape, "topk", dtype).requires_grad_(False)
    section = Section([], [])
    for rows in (1, 8, 64):
        x = make_x(rows, shape.d_in, dtype)

        def plain(x: torch.Tensor = x) -> torch.Tensor:
            values, indices = (x @ sae.W_enc + sae.b_enc).relu().topk(sae.k)
            bags = torch.nn.functional.embedding_bag(
                indices, sae.W_dec, per_sample_weights=values, mode="sum"
            )
            return bags + sae.b_dec

        calls = {"ours": lambda x=x: sae(x), "torch": plain}
        result = in_turns(f"encode and decode {dtype}, {rows} rows", calls, Budget(rounds=rounds))
        section.results.append(result)
        what = f"{dtype} {rows} rows beside plain torch"
        section.bars.append(Bar("small", what, result.ratio("torch"), 1.0))
    return section
