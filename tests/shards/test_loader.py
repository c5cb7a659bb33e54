"""The loader: every row once an epoch, in an order that depends on the seed alone."""

import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given

from r1sae_fast import _core
from r1sae_fast.shards import ActivationShards, ActivationWriter

ROWS = 103
MASK = 2**64 - 1
GOLDEN_10 = [5, 7, 1, 0, 8, 9, 2, 4, 3, 6]
GOLDEN_LARGE = [702443663878, 452574711528, 60977412875, 453200004484]


def write(folder: Path, rows: int, per_shard: int = 20) -> ActivationShards:
    x = torch.arange(rows, dtype=torch.float32)[:, None].expand(-1, 3)
    with ActivationWriter(folder, 3, "float32", rows_per_shard=per_shard) as writer:
        writer.write(x, tokens=range(rows))
    return ActivationShards(folder)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ActivationShards:
    return write(tmp_path_factory.mktemp("loader") / "shards", ROWS)


def order(loader: Any, batches: int | None = None) -> list[int]:
    """The rows in the order in which they come, with a look at whether their parts fit."""
    rows: list[int] = []
    for number, batch in enumerate(loader, 1):
        assert torch.equal(batch.activations[:, 1], batch.tokens.float())
        rows += batch.tokens.tolist()
        if number == batches:
            break
    return rows


def epoch_order(seed: int, epoch: int) -> list[int]:
    return [int(row) for row in _core.permutation(ROWS, seed, epoch, 0, ROWS)]


# -- the order -------------------------------------------------------------------------------


def mix(x: int) -> int:
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK
    return x ^ (x >> 31)


def reference_order(rows: int, seed: int, epoch: int) -> Iterator[int]:
    """``rust/core/src/shard/order.rs`` once more, in plain Python."""
    golden = 0x9E3779B97F4A7C15
    bits = max((rows - 1).bit_length() if rows else 0, 12)
    high_bits, low_bits = bits // 2, bits - bits // 2
    state = mix(seed + golden & MASK) ^ epoch
    keys = []
    for _ in range(12):
        state = state + golden & MASK
        keys.append(mix(mix(state)))
    for place in range(rows):
        row = place
        while True:
            high, low = row >> low_bits, row & (1 << low_bits) - 1
            for first, second in zip(keys[::2], keys[1::2], strict=True):
                high ^= mix(low + first & MASK) & (1 << high_bits) - 1
                low ^= mix(high + second & MASK) & (1 << low_bits) - 1
            row = high << low_bits | low
            if row < rows:
                break
        yield row


@given(st.integers(0, 3000), st.integers(0, MASK), st.integers(0, MASK))
def test_order_is_the_references(rows: int, seed: int, epoch: int) -> None:
    places = min(rows, 40)
    found = _core.permutation(rows, seed, epoch, 0, places).tolist()
    assert found == [row for row, _ in zip(reference_order(rows, seed, epoch), range(places))]  # noqa: B905


def test_order_never_changes() -> None:
    """A seed must give the same training run in a later version of this package."""
    assert _core.permutation(10, 0, 0, 0, 10).tolist() == GOLDEN_10
    assert _core.permutation(10**12, 7, 3, 5, 9).tolist() == GOLDEN_LARGE


@given(st.integers(1, 20_000), st.integers(0, MASK), st.integers(0, 5), st.data())
def test_order_is_a_permutation_in_any_pieces(
    rows: int, seed: int, epoch: int, data: st.DataObject
) -> None:
    whole = _core.permutation(rows, seed, epoch, 0, rows)
    assert np.array_equal(np.sort(whole), np.arange(rows))
    start = data.draw(st.integers(0, rows))
    stop = data.draw(st.integers(start, rows))
    assert np.array_equal(_core.permutation(rows, seed, epoch, start, stop), whole[start:stop])


