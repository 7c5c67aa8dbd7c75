"""Learned gates: training forms equal use, gradients and losses are those of the papers, what is learned comes back."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import mmfast
from mmfast.token_pruning.in_llm import dpn, dynamic_llava
from mmfast.token_pruning.layers import LayerEvent
from mmfast.token_pruning.weights import Lesson
from mmfast.training.conversations import Conversation, Source, WorldSource
from mmfast.training.gates import Gates
from mmfast.training.objective import Objective
from mmfast.training.recipe import Recipe
from mmfast.training.settings import Settings
from mmfast.training.supervised import Supervised
from mmfast.training.trainer import optimizer_of, read_log, train
from support.families import FAMILIES, Batch, Family
from support.inside import layer_tokens

SMALL = "predictor_width=16, predictor_heads=2"
DYNAMIC = f"dynamic_llava(keep=0.4, layer=1, {SMALL})"
PLANS = {
    "dynamic_llava": DYNAMIC,
    "dynamic_llava per image": f'dynamic_llava(keep=5, layer=2, scope="per_image", {SMALL})',
    "p_mod": "p_mod(keep=0.6)",
    "gamma_mod": "gamma_mod(keep=0.4)",
    "dpn": "dpn(keep=0.5)",
    "dpn by its router": "dpn(smallest=4)",
}
SETTINGS = Settings(steps=3, batch=2, learning_rate=1e-3, warmup=0, checkpoint_every=1, log_every=1)

every_plan = pytest.mark.parametrize("plan", PLANS.values(), ids=list(PLANS))
every_kind = pytest.mark.parametrize("name", ["llava", "qwen2_vl", "gemma3", "idefics3"])


def prompts(family: Family) -> Batch:
    return family.batch([2, family.image(0, 1), 2, family.image(family.sizes - 1, 2), 5], [3, family.image(), 4], [8])


def stir(parts: nn.Module, seed: int = 0) -> None:
    """Give learned parts matrices that decide something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in parts.parameters():
            if weight.ndim > 1:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)


@contextmanager
def learning(model: Any, plan: str) -> Iterator[mmfast.Accelerated]:
    """Train for a while; the models are shared."""
    with mmfast.accelerate(model, plan) as fast:
        parts = fast.learned()
        stir(parts)
        parts.requires_grad_(True)
        try:
            yield fast
        finally:
            model.zero_grad(set_to_none=True)


def switch_checkpointing(model: Any, word: str) -> None:
    """Newer releases of transformers have another name for it."""
    getattr(model, f"activation_checkpointing_{word}", getattr(model, f"gradient_checkpointing_{word}"))()


def text_places(batch: Batch) -> Tensor:
    """Places ``[B, S]`` of text: what is dropped in one form has no state to compare in the other."""
    visual = torch.zeros_like(batch.inputs["input_ids"], dtype=torch.bool)
    for row, ids in enumerate(batch.ids):
        place = visual.shape[1] - len(ids)
        for piece in batch.rows[row]:
            own = piece if isinstance(piece, int) else len(piece.ids)
            visual[row, place : place + own] = not isinstance(piece, int)
            place += own
    return batch.inputs["attention_mask"].bool() & ~visual


def logits_in_training(fast: mmfast.Accelerated, inputs: dict[str, Tensor], **how: Any) -> Tensor:
    with fast.training(gates=True, noise=False, **how):
        output: Tensor = fast.model(**inputs, use_cache=False).logits
    return output


# ------------------------------------------------------------------------------ training and use


