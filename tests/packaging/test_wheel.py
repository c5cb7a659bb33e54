"""The wheel and the sdist hold what they should, and the sdist builds a wheel that works.

Built with the release profile into the repository's own target folder, so that the dependencies'
compilation is shared with ``make install``.
"""

import base64
import csv
import hashlib
import importlib.util
import io
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "python" / "r1sae_fast"

pytestmark = [
    pytest.mark.slow,
    # One process builds, the others test on.
    pytest.mark.xdist_group("packaging"),
    pytest.mark.skipif(shutil.which("cargo") is None, reason="building needs cargo"),
]


def maturin(*arguments: str, cwd: Path) -> None:
    """Runs maturin, its output shown where it fails."""
    command = [sys.executable, "-m", "maturin", *arguments]
    # A target of its own: any other build at work in the tree's would take its library away.
    environment = {**os.environ, "CARGO_TARGET_DIR": str(ROOT / "target" / "packaging")}
    result = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=1800, check=False
    )
    assert result.returncode == 0, result.stderr


def build_wheel(source: Path, out: Path) -> Path:
    """Builds the release wheel of the tree `source` into `out`."""
    maturin("build", "--release", "--locked", "--out", str(out), cwd=source)
    (wheel,) = out.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel built from the working tree."""
    return build_wheel(ROOT, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist of the working tree."""
    out = tmp_path_factory.mktemp("sdist")
    maturin("sdist", "--out", str(out), cwd=ROOT)
    (sdist,) = out.glob("*.tar.gz")
    return sdist


def package_files() -> set[str]:
    """What git tracks, or would track, of the package, as paths in the wheel."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--"]
    listing = subprocess.run(
        [*command, "python", "triton_kernels"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.splitlines()
    link = "python/r1sae_fast/triton_kernels"
    return {
        f"r1sae_fast/{name}" if name.startswith("triton_kernels/") else name.removeprefix("python/")
        for name in listing
        if name != link and (ROOT / name).exists()
    }


def test_the_wheel_holds_every_file_of_the_package(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    extension = {
        name for name in packed if name.startswith("r1sae_fast/_core.") and name.endswith("so")
    }
    assert len(extension) == 1
    assert packed - extension == package_files()
    assert "r1sae_fast/triton_kernels/__init__.py" in packed


def test_the_wheel_holds_the_model_byte_for_byte(wheel: Path) -> None:
    weights = sorted((PACKAGE / "tiny_r1").rglob("*.safetensors"))
    assert weights, "no weights below python/r1sae_fast/tiny_r1"
    with zipfile.ZipFile(wheel) as archive:
        for path in weights:
            name = path.relative_to(PACKAGE.parent).as_posix()
            assert archive.read(name) == path.read_bytes()


def test_the_wheel_is_abi3_and_its_record_is_true(wheel: Path) -> None:
    assert "-cp310-abi3-" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        (record,) = (name for name in archive.namelist() if name.endswith(".dist-info/RECORD"))
        for name, digest, size in csv.reader(io.StringIO(archive.read(record).decode())):
            if name != record:
                data = archive.read(name)
                expected = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=")
                assert digest == f"sha256={expected.decode()}"
                assert int(size) == len(data)


def test_the_wheel_names_its_script_and_licence(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        by_name = {name.split(".dist-info/")[-1]: name for name in archive.namelist()}
        scripts = archive.read(by_name["entry_points.txt"]).decode()
        metadata = archive.read(by_name["METADATA"]).decode()
    assert "r1sae=r1sae_fast.cli.main:main" in scripts
    assert "License-Expression: MIT" in metadata
    assert "Requires-Python: >=3.10" in metadata
    assert "licenses/LICENSE" in by_name


def test_the_sdist_holds_every_source(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    crates = (ROOT / "rust" / name for name in ("core", "python"))
    sources = {p.relative_to(ROOT).as_posix() for crate in crates for p in crate.rglob("*.rs")}
    sources |= {f"python/{name}" for name in package_files()}
    sources |= {"Cargo.toml", "Cargo.lock", "pyproject.toml", "LICENSE", "README.md", "PKG-INFO"}
    assert sources - packed == set()


def test_the_sdist_builds_a_wheel_that_runs(sdist: Path, wheel: Path, tmp_path: Path) -> None:
    with tarfile.open(sdist) as archive:
        # Early patch releases of 3.10 and 3.11 don't know the argument, later Pythons want it.
        safe: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        archive.extractall(tmp_path / "source", **safe)
    (source,) = (tmp_path / "source").iterdir()
    for path in source.rglob("*.rs"):
        path.touch()  # newer than the build of the working tree: these files are compiled
    second = build_wheel(source, tmp_path / "out")
    with zipfile.ZipFile(wheel) as first_archive, zipfile.ZipFile(second) as archive:
        assert sorted(archive.namelist()) == sorted(first_archive.namelist())
        archive.extractall(tmp_path / "site")
    # Isolated from the editable install: only the unpacked wheel offers the package.
    code = (
        "import sys; sys.path.insert(0, sys.argv.pop())\n"
        "import r1sae_fast, r1sae_fast._core as core, r1sae_fast.triton_kernels as kernels\n"
        "assert not core.DEBUG_BUILD\n"
        "print(r1sae_fast.__file__, core.__file__, kernels.__file__, sep='\\n')\n"
        "from r1sae_fast.cli.main import app\n"
        "app(['--version'])\n"
    )
    result = subprocess.run(
        [sys.executable, "-I", "-W", "error", "-c", code, str(tmp_path / "site")],
        cwd=tmp_path, capture_output=True, text=True, timeout=1800, check=True,
    )  # fmt: skip
    *files, version = result.stdout.splitlines()
    assert len(files) == 3
    assert all(file.startswith(str(tmp_path / "site")) for file in files)
    assert version.startswith("r1sae ")


RESIDUAL = """
import r1sae_fast, torch
from r1sae_fast import tiny_r1
from r1sae_fast.r1 import LocalEngine
engine = LocalEngine.from_pretrained("tiny-r1", dtype=torch.float32)
residuals = engine.residuals(torch.arange(12).reshape(1, 12), 2)
assert residuals.shape == (1, 12, 256) and bool(residuals.isfinite().all())
print(r1sae_fast.__file__, tiny_r1.path(), sep="\\n")
"""


def test_the_wheel_runs_from_a_venv_of_its_own(wheel: Path, tmp_path: Path) -> None:
    """Installed by an installer, without the network; the dependencies are this environment's."""
    home = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home)], check=True)
    scripts = home / ("Scripts" if os.name == "nt" else "bin")
    python = scripts / "python"
    if importlib.util.find_spec("pip"):
        install = [sys.executable, "-m", "pip", "--python", str(python), "install"]
    elif uv := shutil.which("uv"):
        install = [uv, "pip", "install", "--offline", "--python", str(python)]
    else:
        pytest.skip("installing needs pip or uv")
    subprocess.run([*install, "--no-deps", "--no-index", str(wheel)], check=True)
    query = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = subprocess.run(
        [python, "-c", query], check=True, capture_output=True, text=True
    ).stdout.strip()
    # After the wheel's own folder, so that what is installed editable there stays hidden. Its own
    # .pth files are not read: one of them leads to the source tree.
    (Path(site) / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*command: str | Path) -> str:
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1800,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    shown = run(scripts / "r1sae", "--help")
    assert "harvest" in shown
    assert "demo" in shown
    files = run(python, "-c", RESIDUAL).splitlines()
    assert len(files) == 2
    assert all(Path(file).is_relative_to(site) for file in files)
