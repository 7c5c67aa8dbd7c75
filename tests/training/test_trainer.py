"""The training loop: what it learns, how it goes on after a break, what it does with bad numbers."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mmfast.training import checkpoints
from mmfast.training.objective import BadExample, Loss, Objective
from mmfast.training.optimizers import Muon, orthogonalised
from mmfast.training.settings import Settings
from mmfast.training.trainer import LOG, optimizer_of, read_log, train

pytest.importorskip("accelerate", reason="training needs accelerate (extra train)")

SETTINGS = Settings(steps=12, batch=4, learning_rate=0.05, warmup=2, checkpoint_every=4, log_every=1)


class Line(Objective):
    """Fit a line by a small network with dropout, so that what is drawn matters."""

    def __init__(self, poison: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.2), nn.Linear(8, 1))
        self.frozen = nn.Parameter(torch.ones(1), requires_grad=False)
        self.poison = poison
        self.parts: list[tuple[int, int, int, int]] = []

    def batch(self, step: int, part: int, parts: int, size: int) -> Tensor:
        self.parts.append((step, part, parts, size))
        chance = torch.Generator().manual_seed(step * parts + part)
        points = torch.randn(size, 2, generator=chance)
        return points * torch.nan if step == self.poison else points

    def forward(self, batch: Tensor, done: float) -> Loss:
        gap = self.net(batch).squeeze(-1) - batch @ torch.tensor([1.0, -2.0])
        return Loss(gap.square().mean(), {"done": done})

    def describe(self, batch: Any) -> str:
        return "points 1 to 4"

    def export(self, folder: Path) -> None:
        (folder / "exported").write_text("yes")


def weights(objective: Objective) -> list[Tensor]:
    return [p.detach().clone() for p in objective.parameters()]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_that_was_broken_off_ends_where_a_whole_one_does(tmp_path: Path, optimizer: Any) -> None:
    settings = replace(SETTINGS, optimizer=optimizer)
    whole, first, second = Line(), Line(), Line()
    train(whole, settings, tmp_path / "whole", progress=False)
    train(first, settings, tmp_path / "parts", stop_after=5, progress=False)
    assert not (tmp_path / "parts" / "exported").exists()
    train(second, settings, tmp_path / "parts", progress=False)
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(second), strict=True))
    logs = [[(line["step"], line["loss"]) for line in read_log(tmp_path / name)] for name in ("whole", "parts")]
    assert logs[0] == logs[1]
    assert (tmp_path / "parts" / "exported").exists()


def test_a_kill_between_checkpoints_leaves_no_trace(tmp_path: Path) -> None:
    train(Line(), SETTINGS, tmp_path / "whole", progress=False)
    train(Line(), SETTINGS, tmp_path / "parts", stop_after=6, progress=False)
    # As if the process had died after step 6 was logged, before it was saved, while a line was written.
    newest = checkpoints.found(tmp_path / "parts")[-1]
    assert newest.name == "step-00000006"
    for file in newest.iterdir():
        file.unlink()
    newest.rmdir()
    (tmp_path / "parts" / "checkpoints" / ".step-00000007").mkdir()
    with (tmp_path / "parts" / LOG).open("a") as log:
        log.write('{"step": 7, "lo')
    train(Line(), SETTINGS, tmp_path / "parts", progress=False)
    assert [line["loss"] for line in read_log(tmp_path / "parts")] == [
        line["loss"] for line in read_log(tmp_path / "whole")
    ]


def test_it_learns(tmp_path: Path) -> None:
    settings = replace(SETTINGS, steps=120)
    train(Line(), settings, tmp_path, progress=False)
    log = read_log(tmp_path)
    assert log[-1]["loss"] < 0.3 * log[0]["loss"]


def test_accumulated_passes_are_one_step(tmp_path: Path) -> None:
    objective = Line()
    train(objective, replace(SETTINGS, steps=1, accumulate=2), tmp_path, progress=False)
    assert objective.parts == [(0, 0, 2, 2), (0, 1, 2, 2)]


def test_figures_of_some_passes_are_averaged_over_those(tmp_path: Path) -> None:
    class Named(Line):
        passes = 0

        def forward(self, batch: Tensor, done: float) -> Loss:
            number = float(self.passes)
            self.passes += 1
            return Loss(super().forward(batch, done).total, {"all": number, f"only_{number:.0f}": number})

    figures = train(Named(), replace(SETTINGS, steps=1, accumulate=2), tmp_path, progress=False)
    assert (figures["all"], figures["only_0"], figures["only_1"]) == (0.5, 0.0, 1.0)


class Shares(Objective):
    """Fit a number to the mean of values, of which the passes of a step have one and three."""

    def __init__(self) -> None:
        super().__init__()
        self.number = nn.Parameter(torch.zeros(()))

    def batch(self, step: int, part: int, parts: int, size: int) -> Tensor:
        values = torch.tensor([8.0, 1.0, 2.0, 3.0])
        return values if parts == 1 else values[:1] if part == 0 else values[1:]

    def forward(self, batch: Tensor, done: float) -> Loss:
        mean = (self.number - batch).square().mean()
        return Loss(mean, {"mean": float(mean.detach())})

    def weight(self, batch: Tensor) -> float:
        return len(batch)

    def export(self, folder: Path) -> None:
        (folder / "number").write_text(str(float(self.number.detach())))


def test_passes_count_by_what_their_losses_are_means_of(tmp_path: Path) -> None:
    found = []
    for accumulate in (1, 2):
        settings = replace(SETTINGS, steps=1, warmup=0, clip=0.0, accumulate=accumulate)
        objective = Shares()
        figures = train(objective, settings, tmp_path / str(accumulate), progress=False)
        found.append((figures["loss"], figures["mean"], float(objective.number.grad or 0.0)))
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    assert found[0][2] == pytest.approx(-7.0)


@pytest.mark.parametrize("on_bad", ["stop", "skip"])
def test_a_bad_example_stops_or_leaves_out_its_step(
    tmp_path: Path, on_bad: Any, caplog: pytest.LogCaptureFixture
) -> None:
    class Spoilt(Line):
        def batch(self, step: int, part: int, parts: int, size: int) -> Tensor:
            if step == 3 and part == 1:
                raise BadExample("here.jsonl:7: no answer")
            return super().batch(step, part, parts, size)

    settings = replace(SETTINGS, accumulate=2, on_bad=on_bad)
    if on_bad == "stop":
        with pytest.raises(BadExample, match=r"here\.jsonl:7"):
            train(Spoilt(), settings, tmp_path, progress=False)
        return
    with caplog.at_level(logging.WARNING):
        figures = train(Spoilt(), settings, tmp_path, progress=False)
    assert figures["step"] == 12
    assert "here.jsonl:7: no answer; step 3 is left out" in caplog.text


def test_muon_refuses_rates_of_parts() -> None:
    class Parts(Line):
        def groups(self) -> list[tuple[list[nn.Parameter], float]]:
            return [(list(self.net.parameters()), 0.1)]

    with pytest.raises(ValueError, match="model_rate"):
        optimizer_of(Parts(), replace(SETTINGS, optimizer="muon"))


def test_a_run_that_is_begun_anew_forgets_the_one_before(tmp_path: Path) -> None:
    train(Line(), SETTINGS, tmp_path, progress=False)
    train(Line(), SETTINGS, tmp_path, resume=False, stop_after=4, progress=False)
    assert [path.name for path in checkpoints.found(tmp_path)] == ["step-00000004"]


def test_a_finished_run_says_so_again(tmp_path: Path) -> None:
    first = train(Line(), SETTINGS, tmp_path, progress=False)
    again = train(Line(), SETTINGS, tmp_path, progress=False)
    assert again["step"] == 12
    assert again["loss"] == pytest.approx(first["loss"], rel=1e-5)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"step 3: the loss is not finite, for points 1 to 4; lower learning_rate"):
        train(Line(poison=3), SETTINGS, tmp_path, progress=False)


def test_or_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    objective = Line(poison=3)
    with caplog.at_level(logging.WARNING):
        train(objective, replace(SETTINGS, on_bad="skip"), tmp_path, progress=False)
    assert "step 3: the loss is not finite" in caplog.text
    logged = (tmp_path / LOG).read_text().splitlines()
    assert [json.loads(line, parse_constant=pytest.fail)["loss"] is None for line in logged].index(True) == 3
    assert math.isnan(read_log(tmp_path)[3]["loss"])
    assert all(bool(w.isfinite().all()) for w in weights(objective))


def test_other_settings_do_not_go_on(tmp_path: Path) -> None:
    train(Line(), SETTINGS, tmp_path, stop_after=4, progress=False)
    with pytest.raises(ValueError, match=r"learning_rate=0.05 \(now 0.1\)"):
        train(Line(), replace(SETTINGS, learning_rate=0.1), tmp_path, progress=False)
    # How often it is logged and saved changes nothing.
    train(Line(), replace(SETTINGS, log_every=3), tmp_path, stop_after=1, progress=False)


def test_another_run_does_not_go_on(tmp_path: Path) -> None:
    about = {"data.families": ("color",), "objective.kd_weight": 1.0, "objective.memory": 2.0}
    train(Line(), SETTINGS, tmp_path, about=about, stop_after=4, progress=False)
    for other, message in [
        ({**about, "objective.kd_weight": 2.0}, r"objective.kd_weight=1.0 \(now 2.0\)"),
        ({**about, "model.path": "embedded"}, r"model.path=not given \(now 'embedded'\)"),
        ({"data.families": ["color"]}, r"objective.kd_weight=1.0 \(now not given\)"),
    ]:
        with pytest.raises(ValueError, match=f"was written with {message}; train into another folder"):
            train(Line(), SETTINGS, tmp_path, about=other, progress=False)
    # How much is kept in memory changes nothing.
    train(Line(), SETTINGS, tmp_path, about={**about, "objective.memory": 1.0}, stop_after=1, progress=False)


def test_another_number_of_processes_does_not_go_on(tmp_path: Path) -> None:
    train(Line(), SETTINGS, tmp_path, stop_after=4, progress=False)
    run = checkpoints.found(tmp_path)[-1] / "run.json"
    content = json.loads(run.read_text())
    content["about"]["processes"] = 4
    run.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"processes=4 \(now 1\)"):
        train(Line(), SETTINGS, tmp_path, progress=False)


def test_a_setting_that_is_younger_than_a_checkpoint_was_at_its_default(tmp_path: Path) -> None:
    train(Line(), SETTINGS, tmp_path, stop_after=4, progress=False)
    run = checkpoints.found(tmp_path)[-1] / "run.json"
    content = json.loads(run.read_text())
    del content["settings"]["clip_value"]
    run.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"clip_value=0.0 \(now 0.5\)"):
        train(Line(), replace(SETTINGS, clip_value=0.5), tmp_path, progress=False)
    assert train(Line(), SETTINGS, tmp_path, progress=False)["step"] == 12


def test_entries_of_the_gradient_are_clipped(tmp_path: Path) -> None:
    def largest(clip_value: float) -> float:
        objective = Line()
        settings = replace(SETTINGS, steps=1, clip=0.0, clip_value=clip_value)
        train(objective, settings, tmp_path / str(clip_value), progress=False)
        return max(float(p.grad.abs().max()) for p in objective.parameters() if p.grad is not None)

    assert largest(0.0) > 0.02
    assert largest(0.01) == pytest.approx(0.01)


def test_what_comes_before_the_first_step_and_after_the_last(tmp_path: Path) -> None:
    class Measured(Line):
        def begin(self, folder: Path, part: int, parts: int) -> None:
            (folder / "begun").write_text(f"{part} of {parts}, {len(self.parts)} steps")

        def evaluate(self, folder: Path) -> dict[str, float]:
            assert (folder / "exported").exists()
            return {"worth": 2.0}

    assert "worth" not in train(Measured(), SETTINGS, tmp_path, stop_after=4, progress=False)
    assert (tmp_path / "begun").read_text() == "0 of 1, 0 steps"
    figures = train(Measured(), SETTINGS, tmp_path, progress=False)
    assert (figures["step"], figures["worth"]) == (12, 2.0)


def test_checkpoints_hold_what_is_trained_alone(tmp_path: Path) -> None:
    train(Line(), SETTINGS, tmp_path, progress=False)
    found = checkpoints.found(tmp_path)
    assert [path.name for path in found] == ["step-00000008", "step-00000012"]
    assert "frozen" not in load_file(found[-1] / "weights.safetensors")
    assert {path.suffix for path in found[-1].iterdir()} == {".safetensors", ".json"}
    assert json.loads((found[-1] / "run.json").read_text())["step"] == 12


def test_nothing_to_train(tmp_path: Path) -> None:
    objective = Line()
    objective.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        train(objective, SETTINGS, tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0),
        ("batch", True),
        ("accumulate", 3),
        ("learning_rate", -1.0),
        ("final", 2.0),
        ("schedule", "step"),
        ("adam_beta2", 1.0),
        ("clip_value", -1.0),
    ],
)
def test_settings_name_what_is_wrong(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{field}={value!r}"):
        Settings(**{"steps": 1, "batch": 4, field: value})


def test_the_rate_rises_and_falls() -> None:
    settings = Settings(steps=100, batch=1, warmup=10, decay_from=0.5, schedule="linear", final=0.1)
    rates = [settings.rate_at(step) for step in (0, 5, 10, 49, 75, 100)]
    assert rates == pytest.approx([0.0, 0.5, 1.0, 1.0, 0.55, 0.1])


def test_matrices_are_orthogonalised_and_the_rest_is_not() -> None:
    objective = Line()
    optimizer = optimizer_of(objective, replace(SETTINGS, optimizer="muon"))
    assert isinstance(optimizer, Muon)
    muon, adam = optimizer.param_groups
    assert [tuple(p.shape) for p in muon["params"]] == [(8, 2), (1, 8)]
    assert [tuple(p.shape) for p in adam["params"]] == [(8,), (1,)]
    before = [p.detach().clone() for p in muon["params"]]
    objective(objective.batch(0, 0, 1, 4), 0.0).total.backward()
    optimizer.step()
    for old, new in zip(before, muon["params"], strict=True):
        # One step moves by the rate times 0.2 sqrt(max(m, n)) along something near an orthogonal matrix.
        moved = (old - new) / (0.05 * 0.2 * max(old.shape) ** 0.5)
        assert 0.6 < torch.linalg.svdvals(moved.detach()).max() < 1.3


def test_orthogonalised_turns_tall_matrices_too() -> None:
    tall = torch.randn(9, 3, generator=torch.Generator().manual_seed(0))
    assert orthogonalised(tall).shape == (9, 3)
    torch.testing.assert_close(orthogonalised(tall), orthogonalised(tall.T).T)
