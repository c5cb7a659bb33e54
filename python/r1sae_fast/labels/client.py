"""Asking an OpenAI-compatible server: many requests at once, patient with one that is busy.

Tried again, with growing pauses: 408, 409, 425, 429 and all 5xx, time-outs, cut connections and
answers that are no JSON. What a server asks for by ``Retry-After`` holds for all requests. Not
tried again: what the same request would meet again (a wrong key, no such model, no money left).
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import random
import time
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

from r1sae_fast.errors import LabelError, MissingExtraError
from r1sae_fast.labels.cost import Budget
from r1sae_fast.labels.endpoint import KEY, MODEL, URL, Endpoint
from r1sae_fast.labels.exchange import Reply, Request

if TYPE_CHECKING:
    import httpx2

MAX_BYTES = 4 << 20
"""Of an answer; more is thrown away unread."""

_AGAIN = {408, 409, 425, 429}
_PAUSE, _LONGEST_PAUSE = 1.0, 60.0  # seconds
_LONGEST_WAIT = 900.0  # that a server may ask for by Retry-After
_STRANGER_TRIES = 2  # more, after the first, of a server that never was there
_FATAL = {401: KEY, 403: KEY, 404: f"{URL} and {MODEL}", 405: URL}


class EndpointError(LabelError):
    """No request of this run can succeed: the run stops."""


class RequestError(LabelError):
    """This request can't succeed; others may."""


class _TooLongError(RequestError):
    pass


class _Style(NamedTuple):
    """How a request is written; of several under way, the first that is refused changes it."""

    new: bool  # max_completion_tokens in place of max_tokens
    no_temperature: bool


class _Transient(Exception):
    def __init__(
        self, why: str, wait: float = 0.0, *, sent: bool = False, reached: bool = True
    ) -> None:
        super().__init__(why)
        self.wait = wait
        self.sent = sent  # the model may have run, and be paid for
        self.reached = reached  # there is a server


def _forget(cost: float) -> None:
    pass


