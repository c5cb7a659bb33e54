"""Reading shards in a forked process, as torch's ``DataLoader`` has its workers do."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from r1sae_fast import SparseCodes
from r1sae_fast.shards import ActivationWriter, CodeWriter

# Each action needs several of Rust's threads; the first one starts them.
_PROGRAM = """
import os, signal, sys, warnings
warnings.simplefilter("ignore")
import torch
from r1sae_fast import ops
from r1sae_fast.shards import ActivationShards, CodeShards
torch.set_num_threads(2)
activations, codes = ActivationShards(sys.argv[1]), CodeShards(sys.argv[2])
batches = iter(activations.loader(1024, shuffle=False, epochs=None))
pre = torch.randn(64, 9000)
every = torch.arange(len(activations))
actions = {
    "activations": lambda: activations[every].activations,
    "loader": lambda: next(batches).activations,
    "codes": lambda: codes[every].codes.values,
    "ops": lambda: ops.batch_topk(pre, 30).values,
}
first, second = sys.argv[3:]
actions[first]()
expected = actions[second]() if second == first else None
child = os.fork()
if child == 0:
    # The threads don't exist here: whoever waits for them is killed by the alarm.
    signal.alarm(1200)
    found = actions[second]()
    os._exit(0 if expected is None or torch.equal(found, expected) else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
ROWS = 4096


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("fork")
    with ActivationWriter(folder / "activations", 128, "float32") as writer:
        writer.write(torch.randn(ROWS, 128))
    codes = SparseCodes.from_dense(torch.ones(ROWS, 64))
    with CodeWriter(folder / "codes", 64) as code_writer:
        code_writer.write(codes)
    return folder / "activations", folder / "codes"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("activations", "activations"),
        ("activations", "ops"),
        ("loader", "activations"),
        ("ops", "loader"),
        ("codes", "codes"),
        ("codes", "ops"),
        ("ops", "activations"),
        ("ops", "codes"),
    ],
)
def test_a_forked_process_reads_and_selects(
    folders: tuple[Path, Path], first: str, second: str
) -> None:
    command = [sys.executable, "-c", _PROGRAM, *map(str, folders), first, second]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "0"
