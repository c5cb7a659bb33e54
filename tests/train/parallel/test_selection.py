"""What ranks select together is what one process selects, ties too."""

import subprocess
from collections.abc import Callable

RunRanks = Callable[..., subprocess.CompletedProcess[str]]

PROGRAM = r"""
import torch
from r1sae_fast import ops
from r1sae_fast.train.parallel.grid import Grid
from r1sae_fast.train.select import DenseFinder

layouts = [(1, 2), (2, 1), (2, 2), (1, 3), (3, 1)]

def compare(whole, own, first, end):
    dense = whole.to_dense()[:, first:end]
    assert torch.equal(own.to_dense(), dense), (own.to_dense(), dense)
    own.check()

def work(layout, rank, known):
    grid = Grid(layout, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    for number in range(12):
        rows = int(torch.randint(1, 20, (), generator=generator))
        features = int(torch.randint(layout.latents, 24, (), generator=generator))
        # Few different values: ties within rows, across rows, across ranks.
        high = (2, 4, 1000)[number % 3]
        x = torch.randint(-high, high, (rows, features), generator=generator).float()
        if number % 4 == 0:
            x[:, : features // 2] += high  # the first ranks have most
        if number % 5 == 0:
            x[: rows // 2] += high
        if number % 7 == 0:
            x = -x.abs()
        first, end = grid.own(features)
        own = DenseFinder(torch.eye(features)[first:end], torch.zeros(end - first))
        find = grid.finder(own, end - first)
        for k in sorted({1, min(2, features), features // 2 or 1, features}):
            compare(ops.topk(x, k), find.topk(x, k, check_finite=False), first, end)
            compare(ops.batch_topk(x, k), find.batch_topk(x, k, check_finite=False), first, end)
        theta = torch.randint(0, high, (features,), generator=generator).float()
        above = find.threshold(x, theta[first:end], check_finite=False)
        compare(ops.threshold(x, theta), above, first, end)

        # Decoding: sums of whole numbers are exact.
        decoder = torch.randint(-3, 4, (features, 5), generator=generator).float()
        decoded = grid.decoded(lambda codes: codes.to_dense() @ decoder[first:end], above)
        assert torch.equal(decoded, ops.threshold(x, theta).to_dense() @ decoder)

        # Reading: each rank has read some rows, perhaps none.
        cut = torch.randint(0, rows + 1, (layout.processes - 1,), generator=generator)
        cuts = [0, *sorted(cut.tolist()), rows]
        for dtype in (torch.float32, torch.bfloat16):
            part = x.to(dtype)[cuts[rank] : cuts[rank + 1]]
            together, left_out = grid.rows(part, rank)
            assert torch.equal(together, x.to(dtype))
            assert left_out == sum(range(layout.processes))
        assert grid.agree(rank == 0, False, True) == (True, False, True)
        assert grid.total(1) == layout.latents

    # Copies of the same weights that have come apart.
    same = torch.arange(5.0)
    grid.require_equal([same, same])
    if layout.data > 1:
        try:
            grid.require_equal([same, same + rank])
        except RuntimeError as error:
            assert "have come apart" in str(error), error
        else:
            raise AssertionError("other weights were not noticed")
"""


def test_as_one_process(run_ranks: RunRanks) -> None:
    result = run_ranks(PROGRAM)
    assert result.returncode == 0, result.stderr
