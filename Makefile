# The verbs of r1sae-fast: `make` lists them. Each makes what it needs first (.venv, the release
# extension); a second run finds that done. Settings: make VERB NAME=VALUE
#   PYTHON  the python that .venv is made with    (default: the first one of at least 3.10)
#   VENV    where the environment lives           (default: .venv)
#   JOBS    test processes                        (default: 2)
#   FUZZ_SECONDS  of each fuzz target             (default: 180)
#   ARGS    further arguments for the verb's tool (make test ARGS="-k shards", make demo ARGS="--help")

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.SUFFIXES:
MAKEFLAGS += --no-builtin-rules --no-print-directory

VENV ?= .venv
JOBS ?= 2
ARGS ?=
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.r1sae-installed
TOOLS := $(VENV)/.r1sae-tools
ARM := aarch64-unknown-linux-gnu
RUST := Cargo.toml Cargo.lock $(wildcard rust/*/Cargo.toml) $(shell find rust -name '*.rs')

export VENV PYTHON
# One interpreter for every cargo call, so that pyo3 is not built anew for each.
export PYO3_PYTHON := $(abspath $(BIN)/python)
export PATH := $(PATH):$(HOME)/.cargo/bin

.PHONY: help
help: ## List the verbs
	@awk 'BEGIN { FS = ":.*## " } /^[a-z0-9-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' Makefile

.PHONY: install
install: $(INSTALLED) ## Create .venv, build the release extension, install the package with its dev extra

$(TOOLS): .ci/setup
	@.ci/setup tools
	@touch $@

$(INSTALLED): $(TOOLS) pyproject.toml $(RUST)
	@.ci/setup install
	@touch $@

.PHONY: demo
demo: $(INSTALLED) ## Run the whole chain on TinyR1: trace, shards, SAE, features, database, picture
	@$(BIN)/r1sae demo $(ARGS)

.PHONY: test
test: test-rust test-python ## Run the whole test suite, Rust then Python

.PHONY: test-rust
test-rust: $(INSTALLED) ## Run the tests of the Rust core
	@PROPTEST_RNG_SEED=$${PROPTEST_RNG_SEED:-1} cargo test --quiet --locked -p r1sae-core

.PHONY: test-python
test-python: $(INSTALLED) ## Run the Python tests (ARGS="-k shards" picks some)
	@HYPOTHESIS_PROFILE=$${HYPOTHESIS_PROFILE:-ci} $(BIN)/python -m pytest -n $(JOBS) --dist loadgroup \
	  -q $(ARGS)

.PHONY: test-thorough
test-thorough: $(INSTALLED) ## Run the property tests with many more examples, drawn anew (an hour)
	@PROPTEST_CASES=20000 cargo test --quiet --locked --release -p r1sae-core
	@HYPOTHESIS_PROFILE=thorough $(BIN)/python -m pytest -n $(JOBS) --dist loadgroup -q $(ARGS)

FUZZ_SECONDS ?= 180

.PHONY: fuzz
fuzz: ## Fuzz the readers of shards, FUZZ_SECONDS=180 each (needs cargo-fuzz and a nightly compiler)
	@cargo +nightly fuzz --version >/dev/null 2>&1 || { echo "missing: cargo-fuzz or a nightly \
	compiler; get them with: rustup toolchain install nightly && cargo install cargo-fuzz" >&2; exit 1; }
	@for target in activation_shard code_shard; do mkdir -p rust/fuzz/corpus/$$target; \
	  cargo +nightly fuzz run --fuzz-dir rust/fuzz $$target rust/fuzz/corpus/$$target \
	  tests/shards/hostile -- -max_total_time=$(FUZZ_SECONDS) -rss_limit_mb=2048 $(ARGS) || exit 1; done

.PHONY: lint
lint: lint-python lint-rust lint-repo ## Check style, types, stubs and house rules; change nothing

.PHONY: lint-python
lint-python: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	MYPYPATH=python:benches $(BIN)/mypy --explicit-package-bases benches/harness benches/peers benches/bars
	MYPYPATH=python $(BIN)/stubtest r1sae_fast._core \
	  --mypy-config-file pyproject.toml --allowlist .ci/stubtest-allow.txt

.PHONY: lint-rust
lint-rust: $(INSTALLED)
	@cargo fmt --version >/dev/null 2>&1 && cargo clippy --version >/dev/null 2>&1 || \
	  { echo "missing: rustfmt or clippy; get them with: rustup component add rustfmt clippy" >&2; exit 1; }
	cargo fmt --all --check
	cargo clippy --quiet --workspace --all-targets --locked -- -D warnings
	RUSTDOCFLAGS="-D warnings -A rustdoc::private-intra-doc-links" \
	  cargo doc --quiet --no-deps --locked -p r1sae-core
	@if rustup target list --installed 2>/dev/null | grep -qx $(ARM); then \
	  set -x; cargo check --quiet --locked --target $(ARM) -p r1sae-core; \
	else \
	  echo "not checked: the core on ARM (to have it checked: rustup target add $(ARM))"; \
	fi

.PHONY: lint-repo
lint-repo: $(INSTALLED)
	$(BIN)/python .ci/check_repo.py

.PHONY: format
format: $(INSTALLED) ## Format Python and Rust, mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	cargo fmt --all

.PHONY: bench
bench: $(INSTALLED) ## Time each operation beside its torch reference and the installed peers (ARGS="-k select")
	@$(BIN)/python -m pytest benches -p no:xdist --benchmark-only --benchmark-quiet -q \
	  --versus-json=benches/results/last.json $(ARGS)

BARS ?= P1 P2 small-f32 small-bf16 P3-256 P3-2048 P3-memory P3-memory-2048 P4 P5 P6 P9-heaps P9-shards P9-encode

.PHONY: bench-r1
bench-r1: $(INSTALLED) ## Measure the bars at R1's shape beside the peers (24 GB of memory; BARS="P1 P4" picks some)
	@mkdir -p benches/results/bars
	@export PYTHONPATH=benches; for bar in $(BARS); do $(BIN)/python -m bars $$bar \
	  --folder benches/results/bars --json benches/results/bars.jsonl $(ARGS) || exit 1; done

.PHONY: bench-check
bench-check: $(INSTALLED) ## Fail where a path lost a fifth of its lead over the torch reference, beyond chance (small shapes)
	@PYTHONPATH=benches $(BIN)/python -m harness.check $(ARGS)

.PHONY: bench-baseline
bench-baseline: $(INSTALLED) ## Write the baseline that bench-check compares this kind of CPU with
	@PYTHONPATH=benches $(BIN)/python -m harness.check --write $(ARGS)

.PHONY: aot
aot: $(INSTALLED) ## Compile the Triton kernels for every GPU architecture (none needed); rewrite their table
	@TRITON_INTERPRET=0 $(BIN)/python benches/triton_kernels/aot.py --markdown benches/triton_kernels/aot.md

NO_GPU = $(BIN)/python -c "import torch, sys; sys.exit(torch.cuda.is_available())" && \
  echo "skipped: torch sees no GPU here (torch.cuda.is_available() is False)"

.PHONY: test-gpu
test-gpu: $(INSTALLED) ## Run the kernels' tests on this machine's GPU
	@$(NO_GPU) || R1SAE_TEST_GPU=1 $(BIN)/python -m pytest -q tests/triton_kernels $(ARGS)

.PHONY: bench-gpu
bench-gpu: $(INSTALLED) ## Time the kernels on this machine's GPU beside torch and installed peers
	@$(NO_GPU) || $(BIN)/python -m pytest -q benches/triton_kernels/test_gpu.py -p no:xdist \
	  --benchmark-only --benchmark-columns=min,median,rounds --benchmark-sort=min $(ARGS)

.PHONY: wheel
wheel: $(INSTALLED) ## Build the sdist and, from it, the wheel into dist/
	@$(BIN)/maturin build --quiet --release --locked --sdist --out dist
	@ls -lh dist

.PHONY: docs-check
docs-check: $(INSTALLED) ## Run every command and Python example of README.md in a temporary folder
	@$(BIN)/python .ci/check_docs.py README.md

.PHONY: clean
clean: ## Remove what make made: .venv, target/, dist/, caches, the demo's folder
	rm -rf $(VENV) target dist demo-run .hypothesis .benchmarks .pytest_cache .mypy_cache .ruff_cache
	rm -f python/r1sae_fast/_core*.so python/r1sae_fast/_core*.pyd
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