def test_order_looks_random() -> None:
    """Neighbours in the order are not neighbours in the shards, and the halves mix evenly."""
    rows = 100_000
    whole = _core.permutation(rows, 3, 0, 0, rows)
    correlation = np.corrcoef(whole[:-1], whole[1:])[0, 1]
    assert abs(correlation) < 5 / np.sqrt(rows)
    assert abs(np.corrcoef(np.arange(rows), whole)[0, 1]) < 5 / np.sqrt(rows)
    counts = np.bincount(whole[: rows // 10] // (rows // 100), minlength=100)
    chi2 = float(((counts - 100.0) ** 2 / 100).sum())
    assert chi2 < 170  # 99 degrees of freedom: above that once in 10^5
    steps = np.bincount(np.abs(np.diff(whole)), minlength=3)
    assert steps[1] < 15  # 2 expected


def test_order_arguments() -> None:
    for places in ((0, 11), (5, 4)):
        with pytest.raises(ValueError, match="out of range for 10 rows"):
            _core.permutation(10, 0, 0, *places)


# -- batches ---------------------------------------------------------------------------------


@given(st.integers(1, ROWS + 10), st.integers(0, MASK), st.booleans())
def test_every_row_once_an_epoch(
    shards: ActivationShards, batch_size: int, seed: int, drop_last: bool
) -> None:
    loader = shards.loader(batch_size, seed=seed, drop_last=drop_last, epochs=2)
    sizes = [len(batch) for batch in shards.loader(batch_size, drop_last=drop_last)]
    whole, rest = divmod(ROWS, batch_size)
    assert sizes == [batch_size] * whole + [rest] * (rest > 0 and not drop_last)
    rows = order(loader)
    assert len(loader) == 2 * len(sizes)
    kept = sum(sizes)
    assert len(rows) == 2 * kept
    expected = [*epoch_order(seed, 0)[:kept], *epoch_order(seed, 1)[:kept]]
    assert rows == expected


def test_order_does_not_depend_on_batches_or_shards(tmp_path: Path) -> None:
    one, many = write(tmp_path / "one", 50, 50), write(tmp_path / "many", 50, 7)
    expected = order(one.loader(50, seed=5))
    assert sorted(expected) == list(range(50))
    for shards, batch_size in ((one, 3), (many, 50), (many, 8)):
        assert order(shards.loader(batch_size, seed=5)) == expected
    assert order(one.loader(50, seed=6)) != expected


def test_without_shuffling(shards: ActivationShards) -> None:
    assert order(shards.loader(10, shuffle=False, epochs=2)) == [*range(ROWS)] * 2


def test_loops_go_on_with_further_epochs(shards: ActivationShards) -> None:
    loader = shards.loader(10, seed=1)
    epochs = [order(loader) for _ in range(3)]
    assert epochs == [epoch_order(1, epoch) for epoch in range(3)]
    assert loader.epoch == 3
    endless = shards.loader(50, seed=1, epochs=None)
    assert order(endless, batches=9) == [row for epoch in epochs for row in epoch]
    with pytest.raises(TypeError, match="no end"):
        len(endless)


def test_a_loop_that_is_left_is_continued(shards: ActivationShards) -> None:
    loader = shards.loader(10, seed=1)
    first = order(loader, batches=4)
    assert loader.row == 40
    assert first + order(loader) == epoch_order(1, 0)


@given(st.data())
def test_resuming_is_exact(shards: ActivationShards, data: st.DataObject) -> None:
    batch_size, again = data.draw(st.integers(1, 60)), data.draw(st.integers(1, 60))
    options: dict[str, Any] = {
        "seed": data.draw(st.integers(0, MASK)),
        "shuffle": data.draw(st.booleans()),
        "epochs": data.draw(st.integers(1, 3)),
    }
    whole = order(shards.loader(batch_size, **options))
    first = shards.loader(batch_size, **options)
    batches = data.draw(st.integers(1, len(first)))
    before = order(first, batches)  # left in the last loop's body, so even at the end not past it
    state = json.loads(json.dumps(first.state_dict()))
    second = shards.loader(again, **options)
    second.load_state_dict(state)
    assert second.state_dict() == state
    assert before + order(second) == whole


def test_resuming_after_the_end(shards: ActivationShards) -> None:
    """Saved with the last batch: nothing is left. Saved after the loop: the next epoch is."""
    loader = shards.loader(60, seed=2)
    within = [loader.state_dict() for _ in loader][-1]
    after = loader.state_dict()
    resumed = shards.loader(60, seed=2)
    resumed.load_state_dict(within)
    assert order(resumed) == []
    assert order(resumed) == epoch_order(2, 1)
    resumed.load_state_dict(after)
    assert order(resumed) == epoch_order(2, 1)


def test_resuming_with_drop_last(shards: ActivationShards) -> None:
    loader = shards.loader(50, seed=2, drop_last=True, epochs=2)
    whole = order(shards.loader(50, seed=2, drop_last=True, epochs=2))
    before = order(loader, batches=2)
    resumed = shards.loader(50, seed=2, drop_last=True, epochs=2)
    resumed.load_state_dict(loader.state_dict())
    assert before + order(resumed) == whole
    assert len(whole) == 200


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"rows": 7}, "rows 7, this loader 103"),
        ({"seed": 1}, "seed 1, this loader 0"),
        ({"shuffle": False}, "shuffle False"),
        ({"fingerprint": "0" * 16}, "fingerprint"),
        ({"version": 2}, "version 2"),
        ({"row": 104}, "row is 104; expected 0 to 103"),
        ({"epoch": -1}, "epoch is -1"),
    ],
)
def test_states_of_other_loaders(
    shards: ActivationShards, change: dict[str, Any], says: str
) -> None:
    loader = shards.loader(10)
    order(loader, batches=2)
    state = loader.state_dict()
    with pytest.raises(ValueError, match=says):
        loader.load_state_dict({**state, **change})
    assert loader.state_dict() == state
    for name in state.keys() - {"blocks"}:
        with pytest.raises(ValueError, match=f"it has no '{name}'"):
            loader.load_state_dict({key: state[key] for key in state.keys() - {name}})


