"""Parts come in order, each read while the one before is in use, in as little room as it takes."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from r1sae_fast.r1.stream.loader import Job, ReadAhead


class Room:
    """What a part is read into."""

    def __init__(self) -> None:
        self.value = -1
        self.used = False


class Shelf:
    """Makes rooms and jobs, and keeps count."""

    def __init__(self) -> None:
        self.made: dict[str, int] = {}
        self.read: list[int] = []

    def job(self, kind: str, number: int, fails: BaseException | None = None) -> Job[Room]:
        def make() -> Room:
            self.made[kind] = self.made.get(kind, 0) + 1
            return Room()

        def fill(room: Room) -> None:
            assert not room.used, "read into a part that is in use"
            if fails is not None:
                raise fails
            room.value = number
            self.read.append(number)

        return Job(kind, make, fill, lambda room: None)


@pytest.mark.parametrize("ahead", [True, False])
def test_order_and_room(ahead: bool) -> None:
    shelf = Shelf()
    kinds = ["dense"] * 3 + ["mixture"] * 5
    jobs = [shelf.job(kind, number) for number, kind in enumerate(kinds)]
    with ReadAhead(jobs, ahead=ahead) as parts:
        parts.start()
        for number in range(len(jobs)):
            with parts.part() as room:
                assert room.value == number
                room.used = True
            room.used = False
    assert shelf.read == list(range(len(jobs)))
    most = 2 if ahead else 1
    assert shelf.made == {"dense": most, "mixture": most}


def test_parts_within_a_part() -> None:
    shelf = Shelf()
    jobs = []
    for block in range(4):
        jobs.append(shelf.job("rest", 10 * block))
        jobs += [shelf.job("group", 10 * block + group) for group in range(1, 4)]
    with ReadAhead(jobs) as parts:
        for block in range(4):
            with parts.part() as rest:
                rest.used = True
                assert rest.value == 10 * block
                for group in range(1, 4):
                    with parts.part() as room:
                        room.used = True
                        assert room.value == 10 * block + group
                    room.used = False
            rest.used = False
    assert shelf.made == {"rest": 2, "group": 2}


@pytest.mark.parametrize("ahead", [True, False])
def test_an_error_comes_where_its_part_is_asked_for(ahead: bool) -> None:
    shelf = Shelf()
    jobs = [shelf.job("a", 0), shelf.job("a", 1, OSError("disk")), shelf.job("a", 2)]
    with ReadAhead(jobs, ahead=ahead) as parts:
        with parts.part() as room:
            assert room.value == 0
        with pytest.raises(OSError, match="disk"), parts.part():
            pass


def test_leaving_tells_a_reading_to_stop() -> None:
    started, waiting = threading.Event(), threading.Event()

    def fill_until_told(stopping: Callable[[], threading.Event]) -> Callable[[Room], None]:
        def fill(room: Room) -> None:
            started.set()
            assert stopping().wait(30)
            waiting.set()

        return fill

    shelf = Shelf()
    parts: ReadAhead[Room]
    slow = Job("a", Room, fill_until_told(lambda: parts.stopping), lambda room: None)
    parts = ReadAhead([shelf.job("a", 0), slow])
    with parts, parts.part():
        assert started.wait(30)
    assert waiting.is_set()
