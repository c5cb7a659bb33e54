"""One request at a time, to a server that misbehaves on purpose."""

import asyncio
import datetime
import email.utils
import socket
from collections.abc import Callable
from typing import Any

import pytest

from r1sae_fast.labels import Endpoint, EndpointError, Prices
from r1sae_fast.labels import client as client_module
from r1sae_fast.labels.client import Client, RequestError
from r1sae_fast.labels.cost import Budget
from r1sae_fast.labels.exchange import Reply, Request

Server = Any  # conftest's
Answer = Callable[..., Any]
REQUEST = Request("a-model", (("system", "s"), ("user", "u")), 100)


@pytest.fixture
def sleeps() -> list[float]:
    """How long the client would have slept."""
    return []


@pytest.fixture
def ask(endpoint: Endpoint, sleeps: list[float]) -> Callable[..., Reply]:
    """Asks once; pauses take no time."""

    def ask(budget: Budget | None = None, **options: Any) -> Reply:
        async def sleep(seconds: float) -> None:
            sleeps.append(seconds)

        async def go() -> Reply:
            mine = budget or Budget(None, None)
            async with Client(endpoint, mine, sleep=sleep, **options) as client:
                return await client.ask(REQUEST)

        return asyncio.run(go())

    return ask


@pytest.fixture
def answers(server: Server, make_answer: Answer) -> Callable[..., None]:
    """Has the server give these answers, the last one again and again."""

    def answers(*given: dict[str, Any]) -> None:
        server.behave = lambda asked: make_answer(**given[min(asked.number, len(given) - 1)])

    return answers


GOOD = {"text": "hello"}


def test_what_is_sent(server: Server, answers: Any, ask: Any, sleeps: list[float]) -> None:
    answers(GOOD)
    assert ask() == Reply("hello", "stop", 1, 2)
    (asked,) = server.asked
    assert asked.headers["authorization"] == "Bearer sk-secret"
    assert asked.body == {
        "model": "a-model",
        "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}],
        "max_tokens": 100,
        "temperature": 0.0,
    }
    assert sleeps == []


@pytest.mark.parametrize(
    "bad",
    [
        {"status": 429},
        {"status": 408},
        {"status": 500, "raw": b"<html>oops"},
        {"status": 503, "raw": b'{"error": {"message": "loading"}}'},
        {"status": 599},
        {"cut": True},
        {"raw": b"{not json"},
        {"raw": b""},
        {"raw": b"[]"},
        {"raw": b'{"choices": []}'},
        {"raw": b'{"choices": [{"message": null}]}'},
        {"raw": b'{"choices": [{"message": {}}], "usage": 3}'},
        {"raw": b"[" * 100_000},
        {"raw": b"\xff\xfe\x00"},
    ],
)
def test_tried_again(
    server: Server, answers: Any, ask: Any, sleeps: list[float], bad: dict[str, Any]
) -> None:
    answers(bad, bad, bad, GOOD)
    assert ask().text == "hello"
    assert len(server.asked) == 4
    assert len(sleeps) == 3
    assert all(0.5 * 2**i <= pause <= 2**i for i, pause in enumerate(sleeps))


def test_given_up(server: Server, answers: Any, ask: Any, sleeps: list[float]) -> None:
    answers({"status": 500, "raw": b'{"error": "disk on fire sk-secret"}'})
    with pytest.raises(RequestError, match="in 9 tries; the last: HTTP 500: disk on fire") as error:
        ask()
    assert "sk-secret" not in str(error.value)
    assert len(server.asked) == 9
    assert max(sleeps) <= 60


def test_slow(answers: Any, ask: Any, sleeps: list[float]) -> None:
    answers({"never": True}, GOOD)
    assert ask(timeout=2.0).text == "hello"
    assert sleeps


def test_nobody_there(endpoint: Endpoint, sleeps: list[float]) -> None:
    async def sleep(seconds: float) -> None:
        sleeps.append(seconds)

    async def go() -> None:
        with socket.socket() as bound:  # and not listening
            bound.bind(("127.0.0.1", 0))
            nowhere = Endpoint(f"http://127.0.0.1:{bound.getsockname()[1]}/v1", "a-model")
            async with Client(nowhere, Budget(None, None), sleep=sleep) as client:
                await client.ask(REQUEST)

    with pytest.raises(EndpointError, match=r"can't connect.*is the server running"):
        asyncio.run(go())
    assert len(sleeps) == 2


@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_in_seconds(answers: Any, ask: Any, sleeps: list[float], status: int) -> None:
    answers({"status": status, "headers": {"retry-after": "700"}}, GOOD)
    assert ask().text == "hello"
    assert sleeps[0] == 700


def test_retry_after_as_a_date(answers: Any, ask: Any, sleeps: list[float]) -> None:
    then = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(seconds=700)
    answers({"status": 429, "headers": {"retry-after": email.utils.format_datetime(then)}}, GOOD)
    assert ask().text == "hello"
    assert 60 < sleeps[0] <= 700  # what is left of it; a pause of its own is a second


@pytest.mark.parametrize("value", ["soon", "-5", "nan", "inf", "", "1e400", "\x01"])
def test_retry_after_without_sense(answers: Any, ask: Any, sleeps: list[float], value: str) -> None:
    answers({"status": 429, "headers": {"retry-after": value}}, GOOD)
    assert ask().text == "hello"
    assert sleeps[0] <= 1