def test_states_know_the_data(shards: ActivationShards, tmp_path: Path) -> None:
    """As many rows, but others."""
    with ActivationWriter(tmp_path / "other", 3, "float32", rows_per_shard=20) as writer:
        writer.write(torch.zeros(ROWS, 3), tokens=range(ROWS))
    other = ActivationShards(tmp_path / "other")
    assert other.fingerprint != shards.fingerprint
    with pytest.raises(ValueError, match="fingerprint"):
        other.loader(10).load_state_dict(shards.loader(10).state_dict())


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"batch_size": 0}, ValueError, "batch_size is 0"),
        ({"batch_size": 2.0}, TypeError, "batch_size is 2.0"),
        ({"batch_size": 2, "seed": -1}, ValueError, "seed is -1"),
        ({"batch_size": 2, "seed": "x"}, TypeError, "seed is 'x'"),
        ({"batch_size": 2, "epochs": 0}, ValueError, "epochs is 0"),
    ],
)
def test_bad_arguments(
    shards: ActivationShards, options: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        shards.loader(**options)


def test_batches_larger_than_the_data(shards: ActivationShards) -> None:
    assert len(order(shards.loader(1000))) == ROWS
    assert order(shards.loader(1000, drop_last=True, epochs=None)) == []


def test_the_first_three_arguments_by_place(shards: ActivationShards) -> None:
    assert order(shards.loader(10, True, 3)) == order(shards.loader(10, shuffle=True, seed=3))
    assert order(shards.loader(10, False, 0)) == list(range(ROWS))
    with pytest.raises(TypeError, match="positional argument"):
        shards.loader(10, True, 3, True)  # type: ignore[call-arg]


# -- shuffled in blocks ------------------------------------------------------------------------


@given(st.integers(1, 40), st.integers(1, 6), st.integers(1, ROWS), st.integers(0, MASK))
def test_blocks_every_row_once_an_epoch(
    shards: ActivationShards, block: int, window: int, batch_size: int, seed: int
) -> None:
    loader = shards.loader(batch_size, seed=seed, epochs=2, blocks=(block, window))
    rows = order(loader)
    assert sorted(rows[:ROWS]) == sorted(rows[ROWS:]) == [*range(ROWS)]
    one = order(shards.loader(ROWS, seed=seed, epochs=2, blocks=(block, window)))
    assert rows == one  # whatever the batches


def test_blocks_stay_together(shards: ActivationShards) -> None:
    """Of a window of 2 blocks of 10 rows, all rows come before those of the next."""
    rows = order(shards.loader(20, seed=3, blocks=(10, 2)))
    for start in range(0, 100, 20):
        offsets = sorted({(row - rows[0]) % ROWS for row in rows[start : start + 20]})
        runs = 1 + int((np.diff(offsets) > 1).sum())
        assert runs <= 4  # two blocks, each of which the end of the data may cut in two
    assert rows != sorted(rows)


def test_blocks_resume_exactly(shards: ActivationShards) -> None:
    whole = order(shards.loader(7, seed=5, blocks=(10, 3)))
    first = shards.loader(7, seed=5, blocks=(10, 3))
    before = order(first, batches=6)
    state = json.loads(json.dumps(first.state_dict()))
    second = shards.loader(11, seed=5, blocks=(10, 3))
    second.load_state_dict(state)
    assert before + order(second) == whole
    with pytest.raises(ValueError, match="blocks"):
        shards.loader(7, seed=5).load_state_dict(state)


def test_states_of_before_there_were_blocks(shards: ActivationShards) -> None:
    loader = shards.loader(10)
    before = order(loader, batches=3)
    state = loader.state_dict()
    del state["blocks"]
    again = shards.loader(10)
    again.load_state_dict(state)
    assert before + order(again) == epoch_order(0, 0)


class Cold:
    """Shards that come from the disk, and the rows that the system is asked for."""

    is_cold = True

    def __init__(self, shards: ActivationShards) -> None:
        self.shards = shards
        self.asked: list[int] = []

    def will_be_read(self, start: int, stop: int) -> None:
        self.asked += range(start, stop)

    def __len__(self) -> int:
        return len(self.shards)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.shards, name)