@every_kind
@every_plan
def test_training_without_noise_is_use(name: str, plan: str) -> None:
    batch = prompts(FAMILIES[name])
    inputs, places = batch.inputs, text_places(batch)
    with learning(batch.family.model(), plan) as fast:
        trained = logits_in_training(fast, inputs)
        with torch.no_grad():
            used = fast.model(**inputs, use_cache=False).logits
    with torch.no_grad():
        full = batch.family.model()(**inputs, use_cache=False).logits
    assert (trained - used)[places].abs().max() < 1e-4
    # What is equal is not what an untouched model gives.
    assert (used - full)[places].abs().max() > 1e-2


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_soft_hiding_equals_the_model_s_own_attention(attention: str) -> None:
    family = FAMILIES["llava"]
    batch = prompts(family)
    model = family.model(attention)
    with learning(model, DYNAMIC) as fast:
        trained = logits_in_training(fast, batch.inputs)
        with torch.no_grad():
            used = model(**batch.inputs, use_cache=False).logits
    assert (trained - used)[text_places(batch)].abs().max() < 1e-4


def test_drawn_decisions_are_kept_as_often_as_the_predictor_says() -> None:
    method = dynamic_llava.DynamicLlava(keep=0.5, predictor_width=16, predictor_heads=2)
    torch.manual_seed(0)
    hidden = torch.randn(12, 8)
    stir(method.learned(8, 4, torch.device("cpu")))
    event = LayerEvent(2, 0, 4)
    tokens = layer_tokens(12, range(2, 10), hidden=hidden, lesson=Lesson(gates=True))
    wanted = method.score(tokens, event).exp()
    drawn = torch.stack([method.training_mask(tokens, event).detach() for _ in range(800)])
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    assert drawn[:, [0, 1, 10, 11]].min() == 1.0
    assert (drawn.mean(dim=0)[2:10] - wanted).abs().max() < 4 * 0.5 / math.sqrt(800)
    assert wanted.max() - wanted.min() > 0.2


def test_long_answers_are_decided_on_too_and_short_ones_are_not() -> None:
    method = dynamic_llava.DynamicLlava(keep=0.5, predictor_width=16, predictor_heads=2)
    stir(method.learned(8, 4, torch.device("cpu")))
    torch.manual_seed(0)
    for length in (49, 50):
        lesson = Lesson(gates=True, noise=False)
        answers = torch.zeros(70, dtype=torch.bool)
        answers[10 : 10 + length] = True
        tokens = layer_tokens(70, range(2, 8), hidden=torch.randn(70, 8), lesson=lesson, answers=answers)
        policy = method.training_mask(tokens, LayerEvent(2, 0, 4))
        wanted = method.decode_keep(tokens.hidden[answers]).float() if length == 50 else torch.ones(length)
        assert torch.equal(policy[answers], wanted)
        assert len(lesson.noted("written")) == (length == 50)
    assert 0 < wanted.sum() < 50


def test_dpn_draws_its_strides() -> None:
    family = FAMILIES["llava"]
    # Two maps of 25 tokens become 20 at stride (1, 2); fewer than 18 tokens are never drawn.
    batch = family.batch([2, family.image(0, 1), 1, family.image(0, 2), 5])
    with learning(family.model(), "dpn()") as fast:
        seen = set()
        for seed in range(12):
            torch.manual_seed(seed)
            with torch.no_grad(), fast.training(gates=True):
                fast.model(**batch.inputs, use_cache=False)
            seen.add(tuple(fast.report().tokens_per_layer[0]))
    assert {layers[-1] for layers in seen} == {58, 28}


# ------------------------------------------------------------------------------ gradients


def test_the_gradient_of_hard_decisions_is_that_of_soft_ones() -> None:
    logits = torch.randn(40, 2, generator=torch.Generator().manual_seed(0), requires_grad=True)
    value = torch.randn(40, generator=torch.Generator().manual_seed(1))
    for heat in (1.0, 0.3):
        hard = dynamic_llava.gumbel_keep(logits, heat, torch.Generator().manual_seed(2))
        likely = logits.log_softmax(dim=-1)
        drawn = torch.empty(40, 2).exponential_(generator=torch.Generator().manual_seed(2))
        soft = ((likely - drawn.log()) / heat).softmax(dim=-1)[:, 0]
        assert torch.equal(hard.detach(), (soft >= 0.5).float())
        mine, theirs = (torch.autograd.grad((own * value).sum(), logits)[0] for own in (hard, soft))
        torch.testing.assert_close(mine, theirs)
        chosen = torch.tensor([3, 5])
        mine, theirs = (
            torch.autograd.grad((own * value).sum(), logits)[0]
            for own in (dynamic_llava.straight_through(logits, chosen, heat), (logits / heat).softmax(dim=-1)[:, 0])
        )
        torch.testing.assert_close(mine, theirs)


