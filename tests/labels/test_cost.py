"""Caps that hold, estimates, and runs that stop at a cap and go on."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1sae_fast.features import FeatureDB
from r1sae_fast.labels import Endpoint, LabelSettings, Prices, label_features
from r1sae_fast.labels.cost import Budget, BudgetReachedError, estimate_tokens
from r1sae_fast.labels.exchange import Reply, Request
from r1sae_fast.labels.plan import plan_labels

Server = Any  # conftest's
Behave = Callable[..., Any]
SMALL = LabelSettings(explain=10, test=10, negatives=10, explain_tokens=200, score_tokens=40)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("", 0),
        ("So 34 plus 7 is 41.", 7),
        ("Wait, that was wrong.\n\n", 7),
        ("counterintuitively", 3),
        ("x^2 + 3.14159", 8),
        ("解释", 2),
    ],
)
def test_estimate(text: str, tokens: int) -> None:
    assert estimate_tokens(text) == tokens


@given(st.text(max_size=200))
def test_estimate_of_anything(text: str) -> None:
    assert 0 <= estimate_tokens(text) <= len(text)


@given(
    requests=st.lists(
        st.tuples(
            st.integers(1, 400),  # letters of the prompt
            st.integers(1, 100),  # completion tokens at most
            st.integers(0, 100),  # in a hundred of these, really
            st.sampled_from(["answered", "billed", "free"]),
        ),
        max_size=30,
    ),
    cap=st.floats(0.1, 2000),
    jobs=st.integers(1, 6),
)
def test_a_cap_holds(requests: list[tuple[int, int, int, str]], cap: float, jobs: int) -> None:
    """Whatever is asked at once and however answers come, at most the cap is spent."""
    budget = Budget(Prices(1e6, 1e6), cap)

    async def one(letters: int, most: int, share: int, end: str) -> bool:
        request = Request("m", (("user", "x" * letters),), most)
        try:
            aside = await budget.reserve(request)
        except BudgetReachedError:
            return False
        await asyncio.sleep(0)
        used = most * share // 100
        reply = Reply("", "stop", letters // 7 + 6, used) if end == "answered" else None
        await budget.settle(aside, request, reply, billed=end == "billed")
        return True

    async def go() -> None:
        slots = asyncio.Semaphore(jobs)

        async def within(*request: Any) -> None:
            async with slots:
                await one(*request)

        await asyncio.wait_for(asyncio.gather(*(within(*r) for r in requests)), 60)

    asyncio.run(go())
    assert budget.spent <= cap * (1 + 1e-9)


def test_a_run_stops_at_its_cap_and_goes_on(
    server: Server, endpoint: Endpoint, knowing: Behave, database: Path
) -> None:
    server.behave = knowing
    prices = Prices(1.0, 10.0)
    every = range(5)
    whole = plan_labels(database, SMALL, every, prices=prices)
    assert whole.cost is not None
    assert whole.features == 5
    caps = [whole.cost * share for share in (0.3, 0.6, 3.0)]
    labelled = 0
    spent = 0.0
    for cap in caps:
        run = label_features(database, endpoint, SMALL, every, prices=prices, max_cost=cap, jobs=4)
        assert spent <= run.spent <= cap
        spent = run.spent
        labelled += run.labelled
        assert (run.stopped is None) == (cap is caps[-1])
        if run.stopped:
            assert "cap" in run.stopped
    assert labelled == 5
    # What was answered before a cap was not asked again.
    assert max(server.paid.values()) == 1
    with FeatureDB(database) as db:
        (row,) = db.sql("SELECT sum(cost) AS cost, sum(requests) AS n FROM label_usage").to_pylist()
    assert row["cost"] == pytest.approx(spent)
    assert row["n"] == server.answered == whole.requests


def test_what_was_lost_counts_in_all_runs(
    server: Server,
    endpoint: Endpoint,
    knowing: Behave,
    database: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("r1sae_fast.labels.client._PAUSE", 0.001)
    cut = iter([True] * 3)

    def behave(asked: Any) -> Any:
        answer = knowing(asked)
        answer.cut = asked.kind == "detection" and next(cut, False)
        return answer

    server.behave = behave
    prices = Prices(1.0, 10.0)
    first = label_features(database, endpoint, SMALL, [1], prices=prices, max_cost=0.005)
    assert first.stopped
    run = label_features(database, endpoint, SMALL, [1], prices=prices, max_cost=1.0)
    assert run.labelled == 1
    assert first.lost + run.lost == 3
    with FeatureDB(database) as db:
        (row,) = db.sql("SELECT * FROM label_usage").to_pylist()
    assert row["cost"] == pytest.approx(run.spent)
    counted = prices.of(row["prompt_tokens"], row["completion_tokens"])
    assert row["cost"] > counted + 3 * prices.of(0, SMALL.score_tokens)


def test_the_plan_is_near(
    server: Server, endpoint: Endpoint, knowing: Behave, database: Path
) -> None:
    server.behave = knowing
    plan = plan_labels(database, SMALL, range(4), prices=Prices(1, 2))
    run = label_features(database, endpoint, SMALL, range(4), prices=Prices(1, 2))
    assert plan.requests == run.asked.requests == 4 * (1 + 4 + 4)
    # The server's tokens are quarters of the letters, ours are guessed: of one order.
    assert 0.5 < plan.prompt_tokens / run.asked.prompt_tokens < 2
    assert plan.cost is not None
    assert plan.most_cost is not None
    assert run.asked.cost < plan.most_cost
    after = plan_labels(database, SMALL, range(5), model="a-model")
    assert (after.features, after.before, after.cost) == (1, 4, None)
    assert after.exact


def test_no_usage_told(server: Server, endpoint: Endpoint, knowing: Behave, database: Path) -> None:
    def behave(asked: Any) -> Any:
        answer = knowing(asked)
        answer.usage = False
        return answer

    server.behave = behave
    run = label_features(database, endpoint, SMALL, [1], prices=Prices(1, 1))
    assert run.asked.prompt_tokens > 1000
    assert run.asked.cost > 0


@pytest.mark.parametrize(("prompt", "completion"), [(-1, 1), (1, float("nan")), (float("inf"), 1)])
def test_prices_without_sense(prompt: float, completion: float) -> None:
    with pytest.raises(ValueError, match="the price of"):
        Prices(prompt, completion)


def test_caps_without_sense(endpoint: Endpoint, database: Path) -> None:
    with pytest.raises(ValueError, match="prices"):
        label_features(database, endpoint, max_cost=1)
    with pytest.raises(ValueError, match="above 0"):
        label_features(database, endpoint, max_cost=0, prices=Prices(1, 1))
