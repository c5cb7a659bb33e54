"""Ctrl-c ends long work in Rust within a second, whatever it does.

Each piece of work takes several seconds; it is interrupted a tenth of a second after it began, in
a process of its own that tells how much it computed until it noticed (a machine that stands still
computes nothing).
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from r1sae_fast import SparseCodes
from r1sae_fast.shards import ActivationWriter, CodeWriter

_PROGRAM = """
import os, signal, sys, threading, time
import numpy as np, torch
from r1sae_fast import SparseCodes, _core, ops
from r1sae_fast.shards import ActivationShards, CodeShards
torch.set_num_threads(1)
{prepare}
sent = []
def interrupt():
    time.sleep(0.1)
    sent.append(time.process_time())
    os.kill(os.getpid(), signal.SIGINT)
helper = threading.Thread(target=interrupt)
try:
    helper.start()
    {work}
    print("over before it could be interrupted" if not sent else "not interrupted")
    helper.join()
except KeyboardInterrupt:
    print(time.process_time() - sent[0] if sent else "interrupted by nobody")
"""

_WIDE = "pre = torch.rand(1000, 32768)"
# All codes of every row: products enough for seconds from little memory.
_FULL = """
rows, d_sae, d_in = 400, 8192, 2048
W_dec = torch.rand(d_sae, d_in)
codes = SparseCodes(
    torch.ones(rows * d_sae), torch.arange(d_sae, dtype=torch.int32).repeat(rows),
    torch.arange(rows + 1) * d_sae, d_sae,
)
"""
# Far more rows asked for than there are: seconds of reading from a small folder.
_MANY = "asked = np.arange(10_000_000) % 1000"

CASES = {
    "topk": (_WIDE, "while True: ops.topk(pre, 16384)"),
    "batch_topk": (_WIDE, "while True: ops.batch_topk(pre, 16384)"),
    "threshold": (_WIDE, "while True: ops.threshold(pre, 0.5)"),
    "decode": (_FULL, "while True: ops.decode(codes, W_dec)"),
    "decode backward": (
        _FULL + "decoded = ops.decode(codes, W_dec.requires_grad_()).sum()",
        "while True: decoded.backward(retain_graph=True)",
    ),
    "gather activations": (
        "shards = ActivationShards(sys.argv[1])\n" + _MANY,
        "while True: shards[asked]",
    ),
    "gather codes": ("shards = CodeShards(sys.argv[2])\n" + _MANY, "while True: shards[asked]"),
    "permutation": ("", "while True: _core.permutation(1 << 40, 0, 0, 0, 1 << 25)"),
    "verify": (
        "shards = ActivationShards(sys.argv[1])",
        "while True: shards.verify()",
    ),
    "checksum": (
        "open(sys.argv[3], 'wb').truncate(1 << 36)",
        "_core.checksum_file(sys.argv[3])",
    ),
}


# The same on the thread that is interrupted, which is one of torch's.
for _name in ("topk", "decode backward"):
    _prepare, _work = CASES[_name]
    CASES[f"{_name} on torch's threads"] = (f"torch.set_num_threads(2)\n{_prepare}", _work)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("ctrl_c")
    with ActivationWriter(folder / "activations", 4, "float8_e4m3") as writer:
        writer.write(torch.randn(1000, 4))
    with CodeWriter(folder / "codes", 64) as code_writer:
        code_writer.write(SparseCodes.from_dense(torch.eye(64)[torch.arange(1000) % 64]))
    return folder / "activations", folder / "codes"


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
@pytest.mark.parametrize("name", CASES)
def test_ctrl_c_is_heard_within_a_second(
    folders: tuple[Path, Path], tmp_path: Path, name: str
) -> None:
    prepare, work = CASES[name]
    program = _PROGRAM.format(prepare=prepare, work=work)
    command = [sys.executable, "-c", program, *map(str, folders), str(tmp_path / "sparse")]
    environment = {**os.environ, "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    took = []
    for _ in range(3):  # a machine may stand still for a moment, but not each time
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=1800, check=False, env=environment
        )
        assert done.returncode == 0, done.stderr
        took.append(done.stdout.strip())
        if done.stdout[:1].isdigit() and float(done.stdout) < 1.0:
            return
    pytest.fail(f"took {took}")
