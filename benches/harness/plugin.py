"""The fixtures and options of benches: ``from harness.plugin import *`` in a conftest.py.

Fixtures: ``versus`` (see :mod:`harness.versus`), ``shape``, ``peers``, ``generator``. Options:
``--shapes small`` (the default; seconds) or ``r1`` (d_in 7168, d_sae 28,672; gigabytes),
``--versus-json PATH``, ``--versus-seconds S`` (the budget of one contest), ``--no-peers``.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from harness import machine, results
from harness.shapes import SHAPES, Shape
from harness.timing import Result
from harness.versus import Versus
from peers import Peer, installed

RESULTS: pytest.StashKey[list[Result]] = pytest.StashKey()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("versus", "contests of our paths with others")
    group.addoption("--shapes", choices=sorted(SHAPES), default="small", help="the sizes to run")
    group.addoption("--versus-json", type=Path, help="where to write the results as JSON")
    group.addoption("--versus-seconds", type=float, default=1.0, help="seconds for a contest")
    group.addoption("--no-peers", action="store_true", help="leave other libraries out")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RESULTS] = []


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: Any) -> None:
    machine_info.update(machine.facts())


def pytest_sessionfinish(session: pytest.Session) -> None:
    path = session.config.getoption("--versus-json")
    found = session.config.stash[RESULTS]
    if path is not None and found:
        results.write(path, found)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    found = config.stash[RESULTS]
    if found:
        terminalreporter.section("ours and the others (x: times as long as ours)")
        terminalreporter.line(f"{machine.cpu_class()}, torch {torch.__version__}")
        for result in found:
            terminalreporter.line(result.line())


@pytest.fixture
def generator() -> torch.Generator:
    """The same numbers in every run."""
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def shape(request: pytest.FixtureRequest) -> Shape:
    """The sizes of this run: rows, d_in, d_sae, k."""
    return SHAPES[request.config.getoption("--shapes")]


@pytest.fixture
def versus(benchmark: Any, request: pytest.FixtureRequest, shape: Shape) -> Versus:
    """Times ours against the torch reference and peers; see :mod:`harness.versus`."""
    test = f"{request.node.path}::{request.node.nodeid.partition('::')[2]}"
    seconds = request.config.getoption("--versus-seconds")
    return Versus(benchmark, shape.name, test, seconds, request.config.stash[RESULTS])


@pytest.fixture(scope="session")
def peers(request: pytest.FixtureRequest) -> dict[str, Callable[..., Peer]]:
    """The other libraries that are installed, by name: each builds its SAE from given weights."""
    return {} if request.config.getoption("--no-peers") else installed()


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """Gives torch its threads back after a bench that changed them."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
