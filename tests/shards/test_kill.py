"""Writers killed at random moments: after resuming, no row is lost and none is there twice."""

import os
import random
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from r1sae_fast.shards import ActivationShards, CodeShards, ManifestWarning

ROWS, WIDTH, PER_SHARD = 2000, 16, 40
KILLS = 12

# Imports once, then forks a writer for each line that it reads (imports would take most of the
# time), and says its end and its time. Told to, a writer kills itself, the given seconds after its
# first shard, and after four of them at the latest: whatever the machine's speed, it is at work.
PROGRAM = """
import os, signal, sys, threading, time
import torch
from r1sae_fast import SparseCodes
from r1sae_fast.shards import ActivationWriter, CodeWriter

rows, width, per_shard = (int(argument) for argument in sys.argv[1:4])

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def write(kind, folder, seconds):
    options = {"rows_per_shard": per_shard, "resume": True}
    if kind == "codes":
        writer = CodeWriter(folder, width, **options)
    else:
        writer = ActivationWriter(folder, width, "float32", **options)
    with writer:
        before, armed = writer.shards, False
        while writer.rows + writer.pending < rows:
            start = writer.rows + writer.pending
            row = torch.arange(start, min(start + 17, rows))
            x = (row[:, None] % (torch.arange(width) + 2)).float()
            data = SparseCodes.from_dense(x) if kind == "codes" else x
            writer.write(data, tokens=row, sequence_id=row // 9, position=row % 9, segment=1)
            finished = writer.shards - before
            if seconds is not None and finished and not armed:
                armed = True
                threading.Timer(seconds, die).start()
            if seconds is not None and finished >= 4:
                die()

for line in sys.stdin:
    kind, folder, seconds = line.split()
    start = time.perf_counter()
    pid = os.fork()
    if pid == 0:
        write(kind, folder, None if seconds == "never" else float(seconds))
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    print(f"{status} {time.perf_counter() - start}\\n", end="", flush=True)
"""


@pytest.fixture
def server() -> Iterator["subprocess.Popen[str]"]:
    command = [sys.executable, "-c", PROGRAM, str(ROWS), str(WIDTH), str(PER_SHARD)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


def run(
    server: "subprocess.Popen[str]", kind: str, folder: Path, seconds: float | str
) -> tuple[bool, float]:
    """Starts a writer, to die ``seconds`` after its first shard. Whether it was done, its time."""
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write(f"{kind} {folder} {seconds}\n")
    server.stdin.flush()
    status, took = server.stdout.readline().split()
    assert int(status) in (0, signal.SIGKILL)
    return int(status) == 0, float(took)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """In memory where possible: the disk's share of the time tells nothing here."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        yield Path(name)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs POSIX signals")
@pytest.mark.parametrize("kind", ["activations", "codes"])
def test_killed_at_random_moments(place: Path, server: "subprocess.Popen[str]", kind: str) -> None:
    folder, undisturbed = place / "killed", place / "undisturbed"
    done, took = run(server, kind, undisturbed, "never")
    assert done
    reader = ActivationShards if kind == "activations" else CodeShards
    draw = random.Random(7)
    latest = 2 * took * PER_SHARD / ROWS
    reached = 0
    for _ in range(KILLS):
        done, _ = run(server, kind, folder, draw.uniform(0, latest))
        assert not done
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ManifestWarning)  # a line may be cut in half
            shards = reader(folder)
        rows = len(shards)
        assert shards[:].tokens.tolist() == list(range(rows))
        assert rows > reached  # what was finished stays
        assert rows % PER_SHARD == 0
        reached = rows
    assert run(server, kind, folder, "never")[0]
    shards = reader(folder)
    shards.verify()
    assert shards[:].tokens.tolist() == list(range(ROWS))
    for name in ["manifest.jsonl", *(path.name for path in reader(undisturbed).paths)]:
        assert (folder / name).read_bytes() == (undisturbed / name).read_bytes(), name
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        path.name for path in undisturbed.iterdir()
    )