def test_hidden_and_seen_tokens_pass_the_gradients_of_soft_policies(monkeypatch: pytest.MonkeyPatch) -> None:
    """What reaches a decision is how the loss changes as the token is seen a little more, or less."""
    family = FAMILIES["llava"]
    batch = prompts(family)
    policy = torch.tensor([1.0, 0.0] * 50)[: int(batch.inputs["attention_mask"][0].sum())]
    nudges = torch.zeros_like(policy).requires_grad_(True)
    rows = 0

    def decide(self: Any, tokens: Any, event: Any) -> Tensor:
        nonlocal rows
        rows += 1
        own = torch.ones(tokens.hidden.shape[0])
        if rows % 2 == 1:
            own = own.index_copy(0, tokens.candidates, (policy + nudges)[tokens.candidates])
        return own

    monkeypatch.setattr(dynamic_llava.DynamicLlava, "training_mask", decide)
    inputs, places = batch.inputs, text_places(batch)
    model = family.model()

    def loss() -> Tensor:
        with fast.training(gates=True):
            return model(**inputs, use_cache=False).logits[places].square().mean()

    with mmfast.accelerate(model, DYNAMIC) as fast:
        found = torch.autograd.grad(loss(), nudges)[0]
        visual = (found != 0).nonzero().squeeze(-1)
        for place in (visual[found[visual].abs().argmax()], visual[1], visual[-2]):
            ends = []
            for size in (1e-2, -1e-2):
                nudges.data.zero_()[place] = size
                ends.append(loss().item())
            assert abs((ends[0] - ends[1]) / 2e-2 - found[place]) < 0.02 * found.abs().max()
    # Half of the decisions are 0: these have gradients too.
    assert (policy[visual] == 0).any()
    assert (policy[visual] == 1).any()


@pytest.mark.parametrize("plan", ["p_mod(keep=0.6)", "gamma_mod(keep=0.4)", "dpn(keep=0.5)"])
def test_gradients_of_gates_are_those_of_the_loss(plan: str) -> None:
    family = FAMILIES["llava"]
    batch = prompts(family)
    inputs, places, model = batch.inputs, text_places(batch), family.model()
    with learning(model, plan) as fast:
        parts = fast.learned()

        def loss() -> Tensor:
            return logits_in_training(fast, inputs)[places].square().mean()

        weights = [w for w in parts.parameters() if w.requires_grad]
        gradients = torch.autograd.grad(loss(), weights)
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients))
        ends = []
        for size in (1e-3, -1e-3):
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.data += size * gradient / norm
            ends.append(loss().item())
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.data -= size * gradient / norm
    assert norm > 1e-5
    assert (ends[0] - ends[1]) / 2e-3 == pytest.approx(norm, rel=0.03)


def test_routers_of_p_mod_learn_from_their_start() -> None:
    """All weights are 1 there, and so is every factor."""
    family = FAMILIES["llava"]
    batch = prompts(family)
    with mmfast.accelerate(family.model(), "p_mod(keep=0.6)") as fast:
        parts = fast.learned().requires_grad_(True)
        logits_in_training(fast, batch.inputs)[text_places(batch)].square().mean().backward()
        family.model().zero_grad(set_to_none=True)
    # Layers 2 and 3 change what later ones look at; what the last layer makes of visual tokens nobody sees.
    found = {name: float(weight.grad.abs().max()) for name, weight in parts.named_parameters()}
    assert {name for name, size in found.items() if size > 0} == {n for n in found if "layers.4" not in n}


