"""Whatever the server does, a fetched file is the object, or there is none and a clear word."""

import hashlib
import os
import random
import shutil
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from r1sae_fast.cli.main import app
from r1sae_fast.errors import DatabaseError, FetchError
from r1sae_fast.features.lock import building_lock
from r1sae_fast.fetch import download as downloading
from r1sae_fast.fetch import fetch_features
from r1sae_fast.fetch.catalogue import keys
from r1sae_fast.fetch.features import describe, fetch_object
from r1sae_fast.fetch.journal import Journal
from r1sae_fast.fetch.store import Bucket
from r1sae_fast.fetch.verify import matches_etag

KEY = "logic/logic-0-1.ddb"
PIECE = 1 << 18

Answer = Any  # conftest's


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloading, "_FIRST_WAIT", 0.001)
    monkeypatch.setattr(downloading, "_LONGEST_WAIT", 0.01)


@pytest.fixture
def stored(s3: Any, content: bytes) -> bytes:
    s3.put(KEY, content)
    return content


def fetch(url: str, path: Path, **options: Any) -> bool:
    bucket = Bucket(url, options.pop("read_timeout", None))
    remote = describe(bucket, KEY)
    return fetch_object(bucket, KEY, path, remote, **{"piece": PIECE, "jobs": 4, **options})


def alone(path: Path) -> bool:
    """Whether the file is the only one in its folder."""
    return [file.name for file in path.parent.iterdir()] == [path.name]


def test_keys_of_the_release() -> None:
    assert keys("logic", "0.1%") == ["logic/autointerp.db", "logic/logic-0-1.ddb"]
    assert keys("math", "full", labels=False) == ["math/math.ddb"]
    assert keys("math", "10%")[1:] == ["math/math-10.ddb"]
    assert keys("math", None) == ["math/autointerp.db"]
    for name, sample in (("physics", "1%"), ("math", "2%")):
        with pytest.raises(ValueError, match="expected"):
            keys(name, sample)


@pytest.mark.parametrize("size", [0, 1, PIECE, PIECE + 1, 5 * PIECE - 1])
def test_any_size(s3: Any, content: bytes, tmp_path: Path, size: int) -> None:
    s3.put(KEY, content[:size])
    path = tmp_path / "file.ddb"
    assert fetch(s3.url, path)
    assert path.read_bytes() == content[:size]
    assert alone(path)
    assert not fetch(s3.url, path)  # there already


# Fewer answers without a byte than a range has tries: however requests fall, none gives up.


def cut(answer: Answer) -> None:
    if answer.method == "GET" and answer.number % 3 and answer.number <= 50:
        answer.cut_after = len(answer.body) * (answer.number % 7) // 8


def slow(answer: Answer) -> None:
    answer.at_a_time = 4096


def too_short(answer: Answer) -> None:
    """The server says, and sends, less than was asked for."""
    if answer.method == "GET" and answer.number in (1, 3, 5, 7, 9, 11):
        answer.body = answer.body[:1000]
        answer.headers["Content-Length"] = "1000"


def too_long(answer: Answer) -> None:
    if answer.method == "GET" and answer.number in (1, 3, 5, 7, 9, 11):
        answer.body += b"more"
        answer.headers["Content-Length"] = str(len(answer.body))


def unavailable(answer: Answer) -> None:
    if answer.number in (1, 2, 5, 9, 13, 17) or (answer.method == "HEAD" and answer.heads <= 3):
        answer.status, answer.body = 503, b""
        answer.headers = {"Content-Length": "0"}


@pytest.mark.parametrize("mischief", [cut, slow, too_short, too_long, unavailable])
def test_a_bad_server(stored: bytes, proxy: Any, tmp_path: Path, mischief: Any) -> None:
    proxy.mischief = mischief
    path = tmp_path / "file.ddb"
    assert fetch(proxy.url, path)
    assert path.read_bytes() == stored
    assert alone(path)


def test_a_stalled_connection_is_made_anew(stored: bytes, proxy: Any, tmp_path: Path) -> None:
    proxy.hold_after(PIECE)  # holds for a minute, or until the connection is given up
    path = tmp_path / "file.ddb"
    original = downloading._wait

    async def given_up(failures: int) -> None:
        proxy.hold_after(None)
        await original(failures)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(downloading, "_wait", given_up)
        assert fetch(proxy.url, path, read_timeout=timedelta(seconds=10))
    assert path.read_bytes() == stored


