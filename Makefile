# make demo   the whole method on an embedded tiny model: minutes on two CPU cores
# make test   lint and all tests, by two processes
# Each sets up what it needs; a second run reuses the environment.
VENV ?= .venv
SHELL := /bin/bash
BIN = $(abspath $(VENV))/bin
RUN = PATH="$(BIN):$$PATH" OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
# Two processes of tests (tests/conftest.py says which runs what), then by themselves those that measure times.
RUN_TESTS = export PATH="$(BIN):$$PATH" OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false; status=0; set -x; \
	pytest -q tests --ignore tests/te -n 2 --dist loadfile -m '$(1) not alone' || status=1; \
	pytest -q tests/dist -m '$(1) alone' || status=1; \
	exit $$status

.PHONY: demo tiny-hybrid test test-all test-kill unit lint format test-te test-slurm image smollm2 bench bench-loss bench-colocation gpu-check patches-page env

env:
	@VENV="$(VENV)" tools/setup_env.sh dev

demo: env
	$(RUN) examples/tiny_cpu/run.sh $(DEMO_DIR)

# The same on a hybrid of Mamba, attention, MLP and expert layers.
tiny-hybrid: env
	$(RUN) examples/tiny_hybrid/run.sh $(HYBRID_DIR)

test: env lint
	@$(call RUN_TESTS,not all and)

# Also what make test leaves out for time.
test-all: env lint
	@$(call RUN_TESTS,)

# Thirty kills at random moments, in steps, saves and exports; the record goes to docs/. Minutes.
test-kill: env
	$(RUN) python tests/dist/kill_harness.py --kills 30 --record docs/kill_test.md

unit: env
	$(RUN) pytest -q tests/unit

lint: env
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	git ls-files | grep -vE '\.(json|png)$$' | $(RUN) xargs codespell
	$(RUN) python tools/check_prose.py
	$(RUN) shellcheck --external-sources .ci/run launch/*.sh launch/*.sbatch tools/*.sh examples/*/*.sh
	$(RUN) hadolint Dockerfile

format: env
	$(RUN) ruff format .
	$(RUN) ruff check --fix .

# docs/patches.md from the table of what is replaced in other packages.
patches-page: env
	$(RUN) python -c "from megatron_qad.engine.patches import page; print(page(), end='')" > docs/patches.md

# Names, sharded state, conversion and quantizers of Transformer Engine's layers against the local ones, without a GPU.
# Needs transformer_engine: installed already, or TE_WHEEL=FILE naming a built wheel of its torch extension.
test-te: env
	@if [ -n "$(TE_WHEEL)" ]; then VENV="$(VENV)-te" TE_WHEEL="$(TE_WHEEL)" tools/setup_env.sh dev te; fi
	@bin="$(BIN)"; [ -n "$(TE_WHEEL)" ] && bin="$(abspath $(VENV)-te)/bin"; \
	PATH="$$bin:$$PATH" OMP_NUM_THREADS=1 pytest -q -rs tests/te

# Preemption, a node's death and the pipeline of jobs, on a real two-node SLURM that it starts on this machine (root; installs
# Debian's packages if apt can; says why where it cannot).
test-slurm: env
	$(RUN) pytest -q -rs tests/slurm

image:
	@if docker info >/dev/null 2>&1; then docker build --tag megatron_qad .; \
	else echo "no docker daemon here: no image was built (Dockerfile is checked by make lint)"; fi

# NVFP4 and FP8 against modelopt and compressed-tensors: the tables of docs/benchmarks/2026-11-25-cpu-nvfp4.md. Some minutes.
bench: env
	$(RUN) python tools/bench_nvfp4.py

# A real post-trained model, SmolLM2-135M-Instruct, on two cores.
smollm2: 
	@VENV="$(VENV)" tools/setup_env.sh dev examples
	PATH="$(BIN):$$PATH" examples/smollm2_135m/run.sh $(SMOLLM2_DIR)

# The KL loss beside modelopt's, TRL's, Liger's, plain torch and torch.compile; needs a quiet machine.
bench-loss:
	@VENV="$(VENV)" tools/setup_env.sh dev bench
	PATH="$(BIN):$$PATH" python tools/bench_loss.py $(BENCH_LOSS_FLAGS)

# Teacher and student on every rank, beside modelopt's distillation: the table of docs/benchmarks/2026-11-26-cpu-training-step.md. Minutes; a quiet machine.
bench-colocation: env
	PATH="$(BIN):$$PATH" python tools/bench_colocation.py $(BENCH_COLOCATION_FLAGS)

# What only a GPU can show, as one table within eight minutes; without a GPU the same with tiny sizes. Exit status 1 if a row fails.
gpu-check: env
	$(RUN) python tools/gpu_check.py $(GPU_CHECK_FLAGS)