def test_the_model_learns_through_pooled_maps() -> None:
    family = FAMILIES["llava"]
    batch = family.batch([2, family.image(), 5])
    model = family.model()
    with learning(model, "dpn(keep=0.3)") as fast:
        logits_in_training(fast, batch.inputs)[:, -3:].square().mean().backward()
        touched = [n for n, w in model.named_parameters() if "projector" in n and float(w.grad.abs().max()) > 0]
        model.zero_grad(set_to_none=True)
    assert touched


# ------------------------------------------------------------------------------ losses


def test_rates_are_punished_as_computed_by_hand() -> None:
    method = dynamic_llava.DynamicLlava(keep=0.5)
    lesson = Lesson(gates=True)
    lesson.note("visual", (torch.tensor([1.0, 0.0, 0.0, 0.0]), 0.5))
    lesson.note("visual", (torch.tensor([1.0, 1.0]), 0.5))
    lesson.note("written", (torch.ones(50), 0.5))
    losses = method.training_loss(lesson)
    assert losses["visual_rate"].item() == pytest.approx(100 * (0.0625 + 0.25) / 2)
    assert losses["written_rate"].item() == pytest.approx(25.0)
    assert lesson.figures["visual_kept"] == pytest.approx(0.625)
    assert {name: value.item() for name, value in method.training_loss(Lesson()).items()} == {
        "visual_rate": 0.0,
        "written_rate": 0.0,
    }


def test_rates_of_a_batch_are_those_of_its_decisions() -> None:
    family = FAMILIES["llava"]
    batch = prompts(family)
    with learning(family.model(), DYNAMIC) as fast:
        with fast.training(gates=True, noise=False) as lesson:
            fast.model(**batch.inputs, use_cache=False)
        losses = fast.training_losses(lesson)
    shares = [math.floor(0.4 * 50) / 50, math.floor(0.4 * 25) / 25]
    wanted = 100 * sum((share - 0.4) ** 2 for share in shares) / 2
    assert losses["visual_rate"].item() == pytest.approx(wanted, abs=1e-6)
    assert lesson.figures["visual_kept"] == pytest.approx(sum(shares) / 2)


def test_routers_are_asked_to_foresee_who_takes_part() -> None:
    family = FAMILIES["llava"]
    batch = prompts(family)
    for plan, share in (("gamma_mod(keep=0.4, dense=(0,))", 10 / 25), ("gamma_mod(dense=(0,))", 13 / 25)):
        with mmfast.accelerate(family.model(), plan) as fast:
            parts = fast.learned()
            nn.init.zeros_(next(parts.parameters()))
            with fast.training(gates=True) as lesson:
                fast.model(**batch.inputs, use_cache=False)
            losses = fast.training_losses(lesson)
            # Undecided about every token, in four layers.
            assert losses["router"].item() == pytest.approx(0.01 * 4 * math.log(2), rel=1e-5)
            # In training half of the visual tokens take part where the threshold decides in use, rounded up.
            alone = batch.alone(1)
            with fast.training(gates=True):
                fast.model(**alone.inputs, use_cache=False)
            assert fast.report().tokens_per_layer[0][-1] == 7 + round(share * 25)


def test_pooling_is_pushed_as_computed_by_hand() -> None:
    method = dpn.DynamicPyramid()
    lesson = Lesson(gates=True)
    lesson.note("stride", (0, torch.tensor([0.2, 0.2, 0.6])))
    lesson.note("stride", (1, torch.tensor([0.5, 0.3, 0.2])))
    losses = method.training_loss(lesson)
    assert losses["hinge"].item() == pytest.approx(0.001 * ((1.5 - 1.2) + 1.5) / 2)


# ------------------------------------------------------------------------------ prompts end before answers