def test_it_goes_on_where_it_was_cut(stored: bytes, proxy: Any, tmp_path: Path) -> None:
    path = tmp_path / "file.ddb"

    def dies(answer: Answer) -> None:
        if answer.method == "GET" and answer.number > 6:
            answer.cut_after = 0

    proxy.mischief = dies
    with pytest.raises(FetchError, match=r"failed 8 times in a row .* is kept: run the same again"):
        fetch(proxy.url, path, jobs=2)
    assert not path.exists()
    assert {file.name for file in tmp_path.iterdir()} == {"file.ddb.part", "file.ddb.part.jsonl"}
    # Six were answered; the last of them may not have come when the other task gave up.
    before = proxy.served
    assert before >= 5 * PIECE
    # A piece that was damaged meanwhile, and a line that a crash cut in half.
    with (tmp_path / "file.ddb.part").open("r+b") as part:
        part.seek(10)
        part.write(b"damaged")
    with (tmp_path / "file.ddb.part.jsonl").open("ab") as journal:
        journal.write(b'{"piece": 5, "cr')
    proxy.mischief = lambda answer: None
    assert fetch(proxy.url, path)
    assert path.read_bytes() == stored
    assert proxy.served - before <= len(stored) - 4 * PIECE
    assert alone(path)


def test_an_object_that_changes_between_tries(
    s3: Any, stored: bytes, proxy: Any, tmp_path: Path
) -> None:
    path = tmp_path / "file.ddb"
    other = stored[::-1]

    def changes(answer: Answer) -> None:
        if answer.number == 4:
            s3.put(KEY, other)

    proxy.mischief = changes
    with pytest.raises(FetchError, match="changed on the server while it was fetched"):
        fetch(proxy.url, path, jobs=1)
    assert not path.exists()
    proxy.mischief = lambda answer: None
    assert fetch(proxy.url, path)
    assert path.read_bytes() == other
    assert alone(path)


def test_a_server_that_does_not_mind_if_match(stored: bytes, proxy: Any, tmp_path: Path) -> None:
    def another(answer: Answer) -> None:
        if answer.method == "GET" and answer.number > 3:
            answer.headers["ETag"] = '"00000000000000000000000000000000"'

    proxy.mischief = another
    with pytest.raises(FetchError, match="changed on the server"):
        fetch(proxy.url, tmp_path / "file.ddb")


def test_wrong_content_is_found_out(stored: bytes, proxy: Any, tmp_path: Path) -> None:
    def flipped(answer: Answer) -> None:
        if answer.number == 2 and answer.body:
            answer.body = bytes([answer.body[0] ^ 1]) + answer.body[1:]

    proxy.mischief = flipped
    path = tmp_path / "file.ddb"
    with pytest.raises(FetchError, match=r"its MD5 is not what the server's ETag .* it was remove"):
        fetch(proxy.url, path)
    assert list(tmp_path.iterdir()) == []
    assert fetch(proxy.url, path)


@pytest.mark.parametrize("status", [403, 404])
@pytest.mark.parametrize("later", [False, True])
def test_refused_or_not_there(
    stored: bytes, proxy: Any, tmp_path: Path, status: int, later: bool
) -> None:
    def refuses(answer: Answer) -> None:
        if answer.method == "GET" or not later:
            answer.status, answer.body, answer.headers = status, b"", {"Content-Length": "0"}

    proxy.mischief = refuses
    with pytest.raises(FetchError, match=rf"logic-0-1\.ddb: .*\({status}"):
        fetch(proxy.url, tmp_path / "file.ddb")
    assert proxy.gets <= 4  # not tried again


def test_a_private_and_a_missing_object(s3: Any, content: bytes, tmp_path: Path) -> None:
    s3.put("math/autointerp.db", content[:10], public=False)
    with pytest.raises(FetchError, match=r"autointerp\.db: the server refuses it"):
        fetch_features("math", None, tmp_path, endpoint=s3.url)
    with pytest.raises(FetchError, match=r"math-1\.ddb: not there \(404\)"):
        fetch_features("math", "1%", tmp_path, endpoint=s3.url, labels=False)
    assert list(tmp_path.iterdir()) == []


def test_no_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as bound:  # and not listening
        bound.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{bound.getsockname()[1]}"
        with pytest.raises(FetchError, match="failed 8 times in a row"):
            fetch_features("math", None, tmp_path, endpoint=endpoint)
    for endpoint in ("ftp://x", "localhost", "http://"):
        with pytest.raises(ValueError, match=r"is no URL; expected such as"):
            fetch_features("math", None, tmp_path, endpoint=endpoint)
    monkeypatch.setenv("R1SAE_S3_ENDPOINT", "nowhere")
    with pytest.raises(ValueError, match="'nowhere' is no URL"):
        fetch_features("math", None, tmp_path)


