# make demo   runs the complete method on a tiny model, in minutes on two CPU cores
# make test   runs lint and the tests, in two processes
# Each target installs what it needs; a second run reuses the environment.
VENV ?= .venv
SHELL := /bin/bash
BIN = $(abspath $(VENV))/bin
RUN = PATH="$(BIN):$$PATH" OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
# Runs the tests in two processes (distributed by tests/conftest.py).
RUN_TESTS = $(RUN) pytest -q tests --ignore tests/te -n 2 --dist loadfile

.PHONY: demo tiny-hybrid tiny-vision paper-tables test test-all test-kill test-fuzz test-mutations unit lint format test-te test-slurm image smollm2 bench bench-loss bench-colocation gpu-check patches-page docs env serve-env test-serve

env:
	@VENV="$(VENV)" tools/setup_env.sh dev

demo: env
	$(RUN) examples/tiny_cpu/run.sh $(DEMO_DIR)

# The demo on a hybrid of Mamba, attention, MLP and expert layers.
tiny-hybrid: env
	$(RUN) examples/tiny_hybrid/run.sh $(HYBRID_DIR)

# A tiny vision-language model on pictures that the example draws: QAD with images and with text only.
tiny-vision: env
	$(RUN) examples/tiny_vision/run.sh $(VISION_DIR)

# A table of the QAD report on a small model, by its name in examples/paper_tables/experiments.py, or "all".
TABLE ?= one_stage
paper-tables: env
	$(RUN) python examples/paper_tables/run.py $(TABLE) --output $(or $(PAPER_DIR),runs/paper_tables)

test: env lint serve-env
	$(RUN_TESTS)

# Creates or reuses the environment of the serving engines, shared by all clones (docs/serving.md). QAD_NO_SERVE=1 leaves it
# and the tests in tests/serve out.
serve-env:
	@if [ -n "$$QAD_NO_SERVE" ]; then echo "QAD_NO_SERVE is set: no serving environment, and tests/serve is skipped"; \
	else tools/setup_serving_env.sh; fi

# Serves exports with real engines on the CPU and compares their log-probabilities with those of the trained students.
test-serve: env serve-env
	$(RUN) pytest -q -rs tests/serve

# Also runs the slow tests that make test leaves out.
test-all: env lint serve-env
	$(RUN_TESTS) -m 'all or not all'

# Kills jobs at thirty random moments, in steps, saves and exports, and writes the results to docs/. Takes minutes.
test-kill: env
	$(RUN) python tests/dist/kill_harness.py --kills 30 --record docs/kill_test.md

# Damages models, configurations, chats, prepared data and index caches, and writes the outcomes to docs/. Takes minutes.
test-fuzz: env
	$(RUN) python tests/dist/fuzz_harness.py --record docs/fuzz_test.md

# Changes exports in ways that servers do not notice, and writes what the validator finds to docs/. Takes minutes.
test-mutations: env
	$(RUN) python tests/dist/mutation_harness.py --record docs/mutation_test.md

unit: env
	$(RUN) pytest -q tests/unit

lint: env
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	git ls-files | grep -vE '\.(json|png)$$' | $(RUN) xargs codespell
	$(RUN) python tools/check_prose.py
	$(RUN) shellcheck --external-sources .ci/run launch/*.sh launch/*.sbatch tools/*.sh examples/*/*.sh
	$(RUN) hadolint Dockerfile
	$(RUN) mypy

format: env
	$(RUN) ruff format .
	$(RUN) ruff check --fix .

# Generates docs/patches.md from the table of patches to other packages.
patches-page: env
	$(RUN) python -c "from megatron_qad.engine.patches_page import page; print(page(), end='')" > docs/patches.md

# Builds the documentation as a site in build/site; a broken link fails. tests/unit/test_site.py does the same in make test.
docs: env
	$(RUN) NO_MKDOCS_2_WARNING=1 python -m mkdocs build --strict

# Compares names, sharded state, conversion and quantizers of Transformer Engine's layers with the local ones, without a GPU.
# Needs transformer_engine: either installed, or TE_WHEEL=FILE with a built wheel of its torch extension.
test-te: env
	@if [ -n "$(TE_WHEEL)" ]; then VENV="$(VENV)-te" TE_WHEEL="$(TE_WHEEL)" tools/setup_env.sh dev te; fi
	@bin="$(BIN)"; [ -n "$(TE_WHEEL)" ] && bin="$(abspath $(VENV)-te)/bin"; \
	PATH="$$bin:$$PATH" OMP_NUM_THREADS=1 pytest -q -rs tests/te

# Tests preemption, the loss of a node and the pipeline of jobs on a real two-node SLURM, started on this machine. Needs root;
# installs Debian's packages with apt, or prints why it cannot.
test-slurm: env
	$(RUN) pytest -q -rs tests/slurm

image:
	@if docker info >/dev/null 2>&1; then docker build --tag megatron_qad .; \
	else echo "no docker daemon found: no image was built (make lint checks the Dockerfile)"; fi

# Compares NVFP4 and FP8 kernels with those of modelopt and compressed-tensors (docs/benchmarks/README.md). Takes minutes.
bench: env
	$(RUN) python tools/bench_nvfp4.py

# Runs QAD on a real post-trained model, SmolLM2-135M-Instruct, on two cores.
smollm2:
	@VENV="$(VENV)" tools/setup_env.sh dev examples
	PATH="$(BIN):$$PATH" examples/smollm2_135m/run.sh $(SMOLLM2_DIR)

# Compares the KL loss with those of modelopt, TRL, Liger, plain torch and torch.compile. Needs an idle machine.
bench-loss:
	@VENV="$(VENV)" tools/setup_env.sh dev bench
	PATH="$(BIN):$$PATH" python tools/bench_loss.py $(BENCH_LOSS_FLAGS)

# Compares a training step with that of modelopt's distillation (docs/benchmarks/README.md). Takes minutes on an idle machine.
bench-colocation: env
	PATH="$(BIN):$$PATH" python tools/bench_colocation.py $(BENCH_COLOCATION_FLAGS)

# Runs all GPU checks within eight minutes and prints a table; without a GPU with tiny sizes. Exit status 1 if a check fails.
gpu-check: env
	$(RUN) python tools/gpu_check.py $(GPU_CHECK_FLAGS)
