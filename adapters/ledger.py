"""The undo ledger: every change to a model is entered here, and undone in reverse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils.hooks import RemovableHandle

_MISSING = object()


class Ledger:
    """Record changes together with how to undo them.

    Example:
        >>> class Thing: pass
        >>> thing, ledger = Thing(), Ledger()
        >>> ledger.set_attribute(thing, "colour", "red")
        >>> ledger.undo(); hasattr(thing, "colour")
        False
    """

    def __init__(self) -> None:
        self._entries: list[Callable[[], None]] = []

    def __len__(self) -> int:
        return len(self._entries)

    def enter(self, undo: Callable[[], None]) -> None:
        """Enter a change that has just been made, by the call that undoes it."""
        self._entries.append(undo)

    def hook(self, handle: RemovableHandle) -> None:
        """Enter a hook by its handle."""
        self._entries.append(handle.remove)

    def set_attribute(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute of one instance; undo restores the old one or deletes it."""
        before = vars(owner).get(name, _MISSING)
        setattr(owner, name, value)

        def undo() -> None:
            if before is _MISSING:
                delattr(owner, name)
            else:
                setattr(owner, name, before)

        self._entries.append(undo)

    def undo(self) -> None:
        """Undo everything, latest first; one failing entry does not keep the others from running.

        Raises:
            ExceptionGroup: if entries failed, after all of them have been tried.
        """
        failures: list[Exception] = []
        while self._entries:
            entry = self._entries.pop()
            try:
                entry()
            except Exception as error:
                failures.append(error)
        if failures:
            raise ExceptionGroup("some changes to the model could not be undone", failures)