def test_other_files_in_the_place(stored: bytes, s3: Any, tmp_path: Path) -> None:
    path = tmp_path / "file.ddb"
    path.write_bytes(b"mine")
    with pytest.raises(FileExistsError, match=r"is not .* pass overwrite=True"):
        fetch(s3.url, path)
    same_size = bytes(len(stored))
    path.write_bytes(same_size)
    with pytest.raises(FileExistsError, match="exists already"):
        fetch(s3.url, path)
    assert path.read_bytes() == same_size
    for name in (".part", ".part.jsonl"):  # of something else
        (tmp_path / f"file.ddb{name}").write_bytes(b"[1]\nrubbish")
    assert fetch(s3.url, path, overwrite=True)
    assert path.read_bytes() == stored
    assert alone(path)
    with building_lock(path), pytest.raises(DatabaseError, match="another process is fetching"):
        fetch(s3.url, path)


def test_a_full_disk(
    stored: bytes, proxy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy_url, path = proxy.url, tmp_path / "file.ddb"
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
        with pytest.raises(FetchError, match=r"3\.158 MB are to be fetched, .*but 1 kB are free"):
            fetch_features("logic", "0.1%", tmp_path, endpoint=proxy_url, labels=False)
    assert proxy.gets == 0

    def full(self: Journal, at: int, data: memoryview) -> None:
        if at > 2 * PIECE:
            raise OSError(28, "No space left on device")
        os.pwrite(self.descriptor, data, at)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "write", full)
        with pytest.raises(OSError, match="No space left"):
            fetch(proxy_url, path)
    assert fetch(proxy_url, path)
    assert path.read_bytes() == stored


def test_etags(tmp_path: Path, s3: Any, content: bytes) -> None:
    data = content * 4
    s3.put_in_parts(KEY, data, 5 << 20)
    path = tmp_path / "file.ddb"
    assert fetch(s3.url, path)
    assert path.read_bytes() == data
    etag = describe(Bucket(s3.url), KEY).etag
    assert etag.endswith('-3"')
    assert matches_etag(path, etag, lambda n: None) is True
    assert matches_etag(path, '"' + "0" * 32 + '-3"', lambda n: None) is None  # parts unknown
    assert matches_etag(path, '"' + "0" * 32 + '"', lambda n: None) is False
    assert matches_etag(path, hashlib.md5(data).hexdigest(), lambda n: None) is True
    assert matches_etag(path, '"anything else"', lambda n: None) is None


def test_the_command(
    s3: Any, stored: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3.put("logic/autointerp.db", b"labels")
    monkeypatch.setenv("R1SAE_S3_ENDPOINT", s3.url)
    arguments = ["fetch", "logic", "--sample", "0.1%", "--out", str(tmp_path)]
    for _ in range(2):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
        assert "logic-0-1.ddb: 3.158 MB" in result.output
    assert (tmp_path / "logic" / "logic-0-1.ddb").read_bytes() == stored
    assert (tmp_path / "logic" / "autointerp.db").read_bytes() == b"labels"
    result = CliRunner().invoke(app, ["fetch", "logic", "--sample", "2%"])
    assert result.exit_code == 1
    assert "expected one of 0.1%, 1%, 10%, full" in result.stderr


# Imports once, then fetches in children, one after another as the test asks for them.
_CHILDREN = """
import os, sys
from pathlib import Path
from r1sae_fast.fetch import journal
from r1sae_fast.fetch.features import describe, fetch_object
from r1sae_fast.fetch.store import Bucket

url, path, key, piece = sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
journal._SYNC_BYTES = 2 * piece
print("ready", flush=True)
while sys.stdin.readline():
    child = os.fork()
    if child == 0:
        bucket = Bucket(url)
        fetch_object(bucket, key, path, describe(bucket, key), jobs=3, piece=piece)
        os._exit(0)
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="fork and SIGKILL are not there")
def test_kills_lose_a_few_pieces_at_most(stored: bytes, proxy: Any, tmp_path: Path) -> None:
    piece, kills, path = 1 << 16, 10, tmp_path / "file.ddb"
    with subprocess.Popen(
        [sys.executable, "-c", _CHILDREN, proxy.url, str(path), KEY, str(piece)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as parent:
        assert parent.stdin is not None
        assert parent.stdout is not None

        def child() -> int:
            assert parent.stdin is not None
            assert parent.stdout is not None
            parent.stdin.write("go\n")
            parent.stdin.flush()
            return int(parent.stdout.readline())

        assert parent.stdout.readline() == "ready\n"
        draw = random.Random(0)
        for _ in range(kills):
            # By bytes, not by the clock: from here on the proxy holds everything back.
            proxy.hold_after(draw.randrange(1, len(stored) // 20))
            process = child()
            assert proxy.full.wait(1200)
            os.kill(process, 9)
            assert int(parent.stdout.readline()) == 9
            assert not path.exists()
        proxy.hold_after(None)
        child()
        assert int(parent.stdout.readline()) == 0
        parent.stdin.close()
    assert path.read_bytes() == stored
    assert alone(path)
    # A kill costs what was under way, and what was not yet in the journal.
    assert proxy.served <= len(stored) + kills * (2 + 2 * 3) * piece
