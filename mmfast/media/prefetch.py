"""Working ahead: the next items are made in the background while the last one is used."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from types import TracebackType
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class Prefetched(Iterator[Result]):
    """Results in the order of their items, made by a thread of their own; see :func:`prefetched`."""

    def __init__(self, items: Iterable[Any], work: Callable[[Any], Result], ahead: int) -> None:
        self._buffer: _Buffer[Result] = _Buffer(ahead)
        # The thread knows the buffer, not this object: forgetting this object ends the thread.
        thread = threading.Thread(target=_fill, args=(self._buffer, items, work), name="mmfast-prefetch", daemon=True)
        self._end = weakref.finalize(self, _stop, self._buffer, thread)
        thread.start()

    def __next__(self) -> Result:
        return self._buffer.take()

    def close(self) -> None:
        """Stop working ahead and wait for the item in work; what is ready is dropped. Closing twice does no harm."""
        self._end()

    def __enter__(self) -> Prefetched[Result]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def prefetched(items: Iterable[Item], work: Callable[[Item], Result], ahead: int = 2) -> Prefetched[Result]:
    """Apply ``work`` to each item in a background thread, at most ``ahead`` results in advance.

    Decoding, resizing and tokenizing leave the interpreter free most of the time, and a GPU leaves the processor
    free, so that both go on at once. Stages can be chained.

    Args:
        items: what is to be worked on; iterated in the background as well. A generator, or what this function
            returned, is closed at the end.
        work: makes the result of an item.
        ahead: most results that wait for being used; one more may be in work.

    Returns:
        An iterator over the results, in order. What ``items`` or ``work`` raises is raised where its result would
        have come, and ends it. It is a context manager: leaving it ends the thread. So does dropping it.

    Raises:
        TypeError: if ``ahead`` is not a whole number.
        ValueError: if ``ahead`` is below 1.

    Example:
        >>> with prefetched(range(4), lambda number: number**2) as squares:
        ...     list(squares)
        [0, 1, 4, 9]
    """
    if isinstance(ahead, bool) or not isinstance(ahead, int):
        raise TypeError(f"ahead={ahead!r} must be a whole number (int), the results that may wait")
    if ahead < 1:
        raise ValueError(f"ahead={ahead} must be at least 1; without working ahead no thread is needed")
    return Prefetched(items, work, ahead)


class _Buffer(Generic[Result]):
    """Results between two threads.

    Attributes:
        closed: whether nobody takes results any more.
    """

    def __init__(self, size: int) -> None:
        self.closed = False
        self._size = size
        self._results: deque[Result] = deque()
        self._changed = threading.Condition()
        self._ended = False
        self._error: BaseException | None = None

    def wait_for_room(self) -> bool:
        """Wait until another result may be made; False: none is wanted any more."""
        with self._changed:
            self._changed.wait_for(lambda: self.closed or len(self._results) < self._size)
            return not self.closed

    def put(self, result: Result) -> None:
        with self._changed:
            if not self.closed:
                self._results.append(result)
            self._changed.notify_all()

    def end(self, error: BaseException | None) -> None:
        """Say that no more results come, and why."""
        with self._changed:
            self._ended, self._error = True, error
            self._changed.notify_all()

    def take(self) -> Result:
        with self._changed:
            self._changed.wait_for(lambda: self._results or self._ended or self.closed)
            if self._results:
                result = self._results.popleft()
                self._changed.notify_all()
                return result
            error, self._error = self._error, None
        if error is not None:
            raise error
        raise StopIteration

    def close(self) -> None:
        with self._changed:
            self.closed, self._error = True, None
            self._results.clear()
            self._changed.notify_all()


def _fill(buffer: _Buffer[Result], items: Iterable[Any], work: Callable[[Any], Result]) -> None:
    error: BaseException | None = None
    source: Any = None
    try:
        source = iter(items)
        # Room comes first: an item that nobody takes is not even begun.
        while buffer.wait_for_room():
            try:
                item = next(source)
            except StopIteration:
                break
            buffer.put(work(item))
            del item
    except BaseException as caught:
        # It belongs to whoever takes the results. StopIteration would pass for the end there.
        error = RuntimeError("work raised StopIteration") if isinstance(caught, StopIteration) else caught
    finally:
        try:
            if isinstance(source, Generator | Prefetched):
                source.close()
        except BaseException as caught:
            error = error or caught
        buffer.end(error)


def _stop(buffer: _Buffer[Any], thread: threading.Thread) -> None:
    buffer.close()
    # Dropped inside of its own work, it cannot wait for itself.
    if thread is not threading.current_thread():
        thread.join()
