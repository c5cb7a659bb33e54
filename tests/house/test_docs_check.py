"""``make docs-check`` runs what a page shows, and fails where the page is wrong."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def check(tmp_path: Path, page: str) -> subprocess.CompletedProcess[str]:
    path = tmp_path / "page.md"
    path.write_text(page)
    command = [sys.executable, str(ROOT / ".ci" / "check_docs.py"), str(path)]
    return subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)


def test_blocks_run_in_order_in_one_folder(tmp_path: Path) -> None:
    page = (
        "```console\n$ echo one > file\nnot a command\n$ cat file \\\n    | grep one\n```\n"
        "```python\nfrom pathlib import Path\nassert Path('file').read_text() == 'one\\n'\n```\n"
        "```console\n$ git clone https://example.invalid/r1sae-fast\n$ make lint\n```\n"
        "```\n$ false\n```\n"
    )
    result = check(tmp_path, page)
    assert result.returncode == 0, result.stdout
    assert result.stdout.count("ok  ") == 4


def test_a_failing_command_fails_the_check_and_shows_its_output(tmp_path: Path) -> None:
    result = check(tmp_path, "\n```console\n$ echo why; exit 3\n$ echo never\n```\n")
    assert result.returncode == 1
    assert "FAIL" in result.stdout
    assert "why" in result.stdout
    assert "never" not in result.stdout


def test_an_unknown_make_verb_fails(tmp_path: Path) -> None:
    assert check(tmp_path, "```console\n$ make no-such-verb\n```\n").returncode == 1


def test_a_warning_in_an_example_fails(tmp_path: Path) -> None:
    result = check(tmp_path, "```python\nimport warnings\nwarnings.warn('old name')\n```\n")
    assert result.returncode == 1
    assert "old name" in result.stdout


def test_a_page_with_nothing_to_run_fails(tmp_path: Path) -> None:
    assert check(tmp_path, "only words\n").returncode == 1
