# Lory: every command a person or CI needs. `make` alone lists them.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PORT ?= 8080
# Where pip looks for torch, e.g. TORCH_INDEX=https://download.pytorch.org/whl/cpu on a laptop.
TORCH_INDEX ?=
PIP := $(BIN)/pip --disable-pip-version-check -q
CODE := router server kernels clients/python trainer tests benchmarks demo
# Tests run in parallel: one thread each, and what can wait does not spin.
TEST_ENV := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-check demo-train demo-model check format test test-full bench gpu-check clean

help: ## List the commands
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | column -t -s "$$(printf '\t')"

$(VENV)/.installed: pyproject.toml clients/python/pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch==2.13.0
	$(PIP) install -c constraints.txt -e '.[train,eval,dev]' -e clients/python
	$(BIN)/python -m lory_kernels
	touch $@

setup: $(VENV)/.installed ## Make the virtual environment; starts nothing

demo: setup ## Serve the shipped base and adapters on 127.0.0.1:8080, print three lines to paste
	$(BIN)/lory demo --port $(PORT)

# On any free port, unless one is asked for.
demo-check: setup ## Start the demo, ask every adapter, check the answers, stop
	$(BIN)/lory demo --check $(if $(filter-out file,$(origin PORT)),--port $(PORT))

demo-train: setup ## Train a new adapter, publish it to the demo server, score it, ask it (minutes)
	$(BIN)/python demo/train_demo.py --url http://127.0.0.1:$(PORT)

# Threads that spin for each other take tenfold where a core is busy.
demo-model: export OMP_WAIT_POLICY = PASSIVE
demo-model: setup ## Train the demo's base and adapters again from scratch (under 15 minutes)
	$(BIN)/python demo/make_data.py
	$(BIN)/python demo/make_base.py
	$(BIN)/python demo/make_adapters.py
	$(BIN)/python demo/make_prompts.py
	$(BIN)/python demo/evaluate.py --output demo/accuracy.json
	$(BIN)/python demo/mismatches.py

check: setup ## Format, lint and types; warnings are errors
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/ruff check $(CODE)
	$(BIN)/pyright --warnings
	$(BIN)/hadolint Dockerfile

format: setup ## Format and fix what can be fixed
	$(BIN)/ruff format $(CODE)
	$(BIN)/ruff check --fix $(CODE)

test: setup ## A representative case of everything, in minutes, without a GPU
	$(TEST_ENV) $(BIN)/pytest -n 2 --dist loadfile -m 'not full'

test-full: setup ## Whole matrices and long traces; what SGMV's matrix found is kept
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 --dist loadfile \
		--record-matrix benchmarks/results/sgmv-matrix-$$(date -u +%F).json

bench: setup ## Compare with transformers + PEFT on this machine, in one run
	$(BIN)/python -m benchmarks.compare

SECTION ?= parity
# With SECTION=kernels: a folder of others' unpacked wheels (kernels/lory_kernels/bench/peers.py).
KERNEL_PEERS ?=
# The JSON that findings go to; without it benchmarks/results/gpu.json.
RESULT ?=
# More arguments of benchmarks.gpu_check, such as --no-cuda-graphs.
GPU_ARGS ?=
# The profiler stays once it has begun: begun again where there are CUDA graphs it may crash.
GPU_ENV := TEARDOWN_CUPTI=0 DISABLE_CUPTI_LAZY_REINIT=1 \
	PYTHONPATH=.gpu-site:server:kernels:router:clients/python:trainer
gpu-check: ## GPU paths against references, and times (SECTION=parity|step|kernels|curve|peft|train)
	$(GPU_ENV) $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m benchmarks.gpu_check \
		$(SECTION) $(if $(KERNEL_PEERS),--peers $(KERNEL_PEERS)) $(if $(RESULT),--out $(RESULT)) $(GPU_ARGS)

clean: ## Remove the environment and caches
	rm -rf $(VENV) .venv-clients .pytest_cache .ruff_cache .hypothesis .bench
