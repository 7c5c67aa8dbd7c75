"""Which files drafters with trained weights take, and the heads that ship."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import mmfast
from mmfast.registry import build
from mmfast.speculative.base import Drafter
from mmfast.training.conversations import WorldSource
from mmfast.training.draft_heads import objective as draft_heads
from mmfast.training.draft_heads.answers import Answer, recall
from mmfast.training.draft_heads.answers import write as answered
from mmfast.training.draft_heads.evaluation import held_out
from mmfast.training.draft_heads.options import HeadOptions
from support.drafting import Toy, tokens_per_forward
from support.heads import (
    HEADS,
    SIZES,
    VOCABULARY,
    WIDTH,
    everything,
    random_head,
    write,
)

# ------------------------------------------------------------------------------------------------------- files


def load(name: str, path: Path, **changes: Any) -> None:
    toy = Toy()
    build(name, {"path": str(path)}).start(toy.request([toy.prompt([4])], **changes))


@pytest.mark.parametrize("name", HEADS)
def test_a_file_alone_will_do(name: str, tmp_path: Path) -> None:
    config = {**SIZES, "num_hidden_layers": 2} if "2layers" in name else SIZES
    folder = write(tmp_path, random_head(name), config)
    load(name.partition("-")[0], folder / "model.safetensors")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@everything
def test_half_precision(drafter: Drafter, dtype: torch.dtype) -> None:
    toy = Toy()
    prompt = toy.prompt([3, (0, 6), 4])
    request = toy.request([prompt])
    prompt = replace(prompt, embeds=prompt.embeds.to(dtype), hidden=prompt.hidden.to(dtype))
    layers = {"embed": toy.embed.to(dtype), "head": toy.head.to(dtype)}
    session = drafter.start(replace(request, prefill=(prompt,), dtype=dtype, stop=frozenset(), **layers))
    assert len(session.propose({0: 3}, {0: 9})[0].tokens) == 9


def test_official_names_are_read(tmp_path: Path) -> None:
    """Copies of the model's own layers are left aside; Medusa's files may carry the name of their module."""
    head = random_head("msd")
    assert {"fc.weight", "fc.bias", "layers.0.self_attn.q_proj.weight", "layers.0.mlp.gate_proj.weight"} < {
        *head.state_dict()
    }
    assert "layers.0.input_layernorm.weight" not in head.state_dict()
    tensors = {**head.state_dict(), "embed_tokens.weight": torch.zeros(VOCABULARY, WIDTH)}
    write(tmp_path, head, SIZES)
    save_file(tensors, tmp_path / "model.safetensors")
    load("msd", tmp_path)
    medusa = random_head("medusa").state_dict()
    assert {"0.0.linear.weight", "0.0.linear.bias", "0.2.weight"} < {*medusa}
    save_file({f"medusa_head.{key}": value for key, value in medusa.items()}, tmp_path / "model.safetensors")
    load("medusa", tmp_path)
    hydra = {*random_head("hydra").state_dict()}
    assert {
        "hydra_mlp.1.1.res_connection.weight",
        "hydra_mlp.1.3.linear.weight",
        "hydra_lm_head.0.1.bias",
        "prefix_embeding_layer.layers.0.input_layernorm.weight",
        "prefix_embeding_layer.norm.weight",
    } < hydra


def broken(folder: Path, what: str) -> None:
    """Write a head of msd with something wrong in it."""
    head = random_head("msd")
    tensors, config = dict(head.state_dict()), dict(SIZES)
    match what:
        case "missing":
            del tensors["layers.0.mlp.up_proj.weight"]
        case "unexpected":
            tensors["layers.0.input_layernorm.weight"] = torch.ones(WIDTH)
        case "shape":
            config["intermediate_size"] = 32
        case "width":
            config["hidden_size"] = 64
        case "heads":
            del config["num_attention_heads"]
        case "rope":
            config["rope_scaling"] = {"rope_type": "yarn"}
        case "groups":
            config["num_key_value_heads"] = 3
        case "section":
            config["rope_scaling"] = {"type": "mrope", "mrope_section": [1, 1, 1]}
        case "size":
            config["intermediate_size"] = "24"
        case "act":
            config["hidden_act"] = "gelu"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    match what:
        case "no config":
            (folder / "config.json").unlink()
        case "bad config":
            (folder / "config.json").write_text("[1]")
        case "no json":
            (folder / "config.json").write_text("{")
        case "two files":
            save_file(tensors, folder / "other.safetensors")
        case "damaged":
            (folder / "model.safetensors").write_bytes(b"\x10" * 40)
        case "pickled":
            (folder / "model.safetensors").unlink()
            (folder / "pytorch_model.bin").write_bytes(b"x")
        case "empty":
            (folder / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("what", "says"),
    {
        "missing": r"lacks layers\.0\.mlp\.up_proj\.weight",
        "unexpected": r"does not know: layers\.0\.input_layernorm\.weight",
        "shape": r"gate_proj\.weight .* has shape \(24, 16\).* ask for \(32, 16\)",
        "width": "is for hidden states of width 64; this model's have 16",
        "heads": "num_attention_heads=None in config.json",
        "rope": "rope_type='yarn'",
        "groups": "must be a multiple of 3 key/value heads",
        "section": r"mrope_section=\(1, 1, 1\)",
        "size": "intermediate_size='24'",
        "act": "hidden_act='gelu'",
        "no config": r"holds no config\.json",
        "bad config": "must hold a JSON object",
        "no json": "is no JSON",
        "two files": "holds 2 .safetensors files",
        "damaged": "cannot be read as safetensors",
        "pickled": r"pytorch_model\.bin may run code",
        "empty": "holds no .safetensors file",
    }.items(),
)
def test_files_that_will_not_do(what: str, says: str, tmp_path: Path) -> None:
    broken(tmp_path / "head", what)
    with pytest.raises(ValueError, match=says):
        load("msd", tmp_path / "head")


def test_paths_that_will_not_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is neither"):
        load("msd", tmp_path / "nowhere")
    (tmp_path / "head.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"must be a \.safetensors file or a folder"):
        load("medusa", tmp_path / "head.bin")
    with pytest.raises(ValueError, match=r"it holds no tensors such as 0\.0\.linear\.weight"):
        load("medusa", write(tmp_path / "other", random_head("msd"), SIZES))
    with pytest.raises(ValueError, match="it holds no tensors such as hydra_mlp"):
        load("hydra", write(tmp_path / "other", random_head("msd"), SIZES))


def test_another_vocabulary_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, random_head("medusa"), SIZES)
    with pytest.raises(ValueError, match=r"0\.2\.weight .* has shape \(24, 16\)"):
        load("medusa", folder, vocabulary=25)


@pytest.mark.parametrize("name", ["msd", "vispec", "medusa", "hydra", "flash"])
@pytest.mark.parametrize(
    ("field", "value"), [("path", 3), ("total_tokens", 0), ("total_tokens", 2.0), ("depth", -1), ("top_k", True)]
)
def test_options_are_checked(name: str, field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{field}={value!r}"):
        build(name, {field: value})


@pytest.mark.parametrize("name", ["msd", "vispec", "medusa", "hydra", "flash"])
def test_what_is_registered(name: str) -> None:
    info = mmfast.registry.get(name)
    assert (info.stage, info.kind, info.training_free) == ("decode", "Drafter", False)
    drafter = info.method()
    assert drafter.needs_hidden
    assert drafter.trees
    assert drafter.most == drafter.total_tokens


def test_a_head_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy, memory = Toy(), dict[str, Any]()
    drafter: Any = build("msd", {"path": str(write(tmp_path, random_head("msd"), SIZES))})
    request = toy.request([toy.prompt([4])], memory=memory)
    head = drafter.head(request)
    (tmp_path / "model.safetensors").unlink()
    assert drafter.head(request) is head


def test_what_a_request_must_hold(tmp_path: Path) -> None:
    toy = Toy()
    drafter = build("msd", {"path": str(write(tmp_path, random_head("msd"), SIZES))})
    with pytest.raises(ValueError, match="prefill of the request is empty"):
        drafter.start(toy.request([toy.prompt([4])], prefill=()))
    with pytest.raises(ValueError, match="embed and head of the request are None"):
        drafter.start(toy.request([toy.prompt([4])], head=None))


# --------------------------------------------------------------------------------------- the heads that ship

SHIPPED = ("flash", "hydra", "medusa", "msd", "vispec")


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_heads_are_for_the_embedded_model(name: str) -> None:
    toy = Toy()
    with pytest.raises(ValueError, match=r"ships with mmfast is for the embedded model .* width 16 and 24 tokens"):
        build(name, {}).start(toy.request([toy.prompt([4])]))


@cache
def recorded() -> tuple[Any, list[Answer]]:
    """Greedy answers of the embedded model to questions no head was trained on, written on past their end."""
    model, processor = mmfast.load_default()
    options = HeadOptions(sampled=0.0, new_tokens=33, held_out=8)
    asked = held_out(WorldSource(seed=7), options)
    rows = answered(model, processor, asked, range(8), options)
    return model, [recall(model, processor, *pair, options) for pair in zip(asked, rows, strict=True)]


def tau(drafter: Drafter) -> float:
    """Tokens per forward of the model, mean over answers."""
    model, answers = recorded()
    end = model.generation_config.eos_token_id
    found = []
    for answer in answers:
        start, ids, hidden = answer.start, answer.text.ids[answer.start :].tolist(), answer.wanted
        whole = answer.text
        prompt = replace(
            whole,
            ids=whole.ids[:start],
            visual=whole.visual[:start],
            media=whole.media[:start],
            embeds=whole.embeds[:start],
            hidden=whole.hidden[:start],
            positions=whole.positions[:start],
        )
        layers = {"embed": model.get_input_embeddings(), "head": model.get_output_embeddings()}
        request = Toy().request(
            [Toy().prompt([1])],
            prefill=(prompt,),
            vocabulary=640,
            excluded=frozenset({6}),
            stop=frozenset({end}),
            **layers,
        )
        found.append(tokens_per_forward(request, drafter, ids, hidden))
    return sum(found) / len(found)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_heads_draft(name: str, tmp_path: Path) -> None:
    trained = tau(build(name, {}))
    model, _ = recorded()
    head = draft_heads.new_head(model, HeadOptions(method=name))
    for parameter in head.parameters():
        parameter.data = torch.randn_like(parameter) * 0.5
    chance = tau(build(name, {"path": str(write(tmp_path, head, draft_heads.sizes(model)))}))
    assert trained > 1.3
    assert trained > chance + 0.25
