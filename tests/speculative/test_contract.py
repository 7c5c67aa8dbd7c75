"""Every drafter on every family: the tokens of plain decoding, alone, in batches, and beside other methods."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import mmfast
from mmfast.speculative.heads.base import HeadConfig
from mmfast.speculative.heads.feature import CompressedHead, FeatureHead
from mmfast.speculative.heads.static import HydraHeads, LatentHead, MedusaHeads
from support.against_plain import check
from support.cases import case_id, one, text_only
from support.checks import census
from support.companions import language_model, other
from support.families import FAMILIES, Batch, Family
from support.heads import write

DRAFTERS = mmfast.methods("decode")
CHOSEN = [FAMILIES[name] for name in ("llava", "qwen2_5_vl", "gemma3", "internvl")]

HEADS: dict[str, Callable[[HeadConfig, int], nn.Module]] = {
    "msd": lambda config, vocabulary: FeatureHead(config),
    "vispec": lambda config, vocabulary: CompressedHead(config),
    "medusa": lambda config, vocabulary: MedusaHeads(config.width, 4),
    "hydra": lambda config, vocabulary: HydraHeads(config, 4, 1),
    "flash": lambda config, vocabulary: LatentHead(config, queries=3, steps=4),
}
"""Trained drafters, with heads of random weights."""


def four(family: Family) -> Batch:
    """Rows with two images, with one, with text alone, and with one again."""
    return family.batch(
        [2, family.image(0, 1), 2, family.image(family.sizes - 1, 2), 3],
        [5, family.image(0, 3), 4],
        [7],
        [3, family.image(0, 4), 9],
    )


@cache
def options_of(name: str, family: Family, folder: Path) -> tuple[str, Any]:
    """Return the options of a drafter in a plan, and its second model."""
    options, second = ["adaptive_length=False"], None
    if name in HEADS:
        model = family.model()
        text = model.config.text_config
        sizes = {
            "hidden_size": text.hidden_size,
            "vocab_size": int(model.get_output_embeddings().weight.shape[0]),
            "intermediate_size": 48,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "rms_norm_eps": 1e-5,
        }
        torch.manual_seed(1)
        head = HEADS[name](HeadConfig.read(sizes, text.hidden_size), sizes["vocab_size"])
        path = write(folder / f"{family.name}-{name}", head, sizes)
        options.append(f"path={str(path)!r}")
        if name in ("msd", "vispec"):
            options.append("total_tokens=12, depth=3, top_k=4")
    elif name == "assistant":
        second = other(family)
    elif name == "text_draft":
        second = language_model()
    elif name == "swift":
        options.append("context_window=4, num_draft=4")
    return ", ".join(options), second


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the heads are written."""
    return tmp_path_factory.mktemp("heads")


# Four rows hold what one row does; alone, it is tested where families differ (--slow: everywhere).
ASKED = [(family, four) for family in FAMILIES.values()] + [
    pytest.param(family, one, marks=[] if family in CHOSEN else pytest.mark.slow) for family in FAMILIES.values()
]


@pytest.mark.parametrize("info", DRAFTERS, ids=case_id)
@pytest.mark.parametrize(("family", "case"), ASKED, ids=case_id)
def test_same_tokens(family: Family, info: mmfast.MethodInfo, case: Any, folder: Path) -> None:
    options, second = options_of(info.name, family, folder)
    check(case(family), f"{info.name}({options})", draft_model=second)


@pytest.mark.parametrize("info", DRAFTERS, ids=case_id)
@pytest.mark.parametrize("family", CHOSEN, ids=case_id)
@pytest.mark.parametrize("beside", ["", "divprune(keep=0.4)", "snapkv(keep=0.5, window=4)"])
def test_same_tokens_beside_other_methods(family: Family, info: mmfast.MethodInfo, beside: str, folder: Path) -> None:
    """Without images, and under a plan that prunes the prompt or its cache."""
    options, second = options_of(info.name, family, folder)
    batch = four(family) if beside else text_only(family)
    check(batch, f"{info.name}({options})", beside=beside, draft_model=second)


@pytest.mark.parametrize("info", DRAFTERS, ids=case_id)
def test_same_seed_same_answer(info: mmfast.MethodInfo, folder: Path) -> None:
    """Where tokens are chosen and not drawn, a sampled answer is that of plain sampling."""
    if info.method.stochastic:  # type: ignore[attr-defined]
        pytest.skip("draws its tokens: the law is that of the model, single answers are others")
    family = FAMILIES["llava"]
    options, second = options_of(info.name, family, folder)
    model, batch = family.model(), four(family)
    sampling = {"do_sample": True, "temperature": 1.5, "max_new_tokens": 16}
    torch.manual_seed(4)
    expected = model.generate(**batch.inputs, **sampling)
    with mmfast.accelerate(model, f"{info.name}({options})", draft_model=second):
        torch.manual_seed(4)
        assert torch.equal(model.generate(**batch.inputs, **sampling), expected)


@pytest.mark.parametrize("info", DRAFTERS, ids=case_id)
def test_leaves_nothing_behind(info: mmfast.MethodInfo, folder: Path) -> None:
    family = FAMILIES["llava"]
    options, second = options_of(info.name, family, folder)
    model = family.model()
    before = census(model), None if second is None else census(second)
    check(one(family), f"{info.name}({options})", draft_model=second)
    assert (census(model), None if second is None else census(second)) == before


@pytest.mark.parametrize("info", DRAFTERS, ids=case_id)
def test_defaults_with_a_length_that_pays(info: mmfast.MethodInfo, folder: Path) -> None:
    """The same tokens too while the length of drafts changes from round to round, in several calls."""
    family = FAMILIES["llava"]
    options, second = options_of(info.name, family, folder)
    plan = f"{info.name}({options.removeprefix('adaptive_length=False').removeprefix(', ')})"
    model, batch = family.model(), one(family)
    expected = model.generate(**batch.inputs, max_new_tokens=40, do_sample=False)
    with mmfast.accelerate(model, plan, draft_model=second):
        for _ in range(3):
            assert torch.equal(model.generate(**batch.inputs, max_new_tokens=40, do_sample=False), expected)
