"""Rust works on torch's threads, or lets them go; either way both work on."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from r1sae_fast import _core, ops
from r1sae_fast.ops import _common, _openmp

on_linux = pytest.mark.skipif(
    not sys.platform.startswith("linux") or _openmp._library() is None,
    reason="torch runs on no libgomp here",
)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def work_in_turns() -> None:
    """Torch and Rust, each on two threads, several times."""
    x = torch.randn(300, 4096, generator=torch.Generator().manual_seed(0))
    expected = ops.topk_reference(x, 30)
    for _ in range(3):
        total = x.sum(1)
        codes = ops.topk(x, 30)
        found = codes.values, codes.indices, codes.row_offsets
        assert all(torch.equal(one, truth) for one, truth in zip(found, expected, strict=True))
        torch.testing.assert_close(x.sum(1), total)


@pytest.mark.usefixtures("two_threads")
def test_torch_and_rust_work_in_turns() -> None:
    work_in_turns()
    with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(2,)) as elsewhere:
        elsewhere.submit(work_in_turns).result()


_THREADS = """
import os, torch
from r1sae_fast import ops
torch.set_num_threads(2)
x = torch.randn(300, 4096)
x.sum(1)
before = len(os.listdir("/proc/self/task"))
ops.topk(x[:200], 30)  # short
for _ in range(3):
    ops.batch_topk(torch.cat([x] * 4), 30)  # long
print(len(os.listdir("/proc/self/task")) - before)
"""


@on_linux
def test_the_main_thread_makes_no_threads_of_its_own() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _THREADS], capture_output=True, text=True, check=True, timeout=1800
    )
    assert done.stdout == "0\n"


def test_other_threads_let_theirs_go_before_long_work(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[int] = []
    monkeypatch.setattr(_openmp, "_pause", lambda: pauses.append(1))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)

    def elsewhere(numbers: int) -> int:
        thread = threading.Thread(target=_common.threads, args=(numbers,))
        thread.start()
        thread.join()
        return len(pauses)

    assert elsewhere(_openmp.LONG - 1) == 0
    assert elsewhere(_openmp.LONG) == 1
    monkeypatch.setattr(_openmp, "_forked", [True])
    assert elsewhere(_openmp.LONG) == 1
    monkeypatch.setattr(_openmp, "_forked", [])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert elsewhere(_openmp.LONG) == 1


def test_where_there_is_no_libgomp_threads_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_openmp, "_library", lambda: None)
    monkeypatch.setattr(_openmp, "_share", _openmp._share.__wrapped__)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert not _openmp._share()
    assert _common.threads(_openmp.LONG) == 2


@pytest.mark.parametrize(
    ("files", "found"),
    [
        (
            ["{home}.libs/libgomp-24.so", "/env/sklearn.libs/libgomp-a.so.1"],
            "{home}.libs/libgomp-24.so",
        ),
        (["{home}/lib/libiomp5.so", "/env/sklearn.libs/libgomp-a.so.1"], None),
        (["{home}/lib/libgomp.so.1", "{home}vision.libs/libgomp.so.1"], "{home}/lib/libgomp.so.1"),
        (["{home}vision.libs/libgomp-24.so", "/usr/lib/libgomp.so.1"], None),
        (["/usr/lib/libgomp.so.1", "/usr/lib/libc.so.6"], "/usr/lib/libgomp.so.1"),
        (["/usr/lib/libomp.so", "/usr/lib/libgomp.so.1"], None),
        (["/usr/lib/libgompertz/libc.so.6"], None),
    ],
)
def test_the_library_is_the_one_that_torch_runs_on(files: list[str], found: str | None) -> None:
    home = str(Path(torch.__file__).parent)
    expected = found and found.format(home=home)
    assert _openmp._of_torch(file.format(home=home) for file in files) == expected


_HANDLER = """
import signal, torch
from r1sae_fast import FastSAE
torch.set_num_threads(2)
sae = FastSAE(d_in=256, d_sae=4096, k=16)
sae.screen = "int8"
x = torch.randn(2048, 256)
expected = sae.encode_sparse(x).indices
calls, wrong = [], []
def handler(*_):
    a = torch.ones(64, 64, dtype=torch.bfloat16)
    a @ a
    wrong.extend([1] * (not torch.equal(sae.encode_sparse(x[:300]).indices, first)))
    calls.append(1)
first = sae.encode_sparse(x[:300]).indices
signal.signal(signal.SIGALRM, handler)
while len(calls) < 10:
    signal.setitimer(signal.ITIMER_REAL, 0.003)
    wrong.extend([1] * (not torch.equal(sae.encode_sparse(x).indices, expected)))
print(len(wrong))
"""


def test_a_signals_handler_may_encode_by_the_same_sae() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _HANDLER], capture_output=True, text=True, check=True, timeout=1800
    )
    assert done.stdout == "0\n"


def test_an_address_is_asked_for() -> None:
    with pytest.raises(ValueError, match="expected an address"):
        _core.share_openmp(0)


@pytest.mark.skipif(not hasattr(os, "register_at_fork"), reason="no forks here")
def test_a_fork_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_openmp, "_forked", [])
    _openmp._after_fork()
    assert _openmp._forked
