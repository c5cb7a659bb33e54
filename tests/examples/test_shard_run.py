"""Examples from code shards: the same as from memory, stopped and resumed at any moment."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from types import FrameType

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from r1sae_fast import _core
from r1sae_fast.cli.main import app
from r1sae_fast.codes import SparseCodes
from r1sae_fast.errors import ShardError
from r1sae_fast.examples import Examples, collect_examples, shard_run
from r1sae_fast.shards import CodeShards, CodeWriter

D_SAE = 37


def some_codes(rows: int, seed: int = 0, d_sae: int = D_SAE) -> SparseCodes:
    generator = np.random.default_rng(seed)
    # Quantised, so that ties abound.
    strengths = generator.integers(1, 50, (rows, d_sae)) / 8
    dense = strengths * (generator.random((rows, d_sae)) < 0.2)
    return SparseCodes.from_dense(torch.from_numpy(dense.astype(np.float32)))


def write(folder: Path, codes: SparseCodes, *, rows_per_shard: int, resume: bool = False) -> None:
    with CodeWriter(folder, codes.d_sae, rows_per_shard=rows_per_shard, resume=resume) as writer:
        writer.write(codes)


@pytest.fixture
def every_shard_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that small data has many moments at which a checkpoint is due."""
    monkeypatch.setattr(shard_run, "_GROUP_NNZ", 1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("d_sae", [D_SAE, 70_000])
def test_shards_give_what_memory_gives(tmp_path: Path, dtype: str, d_sae: int) -> None:
    narrow = some_codes(123)
    # Spread the same codes over more features, so that indices take 32 bits.
    spread = narrow.indices * (d_sae // D_SAE)
    codes = SparseCodes(narrow.values, spread, narrow.row_offsets, d_sae)
    with CodeWriter(tmp_path / "codes", d_sae, values_dtype=dtype, rows_per_shard=50) as writer:
        writer.write(codes)
    expected = collect_examples(codes, n=5)
    shards = CodeShards(tmp_path / "codes")
    assert collect_examples(shards, n=5).equal(expected)
    assert collect_examples(tmp_path / "codes", n=5, threads=1).equal(expected)
    later = collect_examples(shards, n=5, first_row=1000)
    assert torch.equal(later.rows, torch.where(expected.rows < 0, -1, expected.rows + 1000))


def test_a_folder_without_rows(tmp_path: Path) -> None:
    write(tmp_path / "codes", some_codes(0), rows_per_shard=10)
    examples = collect_examples(tmp_path / "codes", checkpoint=tmp_path / "c")
    assert (examples.scanned, int(examples.counts.sum())) == (0, 0)


def test_the_order_of_shards_does_not_show(tmp_path: Path) -> None:
    codes = some_codes(500)
    write(tmp_path / "codes", codes, rows_per_shard=60)
    shards = CodeShards(tmp_path / "codes")
    starts = accumulate(shards.rows_per_file, initial=0)
    files = list(zip(shards.paths, starts, shards.rows_per_file, strict=False))
    expected = collect_examples(codes, n=6)
    for seed in range(5):
        random.Random(seed).shuffle(files)
        accumulator = _core.ExampleAccumulator(D_SAE, 6, 4, 0)
        for part in (files[:3], files[3:]):
            accumulator.add_shards(part, 2)
        strengths, rows, histogram, sums, *samples, scanned = accumulator.parts()
        assert np.array_equal(strengths, expected.strengths.numpy())
        assert np.array_equal(rows, expected.rows.numpy())
        assert np.array_equal(histogram, expected.histogram.numpy())
        assert np.array_equal(sums.view(np.int64), expected.fixed_sums.numpy())
        assert np.array_equal(samples[0], expected.sample_offsets.numpy())
        assert np.array_equal(samples[1], expected.sample_strengths.numpy())
        assert np.array_equal(samples[2], expected.sample_rows.numpy())
        assert scanned == 500


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_shards_are_mapped_one_after_the_other(tmp_path: Path) -> None:
    """Memory, that of mapped files included, does not grow with the number of shards."""
    rows, k = 4096, 32
    values = torch.rand(rows, k).sort(dim=1, descending=True).values + 0.1
    indices = torch.arange(k, dtype=torch.int32).repeat(rows)
    codes = SparseCodes(values.reshape(-1), indices, torch.arange(0, rows * k + 1, k), 64)
    write(tmp_path / "codes", codes, rows_per_shard=rows)
    path = str(tmp_path / "codes" / "shard-000000.safetensors")
    accumulator = _core.ExampleAccumulator(64, 2, 0, 0)
    many = [(Path(path), i * rows, rows) for i in range(300)]
    seen = {0}
    done = threading.Event()

    def look() -> None:
        while not done.is_set():
            seen.add(Path("/proc/self/maps").read_text().count(path))

    looking = threading.Thread(target=look)
    looking.start()
    try:
        accumulator.add_shards(many, 2)
    finally:
        done.set()
        looking.join()
    assert max(seen) <= 30
    assert path not in Path("/proc/self/maps").read_text()


@pytest.mark.usefixtures("every_shard_a_group")
def test_a_bad_shard_is_named_and_what_was_done_is_kept(tmp_path: Path) -> None:
    codes = some_codes(300)
    write(tmp_path / "codes", codes, rows_per_shard=100)
    shards = CodeShards(tmp_path / "codes")
    last = shards.paths[-1]
    whole = last.read_bytes()
    checkpoint = tmp_path / "checkpoint"

    last.write_bytes(whole[:-4])
    with pytest.raises(ShardError, match=last.name):
        collect_examples(shards, n=4, checkpoint=checkpoint)
    assert Examples.load(checkpoint).scanned == 200

    # A strength turned into a NaN: the bits of the last one in the file's values.
    nan = np.array([np.nan], dtype=np.float32).tobytes()
    some = codes[200:].values[:4].numpy().tobytes()
    last.write_bytes(whole.replace(some, some[:12] + nan))
    with pytest.raises(ShardError, match=rf"{last.name}: strength NaN in row 20\d"):
        collect_examples(shards, n=4, checkpoint=checkpoint)

    last.write_bytes(whole)
    assert collect_examples(shards, n=4, checkpoint=checkpoint).equal(collect_examples(codes, n=4))


@pytest.mark.usefixtures("every_shard_a_group")
def test_a_finished_checkpoint_goes_on_with_new_shards(tmp_path: Path) -> None:
    codes, checkpoint = some_codes(400), tmp_path / "checkpoint"
    write(tmp_path / "codes", codes[:200], rows_per_shard=50)
    collect_examples(tmp_path / "codes", n=3, checkpoint=checkpoint)
    first = CodeShards(tmp_path / "codes").paths[0]
    write(tmp_path / "codes", codes[200:], rows_per_shard=50, resume=True)
    shards = CodeShards(tmp_path / "codes")
    first.unlink()  # what is done is not read again
    assert collect_examples(shards, n=3, checkpoint=checkpoint).equal(collect_examples(codes, n=3))


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    write(tmp_path / "one", some_codes(90, seed=1), rows_per_shard=30)
    write(tmp_path / "two", some_codes(90, seed=2), rows_per_shard=30)
    collect_examples(tmp_path / "one", n=3, checkpoint=checkpoint)
    kept = checkpoint.read_bytes()
    with pytest.raises(ValueError, match="made from other shards"):
        collect_examples(tmp_path / "two", n=3, checkpoint=checkpoint)
    with pytest.raises(ValueError, match="made from other shards"):
        collect_examples(tmp_path / "one", n=3, checkpoint=checkpoint, first_row=5)
    for changes, words in (
        ({"n": 4}, "n = 3, .* the run is of d_sae = 37 and n = 4,"),
        ({"samples": 2}, "samples = 4, .* samples = 2,"),
        ({"seed": 7}, "seed = 0; .* seed = 7;"),
    ):
        with pytest.raises(ValueError, match=words):
            collect_examples(tmp_path / "one", **{"n": 3, **changes}, checkpoint=checkpoint)
    assert checkpoint.read_bytes() == kept
    collect_examples(tmp_path / "one", n=3).save(checkpoint)  # examples, but no checkpoint
    with pytest.raises(ValueError, match="made from other shards"):
        collect_examples(tmp_path / "one", n=3, checkpoint=checkpoint)
    checkpoint.write_bytes(b"junk")
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        collect_examples(tmp_path / "one", n=3, checkpoint=checkpoint)


def test_a_shard_of_other_rows_than_the_manifest_says(tmp_path: Path) -> None:
    write(tmp_path / "codes", some_codes(20), rows_per_shard=20)
    path = CodeShards(tmp_path / "codes").paths[0]
    with pytest.raises(ShardError, match=r"holds 20 rows, but its manifest line says 21"):
        _core.ExampleAccumulator(D_SAE, 2, 0, 0).add_shards([(path, 0, 21)], 1)


class _StopNow(Exception):
    """Raised by a signal's handler, as ctrl-c raises KeyboardInterrupt."""


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs a timer signal")
def test_a_signal_stops_the_core_at_once(tmp_path: Path) -> None:
    rows, k = 4000, 250
    values = torch.arange(rows * k, 0, -1, dtype=torch.float32)
    indices = torch.arange(k, dtype=torch.int32).repeat(rows)
    codes = SparseCodes(values, indices, torch.arange(0, rows * k + 1, k), 1000)
    write(tmp_path / "codes", codes, rows_per_shard=rows)
    path = CodeShards(tmp_path / "codes").paths[0]
    # A million codes, very often: minutes.
    many = [(path, i * rows, rows) for i in range(30_000)]

    def stop(number: int, frame: FrameType | None) -> None:
        raise _StopNow

    accumulator = _core.ExampleAccumulator(1000, 5, 4, 0)
    before = signal.signal(signal.SIGALRM, stop)
    try:
        with pytest.raises(_StopNow):  # noqa: PT012  # nor may it come before
            signal.setitimer(signal.ITIMER_REAL, 0.3)
            accumulator.add_shards(many, 2)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert accumulator.scanned == 0
    accumulator.add_shards(many[:1], 1)
    assert accumulator.scanned == rows


# Imports once, then runs each request in a fork. A run that is to die does so a random moment after
# so many checkpoints of its own, so that a slow machine and a fast one see the same kills.
_SERVER = """
import os, signal, sys, threading
from pathlib import Path
from r1sae_fast.examples import collect_examples, shard_run
shard_run._GROUP_NNZ = 1
folder = Path(sys.argv[1])
save = shard_run.ShardRun._save
def die(): os.kill(os.getpid(), signal.SIGKILL)
print("ready", flush=True)
for line in sys.stdin:
    name, saves, seconds = line.split()
    child = os.fork()
    if child == 0:
        done = 0
        def count(self, accumulator, path):
            global done
            save(self, accumulator, path)
            done += 1
            if done == int(saves):
                threading.Timer(float(seconds), die).start()
            if int(saves) and done == int(saves) + 3:
                die()
        shard_run.ShardRun._save = count
        checkpoint = folder.with_name(name)
        collect_examples(folder, n=7, threads=2, checkpoint=checkpoint, checkpoint_seconds=0)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", _SERVER, str(tmp_path / "codes")]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_random_moments_it_ends_with_the_same_bits(
    tmp_path: Path, server: subprocess.Popen[str]
) -> None:
    codes = some_codes(5000)
    write(tmp_path / "codes", codes, rows_per_shard=50)
    assert server.stdin is not None
    assert server.stdout is not None
    assert server.stdout.readline() == "ready\n"

    def run(checkpoint: str, saves: int = 0, seconds: float = 0) -> int:
        """A run, killed so long after so many checkpoints unless 0; its exit status."""
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdin.write(f"{checkpoint} {saves} {seconds}\n")
        server.stdin.flush()
        return int(server.stdout.readline())

    start = time.monotonic()
    assert run("undisturbed") == 0
    between = (time.monotonic() - start) / 100  # two checkpoints, of one group of 50 rows each

    moments = random.Random(5)
    reached = [0]
    for _ in range(20):
        assert run("killed", 1, moments.uniform(0, 2 * between)) == -signal.SIGKILL
        # A checkpoint is whole at any moment, and never goes back.
        reached.append(Examples.load(tmp_path / "killed").scanned)
        assert reached[-1] % 50 == 0
        assert reached[-1] > reached[-2]
    assert reached[-1] < 5000
    assert run("killed") == 0
    expected = collect_examples(codes, n=7)
    for name in ("undisturbed", "killed"):
        assert Examples.load(tmp_path / name).equal(expected)


def test_the_command(tmp_path: Path) -> None:
    codes = some_codes(120)
    write(tmp_path / "codes", codes, rows_per_shard=50)
    out = tmp_path / "examples.safetensors"
    command = ["examples", str(tmp_path / "codes"), str(out), "-n", "4"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "120 rows" in result.output
    assert "37 of 37 features alive" in result.output
    assert Examples.load(out).equal(collect_examples(codes, n=4))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["codes", out.name]

    again = CliRunner().invoke(app, command)
    assert again.exit_code == 1
    assert "exists already; pass --overwrite" in again.stderr
    assert CliRunner().invoke(app, [*command, "--overwrite"]).exit_code == 0
    missing = CliRunner().invoke(app, ["examples", str(tmp_path / "none"), str(tmp_path / "x")])
    assert missing.exit_code == 1
    assert "no such folder" in missing.stderr