def test_retry_after_holds_for_all(server: Server, endpoint: Endpoint, make_answer: Answer) -> None:
    waited: list[float] = []

    async def sleep(seconds: float) -> None:
        waited.append(seconds)

    async def go() -> None:
        async with Client(endpoint, Budget(None, None), sleep=sleep) as client:
            await client.ask(REQUEST)
            count = len(waited)
            await client.ask(REQUEST)
            assert len(waited) == count + 1  # before it was sent

    first = {"status": 429, "headers": {"retry-after": "800"}}
    server.behave = lambda asked: make_answer(**(GOOD if asked.number else first))
    asyncio.run(go())
    assert len(server.asked) == 3


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"status": 401, "raw": b'{"error": {"message": "bad key sk-secret"}}'}, "R1SAE_LABEL_KEY"),
        ({"status": 403}, "R1SAE_LABEL_KEY"),
        ({"status": 404, "raw": b'{"error": {"message": "no model x"}}'}, "no model x"),
        ({"status": 402}, "no money left"),
        ({"status": 429, "raw": b'{"error": {"code": "insufficient_quota"}}'}, "no money left"),
        ({"status": 429, "headers": {"retry-after": "86400"}}, "1,440 minutes"),
        ({"status": 307, "headers": {"location": "http://evil.example/"}}, "evil.example"),
    ],
)
def test_no_request_can_succeed(
    server: Server, answers: Any, ask: Any, answer: dict[str, Any], message: str
) -> None:
    answers(answer)
    with pytest.raises(EndpointError, match=message) as error:
        ask()
    assert "sk-secret" not in str(error.value)
    assert len(server.asked) == 1


@pytest.mark.parametrize("status", [400, 413, 422])
def test_this_request_cannot_succeed(server: Server, answers: Any, ask: Any, status: int) -> None:
    answers({"status": status, "raw": b'{"error": {"message": "context length exceeded"}}'})
    with pytest.raises(RequestError, match=f"HTTP {status}: context length exceeded"):
        ask()
    assert len(server.asked) == 1


def test_other_styles_of_the_api(server: Server, answers: Any, ask: Any) -> None:
    answers(
        {"status": 400, "raw": b'{"error": {"message": "use max_completion_tokens instead"}}'},
        {"status": 400, "raw": b'{"error": {"message": "temperature is not supported"}}'},
        GOOD,
    )
    assert ask().text == "hello"
    assert server.asked[-1].body.keys() == {"model", "messages", "max_completion_tokens"}


def test_another_style_while_others_are_asked(
    server: Server, endpoint: Endpoint, make_answer: Answer
) -> None:
    """All leave in the old style; none of them is refused for good."""

    def behave(asked: Any) -> Any:
        if "max_tokens" in asked.body:
            return make_answer(status=400, raw=b'{"error": {"message": "max_completion_tokens!"}}')
        return make_answer(**GOOD)

    async def go() -> list[Reply]:
        async with Client(endpoint, Budget(None, None), jobs=6) as client:
            return await asyncio.gather(*(client.ask(REQUEST) for _ in range(6)))

    server.behave = behave
    assert {reply.text for reply in asyncio.run(go())} == {"hello"}


def test_huge(server: Server, answers: Any, ask: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "MAX_BYTES", 1 << 20)
    answers({"text": "x" * (3 << 20)})
    with pytest.raises(RequestError, match="more than 1 MiB"):
        ask()
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    ("raw", "reply"),
    [
        (b'{"choices": [{"message": {"content": null}}]}', Reply("", None, None, None)),
        (b'{"choices": [{"message": {"content": 3}}]}', Reply("", None, None, None)),
        (
            b'{"choices": [{"message": {"content": "a\\ud800b"}, "finish_reason": 1}], '
            b'"usage": {"prompt_tokens": -3, "completion_tokens": true}}',
            Reply("a?b", None, None, None),
        ),
    ],
)
def test_odd_completions(answers: Any, ask: Any, raw: bytes, reply: Reply) -> None:
    answers({"raw": raw})
    assert ask() == reply


def test_as_many_at_once_as_allowed(
    server: Server, endpoint: Endpoint, make_answer: Answer
) -> None:
    async def go() -> None:
        server.behave = lambda asked: make_answer(**GOOD)
        server.hold(0)
        async with Client(endpoint, Budget(None, None), jobs=5) as client:
            asking = [asyncio.create_task(client.ask(REQUEST)) for _ in range(17)]
            while server.at_once < 5:
                await asyncio.sleep(0.01)
            server.hold(None)
            await asyncio.gather(*asking)

    asyncio.run(go())
    assert server.most_at_once == 5
    assert len(server.asked) == 17


def test_what_may_be_billed_counts(server: Server, answers: Any, ask: Any) -> None:
    answers({"cut": True}, {"status": 500}, GOOD)
    budget = Budget(Prices(1e6, 1e6), 1e9)  # a unit of money a token
    ask(budget)
    # The cut answer at the most it may have cost, the refused one nothing, the last as counted.
    assert budget.spent == pytest.approx(1.5 * 15 + 100 + 3)
