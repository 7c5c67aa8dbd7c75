"""Checkpoints of a training run: weights and optimizer as safetensors, the rest as JSON; never a pickle."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmfast.training.objective import Objective
from mmfast.training.settings import Settings

KEPT = 2
"""How many checkpoints are kept: the newest, and one before it."""

_NAME = re.compile(r"step-(\d+)")
# What may differ between a run and the one that goes on from it.
_FREE = ("checkpoint_every", "log_every", "on_bad", "objective.held_out", "objective.memory")


def save(
    folder: Path,
    step: int,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    settings: Settings,
    about: Mapping[str, Any],
) -> Path:
    """Write a checkpoint beside the earlier ones, whole or not at all, and delete the oldest."""
    home = folder / "checkpoints"
    home.mkdir(parents=True, exist_ok=True)
    place = home / f"step-{step:08d}"
    fresh = home / f".{place.name}"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    save_file({name: value.contiguous() for name, value in _weights(objective).items()}, fresh / "weights.safetensors")
    save_file(_optimizer_tensors(optimizer), fresh / "optimizer.safetensors")
    run = {"step": step, "settings": asdict(settings), "about": dict(about)}
    (fresh / "run.json").write_text(json.dumps(run), encoding="utf-8")
    shutil.rmtree(place, ignore_errors=True)
    fresh.rename(place)
    for old in found(folder)[:-KEPT]:
        shutil.rmtree(old)
    return place


def found(folder: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first."""
    home = folder / "checkpoints"
    return sorted(path for path in home.glob("step-*") if _NAME.fullmatch(path.name)) if home.is_dir() else []


def cut(folder: Path, step: int) -> None:
    """Delete the checkpoints after a step: those of a run that is begun anew."""
    for place in found(folder):
        if int(place.name.removeprefix("step-")) > step:
            shutil.rmtree(place)


def load(
    folder: Path,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    settings: Settings,
    about: Mapping[str, Any],
) -> int:
    """Read the newest checkpoint.

    Args:
        folder: of the run.
        objective: gets the weights.
        optimizer: gets its state.
        settings: the numbers of the run.
        about: what else the run depends on, by name, as JSON gives it back.

    Returns:
        The step to go on from; 0 where there is no checkpoint.

    Raises:
        ValueError: if it was written under other settings, of another run or for another objective.
    """
    places = found(folder)
    if not places:
        return 0
    run: dict[str, Any] = json.loads((places[-1] / "run.json").read_text(encoding="utf-8"))
    stored = run["about"]
    mine = {**asdict(settings), **about}
    # A setting that is younger than the checkpoint was at its default.
    theirs = {**{field.name: field.default for field in fields(settings)}, **run["settings"], **stored}
    differing = [n for n in {**mine, **stored} if n not in _FREE and _told(n, theirs) != _told(n, mine)]
    if differing:
        listed = ", ".join(f"{n}={_told(n, theirs)} (now {_told(n, mine)})" for n in differing)
        raise ValueError(
            f"the checkpoint {places[-1]} was written with {listed}; train into another folder, or take those settings"
        )
    weights = load_file(places[-1] / "weights.safetensors")
    own = _weights(objective)
    if {n: tuple(w.shape) for n, w in weights.items()} != {n: tuple(w.shape) for n, w in own.items()}:
        raise ValueError(f"the checkpoint {places[-1]} belongs to another objective; train into another folder")
    with torch.no_grad():
        for name, value in weights.items():
            own[name].copy_(value)
    _restore(optimizer, load_file(places[-1] / "optimizer.safetensors"))
    return int(run["step"])


def _told(name: str, known: Mapping[str, Any]) -> str:
    return repr(known[name]) if name in known else "not given"


def _weights(objective: Objective) -> dict[str, Tensor]:
    """What is trained, and buffers that are saved; frozen weights are known without a checkpoint."""
    state = objective.state_dict(keep_vars=True)
    frozen = {name for name, p in objective.named_parameters(remove_duplicate=False) if not p.requires_grad}
    kept: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in state.items():
        # Tied weights are written once.
        if name in frozen or not isinstance(value, Tensor) or id(value) in seen:
            continue
        seen.add(id(value))
        kept[name] = value.detach()
    return kept


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{index}.{name}": value.contiguous()
        for index, parameter in enumerate(_parameters(optimizer))
        for name, value in optimizer.state.get(parameter, {}).items()
    }


def _restore(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    parameters = _parameters(optimizer)
    for key, value in tensors.items():
        index, _, name = key.partition(".")
        parameter = parameters[int(index)]
        # Counters of steps stay where the optimizer keeps them.
        optimizer.state[parameter][name] = value if name == "step" else value.to(parameter.device)


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