@pytest.mark.parametrize("plan", ["pyramiddrop()", "fastv(keep=0.3)", "dpn()"])
def test_answers_do_not_decide_what_their_prompts_see(plan: str) -> None:
    family = FAMILIES["llava"]
    short, other = family.batch([2, family.image(0, 1), 9]), family.batch([2, family.image(0, 1), 9])
    inputs = [short.inputs, other.inputs]
    for number, own in enumerate(inputs):
        own["input_ids"][:, -4:] = torch.tensor([3, 5, 9, 11]) + 7 * number
    answers = torch.zeros_like(inputs[0]["input_ids"], dtype=torch.bool)
    answers[:, -4:] = True
    prompt = {name: value[:, :-4] if value.ndim == 2 else value for name, value in inputs[0].items()}
    with torch.no_grad(), mmfast.accelerate(family.model(), plan) as fast:
        wanted = fast.model(**prompt, use_cache=False).logits[0, -1]
        for own in inputs:
            with fast.training(answers):
                found = fast.model(**own, use_cache=False).logits[0, -5]
            assert (found - wanted).abs().max() < 1e-5
        # Without it the last token of the answer decides.
        if plan != "dpn()":
            assert (fast.model(**inputs[0], use_cache=False).logits[0, -5] - wanted).abs().max() > 1e-3


def test_each_row_has_its_own_end() -> None:
    answers = torch.tensor([[False, True, True], [False, False, True], [False, False, False]])
    assert Lesson(answers).ends is not None
    assert Lesson(answers).ends.squeeze(-1).tolist() == [0, 1, 2]
    assert Lesson().ends is None


# ------------------------------------------------------------------------------ the objective


class Texts(Source):
    """Questions without pictures."""

    def at(self, number: int) -> Conversation:
        return Conversation((("Say yes.", "yes"),), where="text")


def gates(plan: str, **options: Any) -> Gates:
    model, processor = mmfast.load_default(dtype="float32")
    options = {"source": WorldSource(families=["color"]), **options}
    return Gates(model, processor, plan=plan, **options)


@pytest.mark.parametrize("name", ["dynamic_llava", "p_mod"])
def test_what_is_learned_is_what_weights_load(name: str, tmp_path: Path) -> None:
    plan = PLANS[name].replace("0.4", "0.1")
    objective = gates(plan)
    before = {key: value.clone() for key, value in objective.model.state_dict().items()}
    stir(objective.learned)
    train(objective, replace(SETTINGS, steps=1), tmp_path, progress=False)
    trained = {key: value.clone() for key, value in objective.learned[name].state_dict().items()}
    # The plan was taken off, and the model is what it was.
    assert all(torch.equal(value, before[key]) for key, value in objective.model.state_dict().items())
    loaded = load_file(tmp_path / f"{name}.safetensors")
    assert loaded.keys() == trained.keys()
    assert all(torch.equal(value, trained[key]) for key, value in loaded.items())
    batch = objective.batch(7, 0, 1, 2)
    weights = str(tmp_path / f"{name}.safetensors")
    found = []
    with torch.no_grad():
        for text in (plan.replace(")", f", weights={weights!r})"), plan):
            with mmfast.accelerate(objective.model, text) as fast:
                found.append(fast.model(**batch.inputs, use_cache=False).logits)
                if text == plan:
                    fast.learned()[name].load_state_dict(trained)
                    found.append(fast.model(**batch.inputs, use_cache=False).logits)
    assert torch.equal(found[0], found[2])
    assert (found[0] - found[1]).abs().max() > 1e-3


