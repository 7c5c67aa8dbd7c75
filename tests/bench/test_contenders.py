"""What is run on a model: shared weights, apart from each other; runner files and what is wrong with them."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest
import torch

import mmfast
from mmfast.adapters import random_model
from mmfast.bench.ceilings import Ceilings
from mmfast.bench.contenders import Case, Planned, Untouched, load_runner, sharing_weights
from mmfast.bench.models import contenders_of, decode_weight_bytes, model_cell

CPU, FLOAT = torch.device("cpu"), torch.float32
CEILINGS = Ceilings(copy=1e9, matmul=1e9)
RUNNER = """
    NAME = "peer"

    def build(case):
        return case

    def prefill(case):
        return case.model(**case.inputs, use_cache=True).past_key_values, case

    def decode(prefilled, tokens):
        cache, case = prefilled
        for _ in range(tokens):
            case.model(input_ids=case.inputs["input_ids"][:, -1:], past_key_values=cache)
"""


def case(name: str = "LLaVA-1.5-7B", batch: int = 2) -> Case:
    found = random_model(name, "tiny", device=CPU, dtype=FLOAT)
    return Case(name, "tiny", found.model, found.inputs(batch), batch, CPU, FLOAT)


def written(folder: Path, text: str) -> Path:
    path = folder / "runner.py"
    path.write_text(textwrap.dedent(text))
    return path


def test_twins_share_weights_and_nothing_else() -> None:
    own = case()
    other = sharing_weights(own.model)
    with torch.inference_mode():
        before = own.model(**own.inputs).logits
        mmfast.accelerate(other, "divprune(keep=8)")
        other.set_attn_implementation("eager")
        assert torch.equal(own.model(**own.inputs).logits, before)
    assert own.model.config._attn_implementation == "sdpa"
    assert {id(weight) for weight in other.parameters()} == {id(weight) for weight in own.model.parameters()}


@pytest.mark.parametrize("contender", [Planned("divprune(keep=16)"), Untouched("eager", reads_attention=True)])
def test_a_cell_holds_both_sides(contender: Planned | Untouched) -> None:
    cell = model_cell(contender, case(), ceilings=CEILINGS, new_tokens=4, repeats=2, seconds=30.0)
    assert cell["sides"].keys() == {"hf sdpa", contender.name}
    assert cell["left_out"] == {}
    assert (cell["visual_tokens"], cell["prompt_tokens"]) == (64, 128)
    assert "sdpa attention, float32, cpu with 1 threads, batch 2, prompt of 128 tokens" in cell["setting"]
    base, own = cell["sides"]["hf sdpa"], cell["sides"][contender.name]
    assert base["faster_total"]["median"] == 1.0
    assert not base["slower"]
    assert own["slower"] == (own["faster_total"]["median"] < 1.0)
    assert own["tokens_per_second"] == pytest.approx(2 / own["per_token"]["median"])
    assert own["entered_tokens"] == (16 if isinstance(contender, Planned) else 64)


def test_floors_follow_from_work_and_ceilings() -> None:
    own = case(batch=1)
    cell = model_cell(Planned("divprune(keep=16)"), own, ceilings=CEILINGS, new_tokens=4, repeats=1, seconds=30.0)
    side = cell["sides"]["hf sdpa"]
    # 3 layers of 128 tokens: 2 * 128 * 64 * (64 + 32) + 2 * 128 * 128 * 64 + 3 * 128 * 64 * 128 operations of two each.
    assert side["prefill_floor"] == pytest.approx(2 * 3 * (1_572_864 + 2_097_152 + 3_145_728) / 1e9)
    # Of each layer 64 * (64 + 32 + 32 + 64 + 3 * 128) weights and two norms, the last norm, and the head.
    weights = 4 * (3 * (64 * 576 + 128) + 64 + 512 * 64)
    assert decode_weight_bytes(own.model) == weights
    # 130 tokens: of the answer of four, two on average.
    assert side["decode_floor"] == pytest.approx((weights + 2 * 3 * 130 * 32 * 4) / 1e9)


def test_a_contender_that_is_refused_is_left_out() -> None:
    cell = model_cell(
        Planned("divprune(keep=16) + fastv(layer=9, keep=8)"),
        case(batch=1), ceilings=CEILINGS, new_tokens=2, repeats=1, seconds=9.0,
    )  # fmt: skip
    assert cell["sides"].keys() == {"hf sdpa"}
    assert "layer=9" in cell["left_out"]["divprune(keep=16) + fastv(layer=9, keep=8)"]


def test_a_runner_file_is_run_beside(tmp_path: Path) -> None:
    runner = load_runner(written(tmp_path, RUNNER))
    cell = model_cell(runner, case(batch=1), ceilings=CEILINGS, new_tokens=3, repeats=2, seconds=30.0)
    assert cell["contender"] == "peer"
    assert cell["sides"]["peer"]["first_token"]["repeats"] == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def build(case): ...", r"does not define prefill\(\)"),
        (RUNNER.replace("def decode(prefilled, tokens)", "def decode(prefilled)"), r"decode\(\) must take 2 arguments"),
        (RUNNER.replace("def build(case):", "build = 3\n\n    def other(case):"), r"does not define build\(\)"),
        ("def build(:", "cannot be imported: SyntaxError"),
        ("import nothing_of_that_name", "cannot be imported: ModuleNotFoundError"),
    ],
)
def test_a_malformed_runner_file_is_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        load_runner(written(tmp_path, text))


def test_contenders_of_a_model() -> None:
    names = [one.name for one in contenders_of(64, (), flash=True, compiled=True)]
    assert names[0] == "divprune(keep=64)"
    assert {"full, compiled", "hf flash_attention_2", "hf eager, attention read"} <= set(names)
    asked = [one.name for one in contenders_of(64, ("uniform(keep=8)",), flash=False, compiled=False)]
    assert asked == ["uniform(keep=8)", "hf eager, attention read"]


def test_what_could_not_be_compiled_is_not_called_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*args: object, **kwargs: object) -> object:
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(torch, "compile", failing)
    cell = model_cell(
        Planned("full", compiled=True), case(batch=1), ceilings=CEILINGS, new_tokens=4, repeats=1, seconds=9.0
    )
    assert cell["sides"].keys() == {"hf sdpa"}
    assert "uncompiled" in cell["left_out"]["full, compiled"]
