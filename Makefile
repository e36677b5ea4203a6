# The first call of any target makes an environment in .venv and installs into it; later calls reuse it. A Python that already has
# torch (a CUDA build, say) lends it to the environment; an active virtual environment that has torch is used as it is.

PYTHON ?= python3
VENV ?= .venv
BENCH ?=
GPU ?=
TRAIN ?=
TEST ?=
TRITONS ?= 3.6.0 3.7.1 3.8.0
VARIANTS ?=

# "system", "active" or nothing: where the Python in use finds a torch
TORCH := $(shell $(PYTHON) -c 'import sys, torch; print("system" if sys.prefix == sys.base_prefix else "active")' 2>/dev/null)
ifeq ($(TORCH),active)
RUN := $(PYTHON)
STAMP := build/installed
else
RUN := $(VENV)/bin/python
STAMP := $(VENV)/installed
endif

.PHONY: help install test bench demo train gpu emulate variants kernels performance lint format clean

help:
	@echo "make test    set up once, run the tests, a worker per core        TEST='-k streaming' passes arguments to pytest"
	@echo "make bench   set up once, measure within three minutes    BENCH=--full is everything, BENCH=--help lists the options"
	@echo "make demo    set up once, draw photo.png: a photograph, its groups, where one token attends"
	@echo "make train   set up once, train a small CrossFormer on digits TRAIN='--help' lists the options"
	@echo "make gpu     set up once, everything that needs a GPU       GPU='--part sweep' is a share, GPU='--help' lists them"
	@echo "make emulate set up once, all compiled kernels in an emulator of PTX, warps in three orders; no GPU"
	@echo "make variants set up once, every form of every kernel compiled for every chip, with each of several versions of Triton"
	@echo "make kernels, make performance     write docs/kernels.md, and the tables of README.md and docs/performance.md"
	@echo "make lint    ruff, as continuous integration runs it; make format applies it"
	@echo "make clean   remove the environment and everything built"

install: $(STAMP)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(if $(TORCH),--system-site-packages) $(VENV)

$(STAMP): pyproject.toml setup.py requirements-torch.txt requirements-peers.txt $(wildcard csrc/*.h csrc/*/*) | $(filter $(VENV)/%,$(RUN))
	$(RUN) -c 'import torch' 2>/dev/null || $(RUN) -m pip install -r requirements-torch.txt
	$(RUN) -m pip install 'setuptools>=77' wheel
	VITKERNELS_NATIVE=1 $(RUN) -m pip install --no-build-isolation -e '.[dev]'
	$(if $(TORCH),,$(RUN) -m pip show -q torchvision 2>/dev/null || $(RUN) -m pip install --no-deps -r requirements-peers.txt)
	@mkdir -p $(dir $@) && touch $@

test: install
	$(RUN) -m pytest -n auto --dist worksteal $(TEST)

bench: install
	$(RUN) benchmarks/run.py $(BENCH)

demo: install
	$(RUN) examples/photo.py

train: install
	$(RUN) examples/train.py $(TRAIN)

gpu: install
	PYTHON=$(RUN) benchmarks/gpu.sh $(GPU)

emulate: install
	VITKERNELS_EMULATE=1 $(RUN) -m pytest -n auto --dist worksteal tests/test_emulated.py $(TEST)

# VARIANTS=--whole goes down to machine code, which takes long
variants: install
	@for version in $(TRITONS); do \
		folder=$(CURDIR)/build/triton-$$version; echo "triton $$version"; \
		test -d $$folder || $(RUN) -m pip install -q --no-deps --target $$folder triton==$$version || exit; \
		PYTHONPATH=$$folder $(RUN) benchmarks/ahead_of_time.py $(VARIANTS) || exit; \
	done

kernels: install
	$(RUN) benchmarks/kernel_report.py --write

performance: install
	$(RUN) benchmarks/performance.py

lint: install
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

format: install
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info vitkernels/*.so .pytest_cache .ruff_cache
