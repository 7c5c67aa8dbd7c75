"""A twin of a model: the same weights, no hooks, so that a compiler sees nothing but arithmetic."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterator
from functools import cache
from typing import Any

from torch import nn


def twin_of(model: nn.Module) -> Any:
    """Return a copy of the module tree that shares all tensors and has neither hooks nor changed methods.

    Decoder layers of the twin take their masks and positions from the cache they are handed (see ``StepCache``).
    """
    twin: Any = _copied(model, {})
    for index, layer in enumerate(twin.get_decoder().layers):
        kind: Any = type(layer)
        layer.__class__ = _stepping(kind)
        layer.__dict__["step_index"] = index
    return twin


def _copied(module: nn.Module, known: dict[int, nn.Module]) -> nn.Module:
    if id(module) in known:
        return known[id(module)]
    twin = known[id(module)] = type(module).__new__(type(module))
    for name, value in vars(module).items():
        if "hooks" in name and isinstance(value, dict):
            twin.__dict__[name] = OrderedDict()
        elif name == "_modules":
            children = value.items()
            twin.__dict__[name] = {key: None if child is None else _copied(child, known) for key, child in children}
        elif not _overrides(module, name, value):
            # The tables of parameters and buffers stay the very same, so that what is assigned later is seen too.
            twin.__dict__[name] = value
    return twin


def _overrides(module: nn.Module, name: str, value: Any) -> bool:
    """Whether an attribute of one instance stands in for a method of its class."""
    return callable(value) and not isinstance(value, nn.Module | type) and callable(getattr(type(module), name, None))


class _Stepping:
    """Mixin of a decoder layer: masks and positions are those of its own cache layer."""

    step_index: int

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        kwargs = kwargs["past_key_values"].fitted(self, self.step_index, args, kwargs)
        return super().forward(*args, **kwargs)  # type: ignore[misc]


@cache
def _stepping(kind: Any) -> Any:
    return type(f"Stepping{kind.__name__}", (_Stepping, kind), {})


def fingerprint(model: nn.Module) -> tuple[Any, ...]:
    """Return what must stay the same for a twin, and for what was compiled of it, to be of use."""
    modules = tuple((id(module), module.training) for module in model.modules())
    tensors = (*model.parameters(), *model.buffers())
    return modules, tuple((id(tensor), tensor.data_ptr(), tensor.dtype) for tensor in tensors)


def hindrance(model: nn.Module, owners: Collection[object]) -> str:
    """Say why a twin would compute something else than the model; empty where it would not.

    Args:
        model: the model.
        owners: whose hooks may be left out, because their work is done otherwise.
    """
    if len({tensor.device for tensor in model.parameters()}) > 1:
        return "the model lies on several devices"
    for name, module in model.named_modules():
        if "forward" in vars(module):
            return f"the forward of {name or 'the model'} has been replaced"
        for hook in _hooks(module):
            known = any(getattr(hook, "__self__", None) is owner for owner in owners)
            if not known and not _is_of_transformers(hook):
                return f"{name or 'the model'} has a hook of its own"
    return ""


def _hooks(module: nn.Module) -> Iterator[Any]:
    yield from module._forward_pre_hooks.values()
    yield from module._forward_hooks.values()


def _is_of_transformers(hook: Any) -> bool:
    """Whether a hook only collects outputs, which transformers installs and leaves idle."""
    return str(getattr(hook, "__module__", "")).startswith("transformers.utils.")
