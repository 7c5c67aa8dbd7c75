"""Working ahead: in order, bounded, and without a thread left behind."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from mmfast.media import prefetched

PATIENCE = 30


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    gc.collect()
    assert [thread.name for thread in threading.enumerate() if thread.name == "mmfast-prefetch"] == []


def wait_until(condition) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_results_come_in_order() -> None:
    with prefetched(range(100), lambda number: number**2, ahead=3) as squares:
        assert list(squares) == [number**2 for number in range(100)]
        assert list(squares) == []


def test_nothing_to_do() -> None:
    with prefetched([], str) as nothing:
        assert list(nothing) == []


def test_next_items_are_made_while_one_is_used() -> None:
    begun = [threading.Event() for _ in range(4)]

    def work(number: int) -> int:
        begun[number].set()
        return number

    with prefetched(range(4), work, ahead=2) as numbers:
        # Were nothing made ahead, the second would be begun when it is asked for.
        for number in numbers:
            if number < 3:
                assert begun[number + 1].wait(PATIENCE)


@pytest.mark.parametrize("ahead", [1, 2, 5])
def test_no_more_than_asked_are_made_ahead(ahead: int) -> None:
    made: list[int] = []
    with prefetched(range(50), lambda number: made.append(number) or number, ahead=ahead) as numbers:
        for number in numbers:
            wait_until(lambda done=number: len(made) >= min(50, done + ahead + 1))
            time.sleep(0.001)
            # One was just taken; the places that are free have been filled.
            assert len(made) <= number + 1 + ahead


@pytest.mark.parametrize("where", ["items", "work"])
def test_errors_come_in_their_turn(where: str) -> None:
    def items() -> Iterator[int]:
        yield from (1, 2)
        if where == "items":
            raise OSError("disk gone")
        yield 0

    with prefetched(items(), lambda number: 10 // number, ahead=5) as results:
        assert [next(results), next(results)] == [10, 5]
        with pytest.raises(OSError if where == "items" else ZeroDivisionError):
            next(results)
        assert list(results) == []


def test_end_of_another_iterator_is_no_end() -> None:
    def work(number: int) -> int:
        return next(iter([]))

    with prefetched([1, 2], work) as results, pytest.raises(RuntimeError, match="StopIteration"):
        next(results)


def test_closing_early_ends_thread_and_source() -> None:
    closed = threading.Event()

    def endless() -> Iterator[int]:
        try:
            while True:
                yield 1
        finally:
            closed.set()

    results = prefetched(endless(), str)
    assert next(results) == "1"
    results.close()
    assert closed.is_set()
    assert list(results) == []
    results.close()


def test_stages_end_together() -> None:
    first = prefetched(iter(int, 1), str)
    with prefetched(first, len) as second:
        assert next(second) == 1
    assert list(first) == []


def test_dropping_it_ends_the_thread() -> None:
    results = prefetched(iter(int, 1), str)
    next(results)
    del results
    gc.collect()
    wait_until(lambda: all(thread.name != "mmfast-prefetch" for thread in threading.enumerate()))


def test_error_while_using_ends_the_thread() -> None:
    with pytest.raises(KeyError), prefetched(iter(int, 1), str) as results:
        raise KeyError(next(results))


def test_interpreter_ends_with_work_under_way() -> None:
    code = """
from mmfast.media import prefetched, sample, video_clips
clips = video_clips(sample("bigbuckbunny.mp4"), clip_frames=2, size=64)
results = prefetched(clips, len)
print(next(results))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "2\n", "")


@pytest.mark.parametrize(("ahead", "error"), [(0, ValueError), (-1, ValueError), (1.5, TypeError), (True, TypeError)])
def test_wrong_ahead(ahead, error) -> None:
    with pytest.raises(error, match="ahead="):
        prefetched([1], str, ahead)
