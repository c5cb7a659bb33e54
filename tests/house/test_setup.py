"""``.ci/setup`` names the tool that is missing and the way to get it, before it does anything."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BASH = shutil.which("bash") or "bash"
NEEDED = ("bash", "cat", "dirname", "head", "sed", "sort")  # what the script itself calls


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A folder that is all of PATH: the script's own needs, a cargo, a linker."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in NEEDED:
        found = shutil.which(name)
        assert found is not None, name
        (folder / name).symlink_to(found)
    write_program(folder / "cargo", "echo 'cargo 99.0.0 (0000000 2026-01-01)'")
    write_program(folder / "cc", "true")
    return folder


def write_program(path: Path, script: str) -> None:
    path.write_text(f"#!{BASH}\n{script}\n")
    path.chmod(0o755)


def setup_tools(programs: Path) -> str:
    """Runs ``.ci/setup tools``, which is to fail; its stderr."""
    venv = programs.parent / "venv"
    environment = {"PATH": str(programs), "HOME": str(programs.parent), "VENV": str(venv)}
    result = subprocess.run(
        [BASH, str(ROOT / ".ci" / "setup"), "tools"],
        env=environment, capture_output=True, text=True, timeout=1800, check=False,
    )  # fmt: skip
    assert result.returncode == 1
    assert not venv.exists()
    return result.stderr


def test_no_cargo(programs: Path) -> None:
    (programs / "cargo").unlink()
    message = setup_tools(programs)
    assert "missing: cargo" in message
    assert "https://rustup.rs" in message


def test_an_old_cargo(programs: Path) -> None:
    write_program(programs / "cargo", "echo 'cargo 1.9.0 (0000000 2016-01-01)'")
    message = setup_tools(programs)
    assert "found 1.9.0" in message
    assert "rustup update" in message


def test_no_linker(programs: Path) -> None:
    (programs / "cc").unlink()
    assert "missing: a C linker" in setup_tools(programs)


def test_no_python(programs: Path) -> None:
    message = setup_tools(programs)
    assert "missing: python 3.10 or newer" in message
    assert "make PYTHON=" in message


def test_an_old_python(programs: Path) -> None:
    script = 'if [ "$1" = --version ]; then echo "Python 3.8.18"; else exit 1; fi'
    write_program(programs / "python3", script)
    assert "found: Python 3.8.18" in setup_tools(programs)


def test_a_python_without_venv(programs: Path) -> None:
    script = (
        'case "$2" in *ensurepip*) exit 1;; *"print(sys.executable)"*) echo "$0"; exit;; esac\n'
        f'exec {sys.executable} "$@"'
    )
    write_program(programs / "python3", script)
    message = setup_tools(programs)
    assert "missing: the venv module" in message
    assert "python3-venv" in message


def test_make_help_lists_the_verbs() -> None:
    environment = {**os.environ, "MAKEFLAGS": ""}
    result = subprocess.run(
        ["make"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1800,
        check=True,
    )
    for verb in ("help", "demo", "test", "lint", "bench", "wheel", "docs-check", "clean"):
        assert f"make {verb} " in result.stdout
