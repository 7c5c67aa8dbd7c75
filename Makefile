# Every target sets up its own environment first. On a CUDA machine: make env CONSTRAINTS=
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints-cpu.txt
TESTS ?= tests
# Test processes side by side; 0 runs everything in one.
JOBS ?= 2

BIN := $(VENV)/bin
READY := $(VENV)/.ready
TYPING := build/typing
DEMO := build/demo
CLIP := mmfast/data/samples/bigbuckbunny.mp4
PLANS := --plan "divprune(keep=64)" --plan "divprune(keep=128) + pyramiddrop()"

.DEFAULT_GOAL := help
.PHONY: help env test demo bench gpu train-default lint tables clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

env: $(READY)  ## create .venv and install mmfast into it, editable, with the developer tools

# The stamp is written last, so an interrupted set-up starts again and a finished one is not repeated.
# The pip of a fresh virtual environment may be too old to read today's packages.
$(READY): pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) -e ".[dev]"
	@touch $@

test: $(READY)  ## run the tests; what is skipped is listed with its reason (TESTS=path for a part)
	$(BIN)/pytest -n $(JOBS) $(TESTS)

demo: $(READY)  ## compare the demo model with and without plans on two clips; writes build/demo/*.html
	@mkdir -p $(DEMO)
	$(BIN)/python examples/render_clip.py $(DEMO)/rendered.mp4 > $(DEMO)/question.txt
	$(BIN)/mmfast compare $(DEMO)/rendered.mp4 "$$(cat $(DEMO)/question.txt)" $(PLANS) --out $(DEMO)/rendered.html
	$(BIN)/mmfast compare $(CLIP) "can you see a red circle?" $(PLANS) --out $(DEMO)/bigbuckbunny.html

bench: $(READY)  ## measure speed on this machine
	$(BIN)/python benchmarks/speed.py

train-default: $(READY)  ## train the embedded model from nothing in four core-hours, resumable; writes build/tinyvlm
	$(BIN)/python -m mmfast.training.default_model.recipe --out build/tinyvlm

gpu: $(READY)  ## on a GPU, in under ten minutes: the kernels' tests, then mmfast bench; call again to go on
	$(BIN)/python benchmarks/gpu.py

# mypy reads folders, not the mapping in pyproject.toml: lay the three trees out as they are installed.
lint: $(READY)  ## ruff check, ruff format --check, mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@rm -rf $(TYPING) && mkdir -p $(TYPING)/mmfast
	@ln -s $(CURDIR)/mmfast/* $(CURDIR)/adapters $(CURDIR)/eval $(TYPING)/mmfast
	cd $(TYPING) && $(abspath $(BIN))/mypy --config-file $(CURDIR)/pyproject.toml -p mmfast

tables: $(READY)  ## renew the generated parts of the pages from the registry and the committed results
	$(BIN)/python docs/update_tables.py

clean:  ## remove everything that make made
	rm -rf $(VENV) build mmfast.egg-info .mypy_cache .pytest_cache .ruff_cache
