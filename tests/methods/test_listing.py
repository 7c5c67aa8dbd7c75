"""What the registry says of each method is true, and every option of it is documented."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import numpy as np
import pytest

import mmfast
from mmfast.kv.base import Adjuster, Evictor, Forgetter, Packer, Retriever
from mmfast.speculative.base import Drafter
from mmfast.token_pruning.base import SIGNALS, BeforeLLM, Method
from mmfast.token_pruning.compression_base import Compressor
from mmfast.token_pruning.encoder_base import GROUPS
from mmfast.token_pruning.frame_base import FrameSelector
from mmfast.token_pruning.layers import LayerBypass, LayerDropper, LayerMask
from support.cases import case_id

METHODS = mmfast.methods()
GOLDEN = Path(__file__).parents[1] / "golden"
KINDS = {
    "frames": FrameSelector,
    "before_llm": BeforeLLM,
    "in_llm": (LayerDropper, LayerBypass, LayerMask),
    "compression": Compressor,
    "eviction": (Evictor, Adjuster, Forgetter),
    "retrieval": Retriever,
    "packing": Packer,
    "drafters": Drafter,
}
"""Folder -> what the methods in it are."""
FUNCTIONS = {"evaluation", "hydragen", "kv_ragged_attention", "speculative"}
"""Vectors of functions that are no methods."""
FOLDERS = {
    "aks": "aks_frames",
    "bolt": "bolt_frames",
    "dycoke": "dycoke_ttm",
    "holitom": "holitom_outer",
    "prunevid_llm": "prunevid",
    "voco": "voco_mask",
}
"""Methods whose vectors lie in a folder of another name."""

every = pytest.mark.parametrize("info", METHODS, ids=case_id)


def provenance(name: str) -> set[str]:
    """Say where the vectors of a method come from; those of methods inside the LLM, which do not say, are official."""
    found = set()
    for path in (GOLDEN / FOLDERS.get(name, name)).glob("*.npz"):
        with np.load(path, allow_pickle=False) as arrays:
            told = str(arrays["provenance"]) if "provenance" in arrays.files else "official"
            # Some arrays of a file may be worked out from the text, others come from the code.
            found.add("official" if "official" in told else "spec")
    return found


@every
def test_vectors_are_claimed_where_official_ones_are_checked(info: mmfast.MethodInfo) -> None:
    found = provenance(info.name)
    assert info.vectors == ("official" in found)
    if info.vectors:
        assert info.source or info.paper


def test_every_folder_of_vectors_belongs_to_a_method() -> None:
    assert {path.name for path in GOLDEN.iterdir()} <= {FOLDERS.get(info.name, info.name) for info in METHODS} | {
        info.name for info in METHODS
    } | FUNCTIONS


@every
def test_the_name_is_that_of_the_file(info: mmfast.MethodInfo) -> None:
    assert Path(inspect.getfile(info.method)).stem == info.name
    folder = Path(inspect.getfile(info.method)).parent.name
    stage = {"drafters": "decode", "compression": "in_llm"}.get(folder, folder)
    assert info.stage == stage or info.stage == "cache"
    assert issubclass(info.method, KINDS[folder])


@every
def test_signals_are_known_and_all_named(info: mmfast.MethodInfo) -> None:
    assert set(info.needs) <= SIGNALS
    kinds = {request.kind for request in info.method().vision_signals().values()}
    # Which tokens share one of the encoder is no signal a model could lack.
    assert kinds - {"groups"} <= set(info.needs)
    assert GROUPS not in info.needs
    vision = {"cls_attention", "cls_logits", "received_attention", "keys", "queries", "patch_features", "cls_features"}
    assert set(info.needs) & vision <= kinds


@every
def test_papers_and_sources_are_named(info: mmfast.MethodInfo) -> None:
    text = "".join(base.__dict__.get("__doc__") or "" for base in info.method.__mro__)
    assert info.summary.endswith(".")
    if not info.paper:
        # A baseline, or an idea of ours.
        assert info.source == ""
        assert "Paper: " not in text
        return
    assert re.fullmatch(r"arXiv \d{4}\.\d{5}|[A-Z].+ \d{4}\)?", info.paper)
    assert "Paper: " in text
    assert re.fullmatch(r"|[\w.-]+/[\w.-]+", info.source)


@every
def test_every_option_is_documented(info: mmfast.MethodInfo) -> None:
    """In the class or in the base that brings it."""
    documented = set()
    for base in info.method.__mro__:
        attributes = (base.__dict__.get("__doc__") or "").partition("Attributes:")[2]
        for names in re.findall(r"^        (\w+(?:, \w+)*):", attributes, re.MULTILINE):
            documented.update(names.split(", "))
    assert set(info.options) <= documented


@every
def test_plans_name_methods_and_their_options(info: mmfast.MethodInfo) -> None:
    method = info.method()
    assert isinstance(method, Method)
    assert method.to_text() == f"{info.name}()"
    assert mmfast.Plan.parse(f"{info.name}()") == mmfast.Plan((method,))
    assert mmfast.Plan.from_dict(mmfast.Plan((method,)).to_dict()) == mmfast.Plan((method,))
    assert hash(method) == hash(info.method())


@every
@pytest.mark.parametrize("keep", [0, -3, 0.0, 1.5, float("nan"), True, "0.5"])
def test_a_senseless_keep_is_refused(info: mmfast.MethodInfo, keep: object) -> None:
    if "keep" not in info.options:
        with pytest.raises(TypeError):
            info.method(keep=keep)
        return
    with pytest.raises((TypeError, ValueError), match="keep="):
        info.method(keep=keep)


@every
def test_no_keep_means_that_the_data_decide(info: mmfast.MethodInfo) -> None:
    if "keep" not in info.options:
        return
    if info.options["keep"] is None or getattr(info.method, "adaptive", False):
        assert info.method(keep=None).keep is None
