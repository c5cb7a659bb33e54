"""House rules that no other linter knows; prints each breach as ``file:line: what`` and exits 1.

- no absolute path of one machine, no address of a package host, no conflict marker in a text file;
- the crate rust/core never names pyo3, nor depends on it;
- relative links in the Markdown pages lead to something;
- the changelog knows the version in Cargo.toml;
- no file above 1 MB, apart from the shipped model's weights, which stay within 12 MB together.
"""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WEIGHTS = Path("python/r1sae_fast/tiny_r1")
MAX_FILE, MAX_WEIGHTS = 1 << 20, 12_000_000

LINE_RULES = [
    (re.compile(r"(?<![\w.~}$)/-])/(?:home|root|Users|work|opt|mnt)/\w"), "path of one machine"),
    (re.compile(r"https?://(?:[\w-]+\.)*(?:pypi|pythonhosted|pytorch)\.org/(?:simple|whl|packages)"),
     "address of a package host"),
    (re.compile(r"^(?:<{7}|>{7}) "), "conflict marker"),
]  # fmt: skip
LINK = re.compile(r"\]\((?!https?:|#|mailto:)([^)\s#]+)")


def tracked() -> list[Path]:
    """Every file that git tracks or would track, relative to the root."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return sorted(Path(name) for name in listing.split("\0") if name and (ROOT / name).is_file())


def text_of(path: Path) -> str | None:
    """The file's text; None where it is binary."""
    data = (ROOT / path).read_bytes()
    if b"\0" in data:
        return None
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None


def breaches() -> Iterator[str]:
    """Every breach found, one line each."""
    weights = 0
    for path in tracked():
        size = (ROOT / path).stat().st_size
        if path.is_relative_to(WEIGHTS):
            weights += size
        elif size > MAX_FILE:
            yield f"{path}: {size} bytes, more than {MAX_FILE}"
        text = text_of(path)
        if text is not None:
            yield from text_breaches(path, text)
    if weights > MAX_WEIGHTS:
        yield f"{WEIGHTS}: {weights} bytes together, more than {MAX_WEIGHTS}"
    yield from core_breaches()
    version = re.search(r'^version = "(.+)"$', (ROOT / "Cargo.toml").read_text(), re.MULTILINE)
    if version is None or f"## [{version[1]}]" not in (ROOT / "CHANGELOG.md").read_text():
        yield "CHANGELOG.md: no section for the version in Cargo.toml"


def text_breaches(path: Path, text: str) -> Iterator[str]:
    """Breaches in one text file."""
    for number, line in enumerate(text.splitlines(), start=1):
        for pattern, what in LINE_RULES:
            if pattern.search(line):
                yield f"{path}:{number}: {what}: {line.strip()[:100]}"
    written_by_hand = not path.is_relative_to(WEIGHTS)
    if written_by_hand and text and not text.endswith("\n"):
        yield f"{path}: no newline at its end"
    if path.suffix == ".md":
        for target in LINK.findall(text):
            if not (ROOT / path.parent / target).exists():
                yield f"{path}: link to {target}, which is not there"


def core_breaches() -> Iterator[str]:
    """Places where the pure crate names pyo3."""
    for path in sorted((ROOT / "rust/core").rglob("*.rs")):
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            if re.search(r"\bpyo3\b", line):
                yield f"{path.relative_to(ROOT)}:{number}: the core names pyo3: {line.strip()}"
    command = ["cargo", "tree", "--locked", "-p", "r1sae-core", "-e", "all", "--prefix", "none"]
    tree = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for line in tree.splitlines():
        if line.startswith("pyo3"):
            yield f"rust/core/Cargo.toml: depends on {line}"


def main() -> int:
    """Prints the breaches; 1 if there are any."""
    found = list(breaches())
    sys.stdout.writelines(f"{line}\n" for line in found)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
