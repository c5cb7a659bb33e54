"""The SAEs' weights come through huggingface_hub, from any endpoint."""

import hashlib
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from r1sae_fast.errors import CheckpointError, FetchError
from r1sae_fast.fetch import fetch_weights

CONTENT = b"weights" * 10_000
FILE = "logic/DeepSeek-R1-SAE-l37.pt"


@pytest.fixture
def hub() -> Iterator[str]:
    """What huggingface_hub asks of the hub for one file."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            known = self.path == f"/Goodfire/DeepSeek-R1-SAE-l37/resolve/main/{FILE}"
            body = CONTENT if known else b""
            self.send_response(200 if known else 404)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("ETag", f'"{hashlib.sha256(CONTENT).hexdigest()}"')
            if not known:
                self.send_header("X-Error-Code", "EntryNotFound")
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_weights(hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
        with pytest.raises(FetchError, match=r"takes 70 kB, but 1 kB are free"):
            fetch_weights("logic", tmp_path, endpoint=hub)
    assert not (tmp_path / FILE).exists()
    for _ in range(2):
        path = fetch_weights("logic", tmp_path, endpoint=hub)
        assert path == tmp_path / FILE
        assert path.read_bytes() == CONTENT
    with pytest.raises(CheckpointError, match=r"has no DeepSeek-R1-SAE-l37\.pt"):
        fetch_weights("math", tmp_path, endpoint=hub)
    with pytest.raises(ValueError, match="expected logic or math"):
        fetch_weights("physics", tmp_path, endpoint=hub)
