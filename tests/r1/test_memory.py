"""available_memory(): the system's word and the container's, whichever is less."""

from pathlib import Path

import pytest

from r1sae_fast.r1 import memory


def group(folder: Path, most: str, used: int, caches: int) -> Path:
    (folder / "memory.max").write_text(f"{most}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon {used - caches}\ninactive_file {caches}\n")
    return folder


@pytest.mark.parametrize(
    ("most", "used", "caches", "left"),
    [
        ("1000000", 300_000, 0, 700_000),
        ("1000000", 900_000, 500_000, 600_000),
        ("1000", 5_000, 0, 0),
    ],
)
def test_a_containers_limit_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: str, used: int, caches: int, left: int
) -> None:
    monkeypatch.setattr(memory, "_CGROUP", group(tmp_path, most, used, caches))
    assert memory.available_memory() == left


def test_without_a_limit_it_is_the_systems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_CGROUP", tmp_path / "none")
    found = memory.available_memory()
    if found is None:
        pytest.skip("this system does not say")
    assert found > 1 << 20
    monkeypatch.setattr(memory, "_CGROUP", group(tmp_path, "max", 5, 0))
    assert (memory.available_memory() or 0) > 1 << 20
    monkeypatch.setattr(memory, "_CGROUP", group(tmp_path, "no number", 5, 0))
    assert (memory.available_memory() or 0) > 1 << 20
