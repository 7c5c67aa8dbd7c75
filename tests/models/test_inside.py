"""What methods inside the language model are given, and everything they may decide, on every family."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch

import mmfast
from mmfast.token_pruning.base import Method
from mmfast.token_pruning.layers import LayerRequest
from support.cases import CASES, case_id, mixed, one, two
from support.checks import CLOSE, census, check_against_reference, first_logits
from support.families import FAMILIES, Batch, Family
from support.flash import FLASH, flash_on_cpu
from support.reference import expected
from support.trials import EVENTS, Detour, Trial, Window, compare

every_case = pytest.mark.parametrize(("family", "case"), CASES, ids=case_id)
every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=case_id)

REQUESTS = {
    "last row of the layer before": [LayerRequest(layer - 1, queries="last") for layer in EVENTS],
    "own layer ahead": [LayerRequest(layer, ahead=True) for layer in EVENTS],
    "own layer ahead with values": [LayerRequest(layer, ahead=True, values=True) for layer in EVENTS],
    "last row ahead": [LayerRequest(layer, ahead=True, queries="last") for layer in EVENTS],
    "across earlier drops": [LayerRequest(0), LayerRequest(0), LayerRequest(2)],
    "not rotated": [LayerRequest(layer, ahead=True, rotary=False) for layer in EVENTS],
    "not rotated, earlier layers": [LayerRequest(layer - 1, rotary=False) for layer in EVENTS],
}


@pytest.fixture(scope="module", autouse=True)
def _flash() -> Iterator[None]:
    with flash_on_cpu():
        yield


def check_trial(trial: Trial, batch: Batch, attention: str = "sdpa") -> None:
    """Compare what comes out, and what the method was given row by row."""
    trial = replace(trial, log=[])
    check_against_reference(batch, [trial], attention)
    rows = [row for row in range(len(batch)) if batch.media[row]]
    steps = len(EVENTS)
    pruned, reference = trial.log[: steps * len(rows)], trial.log[steps * len(rows) :]
    assert len(reference) == len(pruned)
    for number in range(len(rows)):
        for step in range(steps):
            compare(pruned[step * len(rows) + number], reference[number * steps + step], CLOSE)


@every_family
@pytest.mark.parametrize("asks", REQUESTS.values(), ids=REQUESTS.keys())
def test_the_attention_asked_for_is_given(family: Family, asks: list[LayerRequest]) -> None:
    check_trial(Trial(needs=frozenset({"attention"}), asks=tuple(asks)), mixed(family))


@pytest.mark.parametrize(
    ("family", "attention"),
    [(family, "eager") for family in FAMILIES.values()]
    + [(family, FLASH) for family in FAMILIES.values() if not family.window],
    ids=case_id,
)
def test_other_implementations_give_the_same_attention(family: Family, attention: str) -> None:
    asks = (LayerRequest(0), LayerRequest(3, ahead=True, values=True), LayerRequest(3, rotary=False))
    check_trial(Trial(needs=frozenset({"attention"}), asks=asks), mixed(family), attention)


@every_family
@pytest.mark.parametrize("case", [one, two])
def test_attention_without_padding(family: Family, case: Callable[[Family], Batch]) -> None:
    """Where no mask may be needed at all."""
    asks = (LayerRequest(0), LayerRequest(3, ahead=True, values=True), LayerRequest(3, rotary=False))
    check_trial(Trial(needs=frozenset({"attention"}), asks=asks), case(family))


@every_case
@pytest.mark.parametrize("norm", ["final_norm", "layer_norm"])
def test_states_and_places_are_given(family: Family, case: Callable[[Family], Batch], norm: str) -> None:
    check_trial(Trial(needs=frozenset({"embeds", "activations", norm})), case(family))


@every_case
@pytest.mark.parametrize(("adaptive", "scope"), [(False, "per_image"), (True, "global")])
def test_tokens_merge_between_layers(
    family: Family, case: Callable[[Family], Batch], adaptive: bool, scope: str
) -> None:
    check_against_reference(case(family), [Trial(merge=True, adaptive=adaptive, scope=scope)])


@pytest.mark.parametrize("family", [family for family in FAMILIES.values() if family.renumbers], ids=case_id)
@pytest.mark.parametrize(
    "asks", [REQUESTS["own layer ahead"], REQUESTS["across earlier drops"]], ids=["ahead", "before"]
)
def test_renumbered_positions(family: Family, asks: list[LayerRequest]) -> None:
    trial = Trial(needs=frozenset({"attention"}), asks=tuple(asks), merge=True, positions="compact")
    check_trial(trial, mixed(family))


@every_family
def test_after_a_cut_before_the_decoder(family: Family) -> None:
    plan = [*mmfast.Plan.parse("pool2d(keep=0.7)").methods, Trial(merge=True, needs=frozenset({"embeds"}))]
    check_against_reference(mixed(family), plan)


@pytest.mark.parametrize("cuts", [((4, 0, 4),), ((1, 0, 1), (3, 2, 3)), ((3, 0, 2), (4, 2, 4))], ids=str)
@pytest.mark.parametrize(
    ("family", "positions"),
    [
        (family, positions)
        for family in FAMILIES.values()
        for positions in ("keep", "compact")
        if family.renumbers or positions == "keep"
    ],
    ids=case_id,
)
def test_caches_of_earlier_layers_are_truncated(
    family: Family, cuts: tuple[tuple[int, int, int], ...], positions: str
) -> None:
    """The prompt is read as without that; the tokens after it find less."""
    check_against_reference(mixed(family), [Trial(cuts=cuts, positions=positions)])


# ------------------------------------------------------------------------ around a layer


ROUTES = {
    "plain": {},
    "gate": {"gated": True},
    "fade": {"faded": True},
    "states": {"replaced": True},
    "text": {"routes_text": True},
    "asks": {"asks": True},
    "decode": {"routes_decode": True},
}
WAYS = [
    (way, route)
    for way in ("skip", "freeze", "attention")
    for route in ROUTES
    if (route != "states" or way == "freeze") and (route not in ("fade", "decode") or way == "skip")
]


@pytest.mark.parametrize(
    "name", ["llava", "llava_onevision", "qwen2_5_vl", "qwen3_vl", "internvl", "paligemma", "gemma3"]
)
@pytest.mark.parametrize(("way", "route"), WAYS)
def test_tokens_go_around_layers(name: str, way: str, route: str) -> None:
    check_against_reference(mixed(FAMILIES[name]), [Detour(bypass=way, **ROUTES[route])])


@pytest.mark.parametrize(("family", "case"), [pair for pair in CASES if pair[1] is not mixed], ids=case_id)
@pytest.mark.parametrize("way", ["skip", "freeze", "attention"])
def test_every_prompt_goes_around(family: Family, case: Callable[[Family], Batch], way: str) -> None:
    check_against_reference(case(family), [Detour(bypass=way)])


@every_family
@pytest.mark.parametrize("way", ["skip", "freeze", "attention"])
@pytest.mark.parametrize("attention", ["eager", FLASH])
def test_going_around_with_other_attention(family: Family, way: str, attention: str) -> None:
    if attention == FLASH and (family.window or way == "freeze"):
        model, stock = family.model(attention), census(family.model(attention))
        with pytest.raises(ValueError, match=r"cannot read|measures sliding windows"):
            mmfast.accelerate(model, [Detour(bypass=way)]).remove()
        assert census(model) == stock
        return
    check_against_reference(mixed(family), [Detour(bypass=way)], attention)


@every_family
@pytest.mark.parametrize("way", ["skip", "freeze", "attention"])
def test_going_around_after_a_cut_before_the_decoder(family: Family, way: str) -> None:
    plan = [*mmfast.Plan.parse("pool2d(keep=0.7)").methods, Detour(bypass=way)]
    check_against_reference(mixed(family), plan)


@every_family
@pytest.mark.parametrize("way", ["skip", "freeze", "attention"])
def test_all_layers_have_a_bypass(family: Family, way: str) -> None:
    check_against_reference(two(family), [Detour(bypass=way, layers=(0, 1, 2, 3, 4))])


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl", "gemma3"])
@pytest.mark.parametrize("way", ["skip", "freeze", "attention"])
@pytest.mark.parametrize("layers", [(2,), (1, 3, 4)], ids=["between", "same-layers"])
def test_dropping_and_going_around(name: str, way: str, layers: tuple[int, ...]) -> None:
    """What is read ahead in the layers that do both is the attention of all that are alive."""
    drops = Trial(needs=frozenset({"attention"}), asks=tuple(REQUESTS["own layer ahead"]), merge=True)
    check_against_reference(mixed(FAMILIES[name]), [drops, Detour(bypass=way, layers=layers)])


@pytest.mark.parametrize(
    "plan",
    [
        "pyramiddrop(keep=0.5) + shortv(keep=0.4)",
        "pyramiddrop(keep=0.5) + zipvl(keep=0.5)",
        "fastv(keep=5) + p_mod(keep=0.6)",
        "fastv(keep=5) + gamma_mod(keep=0.4)",
        "dart(keep=6) + shortv(keep=0.4)",
        "fastv(keep=5) + aki_mma()",
        "scope(keep=12) + himap(keep=0.5) + shortv(keep=0.4)",
    ],
)
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_published_methods_compose(name: str, plan: str) -> None:
    check_against_reference(mixed(FAMILIES[name]), plan)


@pytest.mark.parametrize(
    "plan",
    [
        "fastv(keep=5, layer=4) + gamma_mod(keep=0.4)",
        "corematching(keep=0.5) + p_mod(keep=0.6)",
        "fastv(keep=5) + saisa()",
        "fastv(keep=5) + zipvl(keep=0.5)",
    ],
)
def test_reading_where_tokens_go_around_is_refused(plan: str) -> None:
    """Tokens that take no part in a layer have no row of its attention and no activations there."""
    model = FAMILIES["llava"].model()
    stock = census(model)
    with pytest.raises(ValueError, match="go around"):
        mmfast.accelerate(model, plan).remove()
    assert census(model) == stock


METHODS = {
    "merge": Trial(merge=True),
    **{way: Detour(bypass=way) for way in ("skip", "freeze", "attention")},
    "mask": Window(),
}


@every_family
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no-cache"])
def test_one_forward_pass(family: Family, method: Method, use_cache: bool) -> None:
    """Logits keep the length of the prompt, and without a cache nothing else is computed."""
    model, batch = family.model(), mixed(family)
    with mmfast.accelerate(model, [method]), torch.no_grad():
        logits = model(**batch.inputs, use_cache=use_cache).logits
    assert logits.shape[:2] == batch.inputs["input_ids"].shape
    for row in range(len(batch)):
        assert (logits[row, -1] - expected(batch.alone(row), [method]).logits[0]).abs().max() < CLOSE


# ------------------------------------------------------------------------ who looks at whom


@every_case
def test_further_pairs_become_visible(family: Family, case: Callable[[Family], Batch]) -> None:
    # PaliGemma reads prompts in both directions as it is.
    check_against_reference(case(family), [Window()], far=-1.0 if family.name == "paligemma" else 0.01)


@every_family
def test_further_pairs_after_a_cut(family: Family) -> None:
    check_against_reference(two(family), [*mmfast.Plan.parse("uniform(keep=0.6)").methods, Window()])


@every_family
def test_without_images_nothing_changes(family: Family) -> None:
    model, batch = family.model(), family.batch([6], [9])
    wanted = first_logits(model, batch.inputs)
    for method in (Window(), Detour(), Detour(bypass="freeze"), Trial(merge=True)):
        with mmfast.accelerate(model, [method]):
            assert (first_logits(model, batch.inputs) == wanted).all()