@pytest.mark.parametrize("skipped", [0, 1, 2, 3, 9, 14])
@pytest.mark.parametrize("size", [7, 45])
def test_windows_are_asked_for_once_from_wherever_a_loop_begins(
    shards: ActivationShards, skipped: int, size: int
) -> None:
    whole = order(shards.loader(size, seed=5, blocks=(10, 3)))
    first = shards.loader(size, seed=5, blocks=(10, 3))
    order(first, skipped) if skipped else None
    cold: Any = Cold(shards)
    loader = shards.loader(size, seed=5, blocks=(10, 3))
    loader.shards = cold
    loader.load_state_dict(first.state_dict())
    seen = order(loader)
    assert seen == whole[skipped * size :] or not whole[skipped * size :]
    assert set(seen) <= set(cold.asked)
    assert len(set(cold.asked)) == len(cold.asked)


@pytest.mark.parametrize("blocks", [(0, 1), (1, 0), (1,), (1.0, 2), 5, "ab"])
def test_bad_blocks(shards: ActivationShards, blocks: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="block"):
        shards.loader(10, blocks=blocks)


# -- reading ahead -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> ActivationShards:
    """Rows large enough for batches to be read ahead, in several shards."""
    folder = tmp_path_factory.mktemp("loader") / "wide"
    x = torch.arange(WIDE_ROWS, dtype=torch.float32)[:, None] + torch.zeros(1, WIDE)
    with ActivationWriter(folder, WIDE, "float32", rows_per_shard=300) as writer:
        writer.write(x, tokens=range(WIDE_ROWS))
    return ActivationShards(folder)


WIDE, WIDE_ROWS = 1024, 1000


@pytest.fixture(autouse=True)
def batches_of_any_size_are_read_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("r1sae_fast.shards.loader._AHEAD_BYTES", 256 << 10)


