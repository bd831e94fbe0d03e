# make demo      pretrain a small MoE model with plain EP and with LLEP, and compare
# make finetune  the same for SFT and GRPO
# make bench     time one MoE layer with plain EP and with LLEP
# make test      the tests (CPU, gloo)
# All targets set up .venv themselves when it is missing or out of date.

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
EXTRAS := train,wandb,plot,record,hf,dev

TE_VENV := .venv-te
TE_READY := $(TE_VENV)/.ready

# Another Megatron: make test-megatron VERSION=0.18.2
VERSION := 0.18.2
MEGATRON_VENV = .venv-megatron-$(VERSION)
MEGATRON_READY = $(MEGATRON_VENV)/.ready
# What depends on Megatron: the layer, lending, training in every layout, the scripts.
MEGATRON_TESTS := $(addprefix tests/,device experts integration layer lending matrix models \
	offline/seams rl scripts sft support training)
# A part of it that takes a minute: a layer in float64, training under every routing, changed names.
OLDEST_TESTS := $(addprefix tests/,layer/test_layer_float64.py layer/test_dispatcher.py \
	offline/seams integration/test_spec.py sft/test_packs.py training/test_parity.py::test_every_routing)

DIST_VENV := .venv-dist
FRAMEWORKS_VENV := .venv-frameworks
FRAMEWORKS_READY := $(FRAMEWORKS_VENV)/.ready

# Rate of the link, and what is trained over it: make nodes RATE=10gbit FLAGS="--moe-router-topk 4"
RATE ?= 100mbit
NODES_CONFIG ?= configs/two-nodes.yaml
FLAGS ?=

# Layout of the demo: make demo TP=2 PP=2 EP=2
TP ?= 1
PP ?= 1
EP ?= 2

# Random draws: make chaos DRAWS=1 SEED=0 FIRST=17
DRAWS ?= 200
SEED ?= 0
FIRST ?= 0

# Files of tests that run at once: make test JOBS=4. A test has up to 8 ranks of 0.6 GB.
JOBS ?= 2
SIDE_BY_SIDE = --numprocesses $(JOBS) --dist loadfile

# One thread a rank: ranks share the cores of one machine.
export OMP_NUM_THREADS := 1

.PHONY: help setup bench demo finetune nodes gpu-check test test-long chaos test-te test-frameworks \
	test-megatron test-oldest lint format dist clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

setup: $(READY) ## make .venv and install everything the other targets need

$(READY): pyproject.toml constraints.txt tools/find_python.sh tools/install_hf.sh
	@python=$$(bash tools/find_python.sh) && echo "setup: $$python" && "$$python" -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[$(EXTRAS)]'
	bash tools/install_hf.sh $(VENV)
	@touch $@

demo: $(READY) ## train with plain EP and with LLEP, and compare: runs/demo/report.html
	$(BIN)/python tools/demo.py --tp $(TP) --pp $(PP) --ep $(EP)

finetune: $(READY) ## SFT, then GRPO, with plain EP and with LLEP: runs/finetune/sft.html, rl.html
	$(BIN)/python tools/finetune_demo.py

bench: $(READY) ## one MoE layer, plain EP against LLEP: benchmarks/results/layer.json, .png
	$(BIN)/python benchmarks/bench_layer.py

nodes: $(READY) ## two nodes with a slow link between them, on this machine, as root: RATE=100mbit
	$(BIN)/python tools/two_nodes.py $(NODES_CONFIG) --rate $(RATE) -- $(FLAGS)

gpu-check: $(READY) ## on a machine with GPUs: right, and how fast: benchmarks/results/gpu_check.json
	$(BIN)/python tools/gpu_check.py

test: $(READY) ## the tests, some 20 minutes on 2 cores
	$(BIN)/python -m pytest -m "not slow and not gpu" $(SIDE_BY_SIDE)

test-long: $(READY) ## the slow tests
	$(BIN)/python -m pytest -m "slow and not gpu" $(SIDE_BY_SIDE)

chaos: $(READY) ## random draws, LLEP against Megatron: benchmarks/results/chaos.json
	$(BIN)/python tools/run_chaos.py --draws $(DRAWS) --seed $(SEED) --first $(FIRST)

$(TE_READY): pyproject.toml constraints.txt constraints-te.txt tools/find_python.sh tools/install_te.sh
	@python=$$(bash tools/find_python.sh) && echo "setup: $$python" && "$$python" -m venv $(TE_VENV)
	$(TE_VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[train,record,dev]'
	bash tools/install_te.sh $(TE_VENV)
	@touch $@

test-te: $(TE_READY) ## Transformer Engine's experts on the CPU; builds it once, 20 minutes
	$(TE_VENV)/bin/python -m pytest -m "te and not slow and not gpu" tests/te

$(FRAMEWORKS_READY): pyproject.toml constraints.txt constraints-frameworks.txt \
		tools/find_python.sh tools/install_frameworks.sh
	@python=$$(bash tools/find_python.sh) && echo "setup: $$python" && "$$python" -m venv $(FRAMEWORKS_VENV)
	bash tools/install_frameworks.sh $(FRAMEWORKS_VENV)
	@touch $@

test-frameworks: $(FRAMEWORKS_READY) ## LLEP in Megatron-Bridge, verl and ms-swift, the real packages
	$(FRAMEWORKS_VENV)/bin/python -m pytest -m "not slow and not gpu" tests/frameworks

$(MEGATRON_READY): pyproject.toml constraints.txt tools/find_python.sh tools/install_megatron.sh
	@python=$$(bash tools/find_python.sh) && echo "setup: $$python" && "$$python" -m venv $(MEGATRON_VENV)
	bash tools/install_megatron.sh $(MEGATRON_VENV) $(VERSION)
	@touch $@

test-megatron: $(MEGATRON_READY) ## the tests that need Megatron on another one: VERSION=0.18.2
	$(MEGATRON_VENV)/bin/python -m pytest -m "not slow and not gpu" $(MEGATRON_TESTS)

test-oldest: $(MEGATRON_READY) ## a minute of these, for .ci/run
	$(MEGATRON_VENV)/bin/python -m pytest -m "not slow and not gpu" $(OLDEST_TESTS)

lint: $(READY) ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY) ## mend style
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

dist: ## sdist and wheel, checked, in dist/: docs/releasing.md
	@python=$$(bash tools/find_python.sh) && "$$python" -m venv $(DIST_VENV)
	$(DIST_VENV)/bin/python -m pip install --quiet build twine
	rm -rf build dist
	$(DIST_VENV)/bin/python -m build
	$(DIST_VENV)/bin/python -m twine check --strict dist/*

clean: ## remove .venv, .venv-* and what runs left behind
	rm -rf $(VENV) .venv-* runs build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