class Client:
    """Asks; use it as ``async with``.

    Args:
        endpoint: where.
        budget: what may be spent.
        jobs: requests at once.
        timeout: seconds for a whole answer.
        retries: how often a request is tried again.
        sleep: waits so many seconds (tests give their own).

    Raises:
        MissingExtraError: httpx2 is not installed.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        budget: Budget,
        *,
        jobs: int = 16,
        timeout: float = 300.0,
        retries: int = 8,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._httpx = _import_httpx()
        self._endpoint = endpoint
        self._budget = budget
        self._timeout = timeout
        self._retries = retries
        self._sleep = sleep
        self._slots = asyncio.Semaphore(jobs)
        self._not_before = 0.0  # by time.monotonic
        self._new_style = False  # max_completion_tokens in place of max_tokens
        self._no_temperature = False
        self._reached = False
        self.lost_tries = 0  # that may have been paid for without an answer
        self.waiting = ""  # why nothing is asked just now, for people
        headers = {"Authorization": f"Bearer {endpoint.key}"} if endpoint.key else {}
        self._client: httpx2.AsyncClient = self._httpx.AsyncClient(
            headers=headers,
            follow_redirects=False,  # the key goes nowhere else
            timeout=self._httpx.Timeout(timeout, connect=min(20.0, timeout), pool=None),
            limits=self._httpx.Limits(max_connections=jobs, max_keepalive_connections=jobs),
        )

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._client.aclose()

    async def ask(self, request: Request, lost: Callable[[float], None] = _forget) -> Reply:
        """One answer.

        ``lost`` is told what a try may have cost that gave no answer.

        Raises:
            RequestError: the server refuses this request, or fails at it again and again.
            EndpointError: the server refuses all requests.
            BudgetReachedError: it might cost more than is left.
        """
        async with self._slots:
            for attempt in range(self._retries + 1):
                await self._turn()
                try:
                    return await self._paid(request, lost)
                except _Transient as error:
                    self._reached |= error.reached
                    if not self._reached and attempt == _STRANGER_TRIES:
                        raise EndpointError(
                            f"{self._endpoint.url}: {error}: is the server running, and is "
                            f"{URL} its address?"
                        ) from None
                    if attempt == self._retries:
                        raise RequestError(
                            f"{self._endpoint.url}: no answer in {attempt + 1} tries; the last: "
                            f"{self._clean(str(error))}"
                        ) from None
                    pause = min(_LONGEST_PAUSE, _PAUSE * 2**attempt) * random.uniform(0.5, 1)
                    self._hold(error)
                    await self._sleep(max(pause, error.wait))
        raise AssertionError  # the loop always ends before

    async def _paid(self, request: Request, lost: Callable[[float], None]) -> Reply:
        aside = await self._budget.reserve(request)
        reply, billed = None, False
        try:
            reply = await self._try(request)
            self.waiting = ""
            self._reached = True
            return reply
        except BaseException as error:
            # Refused or never reached costs nothing; anything else (ctrl-c too) may be paid for.
            billed = isinstance(error, _TooLongError) or not isinstance(error, LabelError)
            if isinstance(error, _Transient):
                billed = error.sent
            if billed:
                self.lost_tries += 1
                lost(self._budget.worst(request))
            raise
        finally:
            await self._budget.settle(aside, request, reply, billed=billed)

    def _hold(self, error: _Transient) -> None:
        self.waiting = self._clean(str(error))
        if error.wait:
            self._not_before = max(self._not_before, time.monotonic() + error.wait)

    async def _turn(self) -> None:
        """Waits as long as the server asked any request to."""
        wait = self._not_before - time.monotonic()
        if wait > 0:
            await self._sleep(wait)

    async def _try(self, request: Request) -> Reply:
        httpx = self._httpx
        style = _Style(self._new_style, self._no_temperature)
        try:
            post = self._post(request, style)
            status, headers, body = await asyncio.wait_for(post, self._timeout)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            why = f"can't connect ({error or type(error).__name__})"
            raise _Transient(why, reached=False) from None
        except (asyncio.TimeoutError, httpx.TimeoutException):  # two kinds in 3.10
            raise _Transient(f"no answer within {self._timeout:g} s", sent=True) from None
        except httpx.HTTPError as error:
            why = f"the connection was cut ({error or type(error).__name__})"
            raise _Transient(why, sent=True) from None
        if status == 200:
            return _reply(body)
        await self._refused(style, status, headers, body)
        return await self._try(request)  # in another style

    async def _post(self, request: Request, style: _Style) -> tuple[int, httpx2.Headers, bytes]:
        body: dict[str, Any] = {
            "model": request.model,
            "messages": [{"role": role, "content": text} for role, text in request.messages],
        }
        body["max_completion_tokens" if style.new else "max_tokens"] = request.max_tokens
        if not style.no_temperature:
            body["temperature"] = request.temperature
        async with self._client.stream("POST", self._endpoint.chat_url, json=body) as response:
            data = bytearray()
            async for piece in response.aiter_bytes():
                data += piece
                if len(data) > MAX_BYTES:
                    raise _TooLongError(
                        f"{self._endpoint.url}: an answer of more than {MAX_BYTES >> 20} MiB"
                    )
            return response.status_code, response.headers, bytes(data)

    async def _refused(
        self, style: _Style, status: int, headers: httpx2.Headers, body: bytes
    ) -> None:
        """Raises what a status other than 200 means; returns to have the request sent again."""
        said = self._clean(_said(body))
        what = f"{self._endpoint.url}: HTTP {status}: {said}"
        if status == 400 and not style.new and "max_completion_tokens" in said:
            self._new_style = True
            return
        if status == 400 and not style.no_temperature and "temperature" in said:
            self._no_temperature = True
            return
        if status == 402 or (status == 429 and "insufficient_quota" in said):
            raise EndpointError(f"{what}; there is no money left, it seems")
        if status in _FATAL:
            raise EndpointError(f"{what}; look at {_FATAL[status]} in the environment")
        if 300 <= status < 400:
            raise EndpointError(
                f"{what} (to {self._clean(headers.get('location', ''))}); the key is sent nowhere "
                f"else: set {URL} to where the API is"
            )
        if status in _AGAIN or status >= 500:
            wait = _retry_after(headers.get("retry-after"))
            if wait > _LONGEST_WAIT:
                raise EndpointError(
                    f"{what}; asks to wait {wait / 60:,.0f} minutes: come back then"
                )
            raise _Transient(f"HTTP {status}: {said}", wait)
        raise RequestError(what)

    def _clean(self, text: str) -> str:
        """No error shows the key, whoever quotes it."""
        return text.replace(self._endpoint.key, "***") if self._endpoint.key else text


def _reply(body: bytes) -> Reply:
    try:
        data = json.loads(body)
        choice = data["choices"][0]
        text = choice["message"]["content"]
        usage = data.get("usage") or {}
        finish = choice.get("finish_reason")
        counts = [usage.get("prompt_tokens"), usage.get("completion_tokens")]
    except (ValueError, RecursionError, KeyError, IndexError, TypeError, AttributeError):
        shown = body[:200].decode("utf-8", "replace")
        raise _Transient(f"an answer that is no completion: {shown!r}", sent=True) from None
    # Half of a surrogate pair can't be stored as UTF-8.
    text = text.encode("utf-8", "replace").decode("utf-8") if isinstance(text, str) else ""
    known = [n if type(n) is int and n >= 0 else None for n in counts]
    return Reply(text, finish if isinstance(finish, str) else None, known[0], known[1])


def _said(body: bytes) -> str:
    """A server's reason, at most a line."""
    text = body[:4096].decode("utf-8", "replace")
    try:
        error = json.loads(body)
        error = error.get("error", error)
        if isinstance(error, dict):
            said = [str(error[k]) for k in ("message", "code", "detail") if error.get(k)]
            text = "; ".join(said) or text
        elif isinstance(error, str):
            text = error
    except (ValueError, RecursionError, AttributeError):
        pass
    return " ".join(text.split())[:300] or "(nothing said)"


def _retry_after(value: str | None) -> float:
    """Seconds; 0 where the header is missing or makes no sense."""
    if not value:
        return 0.0
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, OverflowError):
            return 0.0
    return seconds if 0 < seconds < float("inf") else 0.0


def _import_httpx() -> Any:
    try:
        import httpx2
    except ImportError:
        raise MissingExtraError(
            "asking a language model needs httpx2: pip install 'r1sae-fast[label]'"
        ) from None
    return httpx2