def test_a_run_that_was_broken_off_ends_where_a_whole_one_does(tmp_path: Path) -> None:
    for folder, stops in (("whole", [None]), ("parts", [1, None])):
        for stop in stops:
            train(gates(DYNAMIC), SETTINGS, tmp_path / folder, stop_after=stop, progress=False)
    whole, parts = (load_file(tmp_path / name / "dynamic_llava.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(value, parts[key]) for key, value in whole.items())


def test_the_rate_falls_to_what_is_wanted(tmp_path: Path) -> None:
    objective = gates(f"dynamic_llava(keep=0.2, layer=1, {SMALL})")
    settings = replace(SETTINGS, steps=8, batch=1, learning_rate=0.02, schedule="constant", checkpoint_every=8)
    figures = train(objective, settings, tmp_path, progress=False)
    assert read_log(tmp_path)[0]["visual_kept"] > 0.4
    assert figures["visual_kept"] == pytest.approx(0.2, abs=0.12)
    assert set(figures) >= {"answers", "visual_rate", "written_rate", "tokens_right"}


def test_the_model_learns_along_at_its_own_rate(tmp_path: Path) -> None:
    objective = gates("p_mod(keep=0.5)", trained="projector", model_rate=0.1)
    rates = [(len(group["params"]), group["lr"]) for group in optimizer_of(objective, SETTINGS).param_groups]
    assert rates == [(12, 1e-3), (4, pytest.approx(1e-4))]  # weight and bias of six gates, the projector
    before = {name: weight.clone() for name, weight in objective.model.named_parameters()}
    train(objective, replace(SETTINGS, steps=1), tmp_path, progress=False)
    changed = {name for name, weight in objective.model.named_parameters() if not torch.equal(weight, before[name])}
    assert changed == {name for name in before if "projector" in name}
    assert (tmp_path / "p_mod.safetensors").is_file()
    assert (tmp_path / "model.safetensors").is_file()


def test_a_step_without_pictures_changes_nothing() -> None:
    objective = gates("p_mod()", source=Texts())
    objective(objective.batch(0, 0, 1, 2), 0.0).total.backward()
    objective.fast.remove()
    assert all(float(weight.grad.abs().max()) == 0 for weight in objective.learned.parameters())


def test_supervised_leaves_gates_as_in_use() -> None:
    model, processor = mmfast.load_default(dtype="float32")
    objective = Supervised(model, processor, WorldSource(families=["color"]), plan="dynamic_llava(keep=0.1)")
    batch = objective.batch(0, 0, 1, 1)
    loss = objective(batch, 0.0)
    assert objective.fast is not None
    read = objective.fast.report().tokens_per_layer[0]
    assert read[-1] < 0.5 * read[0]
    assert set(loss.figures) == {"tokens_right"}
    objective.fast.remove()


def test_equal_methods_do_not_share_what_they_learn() -> None:
    model = FAMILIES["llava"].model()
    with mmfast.accelerate(model, "p_mod()") as fast:
        stir(fast.learned())
        other = mmfast.Plan.parse("p_mod()").methods[0].learned(64, 5, torch.device("cpu"))
        assert all(bool((weight == 0).all()) for weight in other.parameters())
        assert fast.learned()["p_mod"] is fast.learned()["p_mod"]


def test_what_cannot_be_trained_is_refused() -> None:
    with pytest.raises(ValueError, match="has no learned parts to train"):
        gates("fastv()")
    with pytest.raises(ValueError, match="model_rate=0 must be above 0"):
        gates("p_mod()", model_rate=0)
    family = FAMILIES["llava"]
    batch, model = prompts(family), family.model()
    with mmfast.accelerate(model, "p_mod()") as fast:
        model.train()
        switch_checkpointing(model, "enable")
        try:
            with pytest.raises(ValueError, match="trained with gradient checkpointing"), fast.training(gates=True):
                model(**batch.inputs, use_cache=False)
        finally:
            switch_checkpointing(model, "disable")
            model.eval()
    with pytest.raises(ValueError, match="has been removed from this model"), fast.training():
        pass
    with pytest.raises(ValueError, match="must say plan"):
        Recipe.of({"objective": {"kind": "gates"}, "settings": {"steps": 1, "batch": 1}}).build()


@pytest.mark.parametrize("name", ["gates", "pyramiddrop"])
def test_committed_recipes_are_read(name: str) -> None:
    recipe = Recipe.read(Path(__file__).parents[2] / "recipes" / f"{name}.toml")
    objective = recipe.build()
    assert isinstance(objective, Objective)
    assert any(weight.requires_grad for weight in objective.parameters())
    objective.fast.remove()
