"""``import mmfast`` is cheap, loads nothing and changes nothing; the public names work in any order."""

from __future__ import annotations

import subprocess
import sys

import pytest

import mmfast

SECONDS = 0.3


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_loads_nothing_but_itself_and_the_standard_library() -> None:
    code = """
import sys
before = set(sys.modules)
import mmfast
tops = {name.partition(".")[0] for name in set(sys.modules) - before}
print(sorted(tops - set(sys.stdlib_module_names)))
"""
    assert run(code) == "['mmfast']"


def test_is_fast() -> None:
    code = "import time; start = time.perf_counter(); import mmfast; print(time.perf_counter() - start)"
    # The fastest of three: a busy machine slows a run, nothing speeds one up.
    assert min(float(run(code)) for _ in range(3)) < SECONDS


def test_changes_nothing_in_torch_and_transformers() -> None:
    # Every module of the library is imported, not only the package: none may act on import.
    code = """
import importlib, logging, os, pkgutil, sys, warnings
import torch, transformers
from transformers import cache_utils, masking_utils, modeling_utils
from transformers.models.llama import modeling_llama
from transformers.models.llava import modeling_llava

def members(thing):
    return {name: id(value) for name, value in vars(thing).items() if not name.startswith("__")}

def state():
    return {
        "attention": {k: id(v) for k, v in modeling_utils.ALL_ATTENTION_FUNCTIONS.items()},
        "masks": {k: id(v) for k, v in masking_utils.ALL_MASK_ATTENTION_FUNCTIONS.items()},
        "modules": [members(m) for m in (cache_utils, masking_utils, modeling_llama, modeling_llava)],
        "classes": [
            members(c)
            for c in (
                torch.nn.Module,
                transformers.GenerationMixin,
                transformers.PreTrainedModel,
                cache_utils.DynamicCache,
                cache_utils.DynamicLayer,
                modeling_llama.LlamaAttention,
                modeling_llama.LlamaModel,
                modeling_llava.LlavaModel,
            )
        ],
        "environment": dict(os.environ),
        "logging": (logging.root.level, list(logging.root.handlers)),
        "warnings": list(warnings.filters),
        "torch": (torch.get_default_dtype(), torch.initial_seed(), torch.get_num_threads()),
        "random": torch.get_rng_state().tolist(),
        "hooks": len(torch.nn.modules.module._global_forward_hooks),
    }

before = state()
import mmfast, mmfast.adapters, mmfast.eval
count = 0
for package in (mmfast, mmfast.adapters, mmfast.eval):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if not module.name.endswith(".__main__"):
            try:
                importlib.import_module(module.name)
            except ImportError as error:
                # A plug-in of a package that is not here says how to get it.
                if "pip install" not in str(error):
                    raise
            count += 1
after = state()
print([key for key in before if before[key] != after[key]], count > 10)
"""
    assert run(code).splitlines()[-1] == "[] True"


@pytest.mark.parametrize("order", ["sorted(mmfast.__all__)", "sorted(mmfast.__all__, reverse=True)"])
def test_public_names_resolve_in_any_order(order: str) -> None:
    code = f"""
import mmfast
for name in {order}:
    getattr(mmfast, name)
print(callable(mmfast.accelerate), set(dir(mmfast)) == set(mmfast.__all__))
"""
    assert run(code) == "True True"


def test_public_names_survive_the_import_of_every_module() -> None:
    # Importing mmfast.x puts the module x into the package, in place of a public function called x.
    code = """
import importlib, inspect, pkgutil
import mmfast
for module in pkgutil.iter_modules(mmfast.__path__, "mmfast."):
    importlib.import_module(module.name)
print([name for name in mmfast.__all__ if inspect.ismodule(getattr(mmfast, name))])
"""
    assert run(code) == "[]"


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = mmfast.no_such_name
