"""What every test runs under: a hypothesis profile, one torch thread a process, no network.

Profiles (``HYPOTHESIS_PROFILE``): ``dev``, the default, draws anew each time; ``ci``, the default
where ``CI`` is set, always draws the same; ``thorough`` draws many times more.
"""

import contextlib
import ipaddress
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

# What a shell, a CI or a proxy sets changes colours, widths and paths that tests look at.
for _name in (
    *("FORCE_COLOR", "NO_COLOR", "CLICOLOR_FORCE", "PY_COLORS", "GITHUB_ACTIONS", "COLUMNS"),
    *("LINES", "TERMINAL_WIDTH", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "PYTHONWARNINGS"),
    *("R1SAE_S3_ENDPOINT", "R1SAE_TRACEBACK", "RAYON_NUM_THREADS"),
    *(name for name in os.environ if name.lower().endswith("_proxy")),
):
    os.environ.pop(_name, None)
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1,localhost"
# A home may be read-only.
_MATPLOTLIB = tempfile.TemporaryDirectory(prefix="r1sae-matplotlib-")
os.environ["MPLCONFIGDIR"] = _MATPLOTLIB.name

# Triton's kernels run under its interpreter, which is chosen when triton is first imported; with
# R1SAE_TEST_GPU=1 (`make test-gpu`) they run on the GPU.
if os.environ.get("R1SAE_TEST_GPU") != "1":
    os.environ["TRITON_INTERPRET"] = "1"

# Read when torch is first imported, which is after this file: under xdist each process keeps to
# one core, alone it may use all. Set for children too.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("MKL_NUM_THREADS", "1")

# A shell starts jobs in the background with ctrl-c ignored, and children inherit that.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# No deadlines: a shared or loaded machine is no reason for a red test. Health checks stay on.
_COMMON: dict[str, Any] = {
    "deadline": None,
    "print_blob": True,
    "suppress_health_check": [hypothesis.HealthCheck.too_slow],  # by the clock, too
}
hypothesis.settings.register_profile("dev", max_examples=50, **_COMMON)
hypothesis.settings.register_profile(
    "ci", max_examples=100, derandomize=True, database=None, **_COMMON
)
hypothesis.settings.register_profile("thorough", max_examples=2000, **_COMMON)
hypothesis.settings.load_profile(
    os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "dev")
)


# Drawn examples would else hold constants of whatever modules are loaded by then, which xdist
# decides by the clock.
with contextlib.suppress(ImportError, AttributeError):
    from hypothesis.internal.conjecture import providers

    providers._get_local_constants = lambda: providers._local_constants  # stays empty


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Every test draws the same, whatever ran before it."""
    random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Starts the slow tests first, so that no process is left alone with one at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(scope="session", autouse=True)
def no_network() -> Iterator[None]:
    """Lets sockets reach this machine only: a test that calls out fails, and says where to."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("connect", "connect_ex"):
            patch.setattr(socket.socket, name, _loopback_only(getattr(socket.socket, name)))
        yield


def _loopback_only(original: Any) -> Any:
    def connect(self: socket.socket, address: Any) -> Any:
        if self.family in (socket.AF_INET, socket.AF_INET6) and not _is_loopback(address[0]):
            raise PermissionError(f"tests must not use the network: connection to {address!r}")
        return original(self, address)

    return connect


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@pytest.fixture(scope="session")
def run_killed() -> Callable[..., list[str]]:
    """Runs ``kill_harness.py`` with these arguments; its lines."""

    def run(*arguments: object) -> list[str]:
        harness = str(Path(__file__).with_name("kill_harness.py"))
        done = subprocess.run(
            [sys.executable, harness, *map(str, arguments)],
            check=False,
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    return run
