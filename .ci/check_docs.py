"""Runs what a Markdown page shows, in the order of the page, in one temporary folder.

    python .ci/check_docs.py README.md

- ```console blocks: each line that opens with ``$ `` (a line that ends in ``\\`` goes on in the
  next) runs in bash with the environment's programs first in PATH. ``$ make VERB`` is only asked of
  make whether it knows how (``make --dry-run`` in the repository): running the suite from within
  itself would not end. ``$ git clone`` and ``$ cd`` into the clone are passed over.
- ```python blocks: each runs as a script of its own, warnings being errors.

Prints each command with its time; the first that fails ends the run: its output, exit code 1.
"""

import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"^```(console|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TIMEOUT_S = 600
CLONE = "r1sae-fast"


@dataclass
class Step:
    """One thing to run: its line in the page, how it is shown, its argument list and folder."""

    line: int
    shown: str
    arguments: list[str]
    folder: Path


def steps(page: str, scratch: Path) -> list[Step]:
    """Everything that the page tells its reader to run."""
    found = []
    for block in BLOCK.finditer(page):
        language, body = block.groups()
        line = page.count("\n", 0, block.start()) + 2
        if language == "python":
            script = [sys.executable, "-W", "error", "-c", body]
            found.append(Step(line, f"python: {body.splitlines()[0]}", script, scratch))
            continue
        for command in re.findall(r"^\$ ((?:.*\\\n)*.*)$", body, re.MULTILINE):
            words = shlex.split(command, comments=True)
            if words[:2] == ["git", "clone"] or words == ["cd", CLONE]:
                continue
            if words[0] == "make":
                found.append(Step(line, command, ["make", "--dry-run", *words[1:]], ROOT))
            else:
                bash = ["bash", "-euo", "pipefail", "-c", command]
                found.append(Step(line, command, bash, scratch))
    return found


def run(step: Step) -> subprocess.CompletedProcess[str]:
    """Runs one step, its output captured."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return subprocess.run(
        step.arguments,
        cwd=step.folder,
        env={**os.environ, "PATH": path, "COLUMNS": "100"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


def main(pages: list[str]) -> int:
    """Runs the pages; 1 at the first failure, or where a page shows nothing to run."""
    for page in pages:
        with tempfile.TemporaryDirectory(prefix="r1sae-docs-") as scratch:
            todo = steps((ROOT / page).read_text(), Path(scratch))
            if not todo:
                print(f"{page}: nothing to run in it")
                return 1
            for step in todo:
                start = time.monotonic()
                result = run(step)
                seconds = time.monotonic() - start
                mark = "ok  " if result.returncode == 0 else "FAIL"
                print(f"{mark} {seconds:6.1f} s  {page}:{step.line}: {step.shown}", flush=True)
                if result.returncode:
                    print(result.stdout)
                    return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or ["README.md"]))
