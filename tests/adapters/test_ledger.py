"""The undo ledger."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mmfast.adapters.ledger import Ledger


class Thing:
    colour = "grey"


def test_changes_are_undone_latest_first() -> None:
    order: list[int] = []
    ledger = Ledger()
    for number in range(3):
        ledger.enter(lambda number=number: order.append(number))
    assert len(ledger) == 3
    ledger.undo()
    assert order == [2, 1, 0]
    assert len(ledger) == 0
    ledger.undo()
    assert order == [2, 1, 0]


def test_an_attribute_of_the_class_shows_again() -> None:
    thing, ledger = Thing(), Ledger()
    ledger.set_attribute(thing, "colour", "red")
    assert thing.colour == "red"
    ledger.undo()
    assert vars(thing) == {}
    assert thing.colour == "grey"


def test_an_attribute_set_twice_gets_its_first_value_back() -> None:
    thing, ledger = Thing(), Ledger()
    thing.colour = "green"
    ledger.set_attribute(thing, "colour", "red")
    ledger.set_attribute(thing, "colour", "blue")
    ledger.undo()
    assert vars(thing) == {"colour": "green"}


def test_a_value_of_none_is_a_value() -> None:
    thing, ledger = Thing(), Ledger()
    thing.colour = None
    ledger.set_attribute(thing, "colour", "red")
    ledger.undo()
    assert vars(thing) == {"colour": None}


def test_hooks_are_taken_off() -> None:
    module, ledger, calls = nn.Linear(2, 2), Ledger(), []
    ledger.hook(module.register_forward_pre_hook(lambda *_: calls.append("before")))
    ledger.hook(module.register_forward_hook(lambda *_: calls.append("after")))
    module(torch.zeros(1, 2))
    assert calls == ["before", "after"]
    ledger.undo()
    module(torch.zeros(1, 2))
    assert calls == ["before", "after"]
    assert not module._forward_hooks
    assert not module._forward_pre_hooks


def test_one_failing_entry_does_not_keep_the_others() -> None:
    done: list[str] = []

    def fail(what: str) -> None:
        raise RuntimeError(what)

    ledger = Ledger()
    ledger.enter(lambda: done.append("first"))
    ledger.enter(lambda: fail("one"))
    ledger.enter(lambda: done.append("second"))
    ledger.enter(lambda: fail("two"))
    with pytest.raises(ExceptionGroup, match="could not be undone") as failure:
        ledger.undo()
    assert [str(error) for error in failure.value.exceptions] == ["two", "one"]
    assert done == ["second", "first"]
    assert len(ledger) == 0
