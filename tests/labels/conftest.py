"""A small database, and a server on this machine that speaks the API and behaves as it is told."""

import asyncio
import hashlib
import json
import re
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from r1sae_fast.codes import SparseCodes
from r1sae_fast.features import FeatureDB
from r1sae_fast.labels import Endpoint
from r1sae_fast.labels.passages import MARKS, active_positions, marked, plain
from r1sae_fast.labels.windows import Window
from r1sae_fast.shards import CodeWriter

# -- the database ---------------------------------------------------------------------------------

WORDS = (" the", " Wait", ".", "\n", " so", " 7", "\x1b[31m", "<<", "é", "</think>", "[1, 0]")
VOCABULARY = (*WORDS, *(f" word{i}" for i in range(150)))
FEATURES = 14  # 0..11 fire on words, 12 nearly never, 13 is dead
SEQUENCES, LENGTH = 140, 60


def _build(path: Path) -> None:
    random = np.random.default_rng(5)
    rows = SEQUENCES * LENGTH
    tokens = random.integers(0, len(VOCABULARY), rows).astype(np.int32)
    dense = np.zeros((rows, FEATURES), dtype=np.float32)
    for feature in range(12):
        # On three words each, at different strengths, and not every time.
        for nth, token in enumerate(range(feature, feature + 36, 12)):
            on = (tokens == token) & (random.random(rows) < 0.9)
            dense[on, feature] = random.uniform(1, 3, on.sum()) * (nth + 1)
    dense[7, 12] = 1.0
    with CodeWriter(path.parent / "codes", FEATURES, {"sae": "test"}) as writer:
        writer.write(
            SparseCodes.from_dense(torch.from_numpy(dense)),
            tokens=tokens,
            sequence_id=(np.arange(rows) // LENGTH * 2 + 5).astype(np.int64),
            position=(np.arange(rows) % LENGTH).astype(np.int32),
            segment=np.ones(rows, dtype=np.uint8),
        )
    FeatureDB.build(path, path.parent / "codes", decode=lambda token: VOCABULARY[token]).close()


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database, to be read only."""
    path = tmp_path_factory.mktemp("labels") / "features.ddb"
    _build(path)
    return path


@pytest.fixture
def database(built: Path, tmp_path: Path) -> Path:
    """A database of one's own."""
    return Path(shutil.copy(built, tmp_path / "features.ddb"))


# -- the truth about it ---------------------------------------------------------------------------


@dataclass
class Truth:
    """What a model would say that knows every window of every feature."""

    active: dict[int, set[str]]  # plain text of windows where a feature is active
    right: dict[int, set[str]]  # text with the right tokens marked

    def explained(self, passages: list[str]) -> int:
        """The feature that a request for a label is about."""
        texts = [passage.rpartition("\nStrengths: ")[0] for passage in passages]
        found = [f for f, right in self.right.items() if right.issuperset(texts)]
        assert len(found) == 1, found
        return found[0]


@pytest.fixture(scope="session")
def truth(built: Path) -> Truth:
    active: dict[int, set[str]] = {}
    right: dict[int, set[str]] = {}
    with FeatureDB(built) as db:
        tokens: dict[tuple[int, int], list[tuple[int, str]]] = {}
        for row in db.sql("SELECT * FROM tokens ORDER BY sequence_id, token_idx").to_pylist():
            place = (row["sequence_id"], row["token_idx"] // 32)
            tokens.setdefault(place, []).append((row["token_idx"], row["decoded_token"]))
        strengths: dict[int, dict[tuple[int, int], float]] = {}
        for row in db.sql("SELECT * FROM activations").to_pylist():
            of = strengths.setdefault(row["feature_id"], {})
            of[row["sequence_id"], row["token_idx"]] = row["strength"]
    for feature, of in strengths.items():
        active[feature], right[feature] = set(), set()
        for place, found in tokens.items():
            values = tuple(of.get((place[0], at), 0.0) for at, _ in found)
            if any(values):
                window = Window(place, tuple(text for _, text in found), values)
                active[feature].add(plain(window))
                positions = active_positions(window, 0.3)
                right[feature] |= {marked(window, positions, marks) for marks in MARKS}
    return Truth(active, right)


# -- the server -----------------------------------------------------------------------------------


@dataclass
class Asked:
    """A request for a completion."""

    body: dict[str, Any]
    headers: dict[str, str]
    number: int  # of all requests, from 0
    before: int  # how often the same messages were asked before

    @property
    def system(self) -> str:
        text: str = self.body["messages"][0]["content"]
        return text

    @property
    def user(self) -> str:
        text: str = self.body["messages"][-1]["content"]
        return text

    @property
    def kind(self) -> str:
        if "LABEL:" in self.system:
            return "explain"
        return "fuzzing" if "marked tokens" in self.system else "detection"

    @property
    def passages(self) -> list[str]:
        text = self.user if self.kind == "explain" else self.user.partition("\n\n")[2]
        return re.split(r"(?:^|\n\n)Passage \d+: ", text)[1:]

    @property
    def label(self) -> str:
        return self.user.partition("\n\n")[0].removeprefix("Label: ")


@dataclass
class Answer:
    """What the server sends, and how."""

    text: str = ""
    finish: str = "stop"
    usage: bool = True
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    raw: bytes | None = None  # in place of a completion
    cut: bool = False  # the connection ends in the middle
    never: bool = False  # nothing is sent

    def body(self, asked: Asked) -> bytes:
        if self.raw is not None:
            return self.raw
        message = {"role": "assistant", "content": self.text}
        data: dict[str, Any] = {"choices": [{"message": message, "finish_reason": self.finish}]}
        if self.usage:
            data["usage"] = {
                "prompt_tokens": tokens_of(asked.system + asked.user),
                "completion_tokens": tokens_of(self.text),
            }
        return json.dumps(data).encode()


def tokens_of(text: str) -> int:
    """This server's tokenizer."""
    return -(-len(text) // 4)


Behave = Callable[[Asked], Answer]


class Server:
    """Answers as ``behave`` says; after ``hold_after`` answers it keeps all others waiting."""

    def __init__(self) -> None:
        self.behave: Behave = lambda asked: Answer(status=500)
        self.asked: list[Asked] = []
        self.paid: Counter[str] = Counter()  # answers that were sent, by what was asked
        self.answered = 0
        self.hold_after: int | None = None
        self.held = threading.Event()  # something is being kept waiting
        self.at_once = 0
        self.most_at_once = 0
        self._seen: Counter[str] = Counter()
        self._loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        started = threading.Event()

        async def serve() -> None:
            self._go_on = asyncio.Event()
            self._stop = asyncio.Event()
            server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
            self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
            started.set()
            await self._stop.wait()
            server.close()
            for task in tuple(self._tasks):
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

        self._thread = threading.Thread(target=lambda: self._loop.run_until_complete(serve()))
        self._thread.start()
        started.wait()

    def hold(self, after: int | None) -> None:
        """Lets those go that wait, and begins to hold after so many answers more."""

        def change() -> None:
            self.hold_after = None if after is None else self.answered + after
            self.held.clear()
            self._go_on.set()
            self._go_on = asyncio.Event()

        self._loop.call_soon_threadsafe(change)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()
        self._loop.close()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            while await self._one(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # a client that was killed
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {k.lower(): v for k, _, v in (h.partition(": ") for h in head[1:] if h)}
        body = json.loads(await reader.readexactly(int(headers.get("content-length", 0))))
        assert head[0] == "POST /v1/chat/completions HTTP/1.1", head[0]
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            key = hashlib.sha256(json.dumps(body).encode()).hexdigest()
            asked = Asked(body, headers, len(self.asked), self._seen[key])
            self._seen[key] += 1
            self.asked.append(asked)
            if self.hold_after is not None and self.answered >= self.hold_after:
                self.held.set()
                await self._go_on.wait()
            answer = self.behave(asked)
            return await self._send(writer, asked, key, answer)
        finally:
            self.at_once -= 1

    async def _send(
        self, writer: asyncio.StreamWriter, asked: Asked, key: str, answer: Answer
    ) -> bool:
        if answer.never:
            await self._stop.wait()
            return False
        data = answer.body(asked)
        head = {"content-type": "application/json", "content-length": str(len(data))}
        lines = [
            f"HTTP/1.1 {answer.status} X",
            *(f"{k}: {v}" for k, v in {**head, **answer.headers}.items()),
        ]
        sent = ("\r\n".join(lines) + "\r\n\r\n").encode() + data
        if answer.cut:
            sent = sent[: -len(data) // 2]
        elif answer.status == 200:
            self.answered += 1
            self.paid[key] += 1
        writer.write(sent)
        await writer.drain()
        return not answer.cut


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy in the environment does not know this machine's ports."""
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.fixture
def endpoint(server: Server) -> Endpoint:
    return Endpoint(server.url, "a-model", "sk-secret")


@pytest.fixture
def knowing(truth: Truth) -> Behave:
    """A model that knows: labels name the feature, scores are told from the truth."""

    def behave(asked: Asked) -> Answer:
        if asked.kind == "explain":
            return Answer(f"Hm.\nLABEL: feature {truth.explained(asked.passages)}")
        feature = int(asked.label.removeprefix("feature "))
        known = (truth.right if asked.kind == "fuzzing" else truth.active)[feature]
        return Answer(str([int(passage in known) for passage in asked.passages]))

    return behave


@pytest.fixture
def guessing(knowing: Behave) -> Behave:
    """A model that tosses coins, the same for the same passage."""

    def behave(asked: Asked) -> Answer:
        if asked.kind == "explain":
            return knowing(asked)
        coins = [
            hashlib.sha256(f"{asked.kind} {p}".encode()).digest()[0] & 1 for p in asked.passages
        ]
        return Answer(str(coins))

    return behave


@pytest.fixture(name="make_answer")
def _make_answer() -> type[Answer]:
    return Answer
