"""The small world TinyR1 reasons about: problem families whose steps are single known facts.

Every problem needs at least two steps. Which problems are held out is a property of their text,
so no training run, of any seed or length, ever sees one.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass

NAMES = ("Ana", "Ben", "Carla", "David", "Emma")
OBJECTS = ("apples", "books", "coins", "eggs", "pens")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")

LARGEST_SLIP = 9
"""Wrong numbers are off by at most so much."""

HELD_OUT_ONE_IN = 16
"""One problem in so many is never trained on."""


@dataclass(frozen=True)
class Step:
    """One fact: ``left`` "is" ``result``; ``slips`` are wrong results that look plausible."""

    left: str
    result: str
    slips: tuple[str, ...]

    def comparison(self, first: str) -> tuple[str, str]:
        """How ``first``, a result or a slip, compares with the result: a subtraction, larger number
        first, and its outcome, which is 0 for no other than the result itself."""
        if self.result in DAYS:
            days = (DAYS.index(first) - DAYS.index(self.result)) % 7
            return f"{first} minus {self.result}", str(days)
        low, high = sorted((int(first), int(self.result)))
        return f"{high} minus {low}", str(high - low)


@dataclass(frozen=True)
class Problem:
    """What the user asks, how R1 retells it, the steps that solve it, and the answer."""

    family: str
    prompt: str
    retold: str
    steps: tuple[Step, ...]

    @property
    def answer(self) -> str:
        """The last step's result."""
        return self.steps[-1].result

    @property
    def held_out(self) -> bool:
        """Whether the problem belongs to the evaluation, by a checksum of its prompt."""
        return zlib.crc32(self.prompt.encode()) % HELD_OUT_ONE_IN == 0


def _number_step(left: str, result: int) -> Step:
    near = [result + sign * off for off in range(1, LARGEST_SLIP + 1) for sign in (1, -1)]
    return Step(left, str(result), tuple(str(slip) for slip in near if 0 <= slip <= 99))


def _running(rng: random.Random, start: int, count: int) -> list[tuple[int, Step]]:
    """``count`` additions and subtractions of 1..9 from ``start`` that stay within 0..99."""
    steps = []
    value = start
    for _ in range(count):
        amount = rng.randint(1, 9)
        if value + amount > 99 or (value >= amount and rng.random() < 0.5):
            amount = -amount
        word = "plus" if amount > 0 else "minus"
        step = _number_step(f"{value} {word} {abs(amount)}", value + amount)
        steps.append((amount, step))
        value += amount
    return steps


def _listed(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def chain(rng: random.Random) -> Problem:
    """Start with 34, add 7, take away 9 and add 5."""
    start = rng.randint(1, 99)
    steps = _running(rng, start, rng.randint(2, 4))
    told = [f"start with {start}"]
    told += [f"add {a}" if a > 0 else f"take away {-a}" for a, _ in steps]
    text = _listed(told)
    return Problem(
        "chain",
        f"{text.capitalize()}. What is the result?",
        f"me to {text}.",
        tuple(step for _, step in steps),
    )


def story(rng: random.Random) -> Problem:
    """Ana has 12 apples. Ana buys 7 more. Ana gives away 3."""
    name, thing = rng.choice(NAMES), rng.choice(OBJECTS)
    start = rng.randint(1, 99)
    steps = _running(rng, start, rng.randint(2, 3))
    told = [f"{name} has {start} {thing}."]
    told += [f"{name} buys {a} more." if a > 0 else f"{name} gives away {-a}." for a, _ in steps]
    told.append(f"How many {thing} does {name} have?")
    return Problem(
        "story",
        " ".join(told),
        f"how many {thing} {name} has.",
        tuple(step for _, step in steps),
    )


def product(rng: random.Random) -> Problem:
    """What is 7 times 8 plus 5?"""
    left, right = rng.randint(2, 9), rng.randint(2, 9)
    first = _number_step(f"{left} times {right}", left * right)
    steps = _running(rng, left * right, rng.randint(1, 2))
    tail = " ".join(f"plus {a}" if a > 0 else f"minus {-a}" for a, _ in steps)
    text = f"what is {first.left} {tail}"
    return Problem(
        "product",
        f"{text.capitalize()}?",
        f"{text}.",
        (first, *(step for _, step in steps)),
    )


def following(rng: random.Random) -> Problem:
    """What comes after 3, 10, 17 and 24?"""
    gap = rng.randint(1, 9)
    first = rng.randint(1, 99 - 4 * gap)
    terms = [first + gap * i for i in range(4)]
    text = f"what comes after {_listed([str(term) for term in terms])}"
    return Problem(
        "following",
        f"{text.capitalize()}?",
        f"{text}.",
        (
            _number_step(f"{terms[1]} minus {terms[0]}", gap),
            _number_step(f"{terms[3]} plus {gap}", terms[3] + gap),
        ),
    )


def weekday(rng: random.Random) -> Problem:
    """Today is Monday. Ben leaves in 5 days and comes back 9 days later."""
    name = rng.choice(NAMES)
    day = rng.randrange(7)
    away, back = rng.randint(2, 9), rng.randint(2, 9)
    steps = []
    for days in (away, back):
        later = (day + days) % 7
        slips = tuple(other for other in DAYS if other != DAYS[later])
        steps.append(Step(f"{days} days after {DAYS[day]}", DAYS[later], slips))
        day = later
    today = steps[0].left.rpartition(" ")[2]
    return Problem(
        "weekday",
        f"Today is {today}. {name} leaves in {away} days and comes back {back} days later. "
        f"On which day does {name} come back?",
        f"on which day {name} comes back.",
        tuple(steps),
    )


def clock(rng: random.Random) -> Problem:
    """A clock shows 9. What does it show after 5 hours and then 8 more hours?"""
    start = hour = rng.randint(1, 12)
    waits = [rng.randint(2, 11) for _ in range(2)]
    steps = []
    for hours in waits:
        later = (hour + hours - 1) % 12 + 1
        slips = tuple(
            str(other) for other in range(1, 13) if 0 < abs(other - later) <= LARGEST_SLIP
        )
        steps.append(Step(f"{hours} hours after {hour}", str(later), slips))
        hour = later
    return Problem(
        "clock",
        f"A clock shows {start}. What does it show after {waits[0]} hours "
        f"and then {waits[1]} more hours?",
        "what the clock shows.",
        tuple(steps),
    )


FAMILIES: dict[str, Callable[[random.Random], Problem]] = {
    "chain": chain,
    "story": story,
    "product": product,
    "following": following,
    "weekday": weekday,
    "clock": clock,
}
"""Every family by its name, in the order in which they take turns."""


def problems(seed: int, *, held_out: bool, start: int = 0) -> Iterator[Problem]:
    """An endless stream of problems, the families in turn; the i-th depends on (seed, i) only.

    Args:
        seed: any integer.
        held_out: evaluation problems if true, training problems if false; the two never mix.
        start: index of the first problem.
    """
    families = list(FAMILIES.values())
    index = start
    while True:
        rng = random.Random(f"{seed}/{index}")
        problem = families[index % len(families)](rng)
        while problem.held_out != held_out:
            problem = families[index % len(families)](rng)
        yield problem
        index += 1


def distinct(source: Iterable[Problem], seen: Collection[str] = ()) -> Iterator[Problem]:
    """``source`` without problems asked before, or whose prompt is in ``seen``.

    The smaller families have a few dozen held-out problems, so a long stream repeats them.
    """
    asked = set(seen)
    for problem in source:
        if problem.prompt not in asked:
            asked.add(problem.prompt)
            yield problem