@pytest.mark.parametrize("prefetch", [0, 1, 3, 50])
@pytest.mark.parametrize("options", [{}, {"shuffle": False}, {"blocks": (100, 2)}])
def test_reading_ahead_changes_nothing(
    wide: ActivationShards, prefetch: int, options: dict[str, Any]
) -> None:
    expected = order(wide.loader(70, seed=1, epochs=2, prefetch=0, **options))
    loader = wide.loader(70, seed=1, epochs=2, prefetch=prefetch, **options)
    assert order(loader) == expected
    assert sorted(expected[:WIDE_ROWS]) == [*range(WIDE_ROWS)]


def test_batches_that_are_held_stay_as_they_were(wide: ActivationShards) -> None:
    """Memory is used again, but never while somebody can see it."""
    loader = wide.loader(100, seed=2, epochs=3)
    views = []
    for number, batch in enumerate(loader):
        if number % 3 == 0:
            # A view alone keeps the memory; so does the caller's own writing.
            batch.activations[:, 0] = -1.0
            views.append((batch.tokens.clone(), batch.activations[:, 1:]))
    assert len(views) == 10
    for tokens, view in views:
        assert torch.equal(view, tokens.float()[:, None].expand_as(view))


def test_memory_is_used_again(wide: ActivationShards) -> None:
    loader = wide.loader(100, epochs=4, prefetch=1)
    addresses = {batch.activations.data_ptr() for batch in loader}
    # One with the caller, one in the making, one read, one about to be freed; a pool that is just
    # in use by another thread gives a new one. Of 40.
    assert len(addresses) <= 10


def test_a_state_loaded_in_the_loop_counts(wide: ActivationShards) -> None:
    loader = wide.loader(100, seed=4)
    start = loader.state_dict()
    found: list[int] = []
    for number, batch in enumerate(loader):
        found += batch.tokens.tolist()
        if number == 2:
            loader.load_state_dict(start)
    whole = order(wide.loader(100, seed=4))
    assert found == whole[:300] + whole


def test_two_loops_share_one_epoch(wide: ActivationShards) -> None:
    loader = wide.loader(100, seed=4)
    first, second = iter(loader), iter(loader)
    found = [row for _ in range(5) for it in (first, second) for row in next(it).tokens.tolist()]
    assert found == order(wide.loader(100, seed=4))


def test_errors_come_with_their_batch(tmp_path: Path) -> None:
    """A file that changes under the loader is told of, not crashed on, and the thread ends."""
    folder = tmp_path / "shards"
    with ActivationWriter(folder, WIDE, "float32", rows_per_shard=300) as writer:
        writer.write(torch.zeros(600, WIDE))
    shards = ActivationShards(folder)
    loader = shards.loader(100)
    batches = iter(loader)
    next(batches)
    loader.seed = -1  # what only an error can come of
    loader.load_state_dict({**loader.state_dict(), "row": 300})
    with pytest.raises(OverflowError):
        next(batches)


def test_pinned_memory_needs_a_gpu(wide: ActivationShards) -> None:
    if torch.cuda.is_available():
        loader = wide.loader(100, pin_memory=True)
        assert all(batch.activations.is_pinned() for batch in loader)
    else:
        with pytest.raises(ValueError, match="pin_memory is for copies to a CUDA GPU"):
            wide.loader(100, pin_memory=True)


@pytest.mark.parametrize("prefetch", [-1, 1.5, True])
def test_bad_prefetch(shards: ActivationShards, prefetch: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="prefetch"):
        shards.loader(10, prefetch=prefetch)


def test_a_loader_is_copied_at_its_place(shards: ActivationShards) -> None:
    loader = shards.loader(7, seed=3, epochs=None)
    batches = iter(loader)
    for _ in range(3):
        next(batches)
    copied = iter(pickle.loads(pickle.dumps(loader)))  # noqa: S301  # its own
    for _ in range(40):  # into the next epochs
        assert torch.equal(next(copied).activations, next(batches).activations)
