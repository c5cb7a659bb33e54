"""Torch's threads are let go before long work, and come back."""

import os
import sys

import pytest
import torch

from r1sae_fast.ops import _common, _openmp


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="libgomp is Linux's")
def test_torch_works_on_after_its_threads_were_let_go() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        x = torch.randn(300, 4096)
        expected = x.sum(1)
        for _ in range(3):
            assert _common.threads(_openmp.LONG) == 2
            torch.testing.assert_close(x.sum(1), expected)
    finally:
        torch.set_num_threads(before)


def test_short_work_and_forks_leave_them_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(_openmp, "_pause", lambda: calls.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    _openmp.release_threads(_openmp.LONG - 1)
    assert calls == []
    _openmp.release_threads(_openmp.LONG)
    assert len(calls) == 1
    monkeypatch.setattr(_openmp, "_forked", [True])
    _openmp.release_threads(_openmp.LONG)
    assert len(calls) == 1


@pytest.mark.skipif(not hasattr(os, "register_at_fork"), reason="no forks here")
def test_a_fork_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_openmp, "_forked", [])
    _openmp._after_fork()
    assert _openmp._forked
