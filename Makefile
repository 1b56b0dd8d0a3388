# Two commands from a bare clone: `make quickstart` and `make test`. Nothing needs to be activated.
#
#   PYTHON   the interpreter that makes the environment; default: the first Python >= 3.11 found
#   VENV     where the environment is; default .venv
#   WORKERS  processes that run tests; default: one per core, at most 8

VENV ?= .venv
WORKERS ?= auto
PYTHON ?=

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
CONFIG := configs/quickstart.yaml
RUN := runs/quickstart

.PHONY: help quickstart test gpu-check lint types pytest docs install clean
.DEFAULT_GOAL := help

help:
	@echo "make quickstart   fine-tune the bundled emoji prior, sample, evaluate; eleven minutes on two cores"
	@echo "make test         lint, types and tests"
	@echo "make gpu-check    small runs on the GPU that is here, five minutes; a table of what passed"
	@echo "make docs         the documentation as a site, in site/"
	@echo "make install      only make $(VENV) and install into it"
	@echo "make clean        delete $(RUN) and the caches; $(VENV) stays"

quickstart: $(INSTALLED)
	$(BIN)/python train.py $(CONFIG)
	$(BIN)/python eval.py $(RUN)
	@echo
	@echo "Prior and posterior, side by side:  $(RUN)/eval/side_by_side.png"
	@echo "Samples while it was trained:       $(RUN)/samples/"
	@echo "All numbers:                        $(RUN)/eval/metrics.json"
	@echo "The LoRA for plain diffusers:       $(RUN)/lora/"

test: lint types pytest

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/python -m mypy

# One thread per process: the cores are used by several processes. Many of them are started, so what is compiled is kept.
pytest: $(INSTALLED)
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false PYTHONDONTWRITEBYTECODE= \
		$(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 8 --dist worksteal

# What is marked gpu, which `make test` skips where there is no card.
gpu-check: $(INSTALLED)
	$(BIN)/python -m tests.gpu_check

docs: $(INSTALLED)
	$(BIN)/python -c "import mkdocstrings" 2>/dev/null || $(BIN)/python -m pip install --quiet --editable ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "The first page: site/index.html"

install: $(INSTALLED)

$(INSTALLED): pyproject.toml
	@python="$(PYTHON)"; \
	for candidate in $${python:-python3 python3.14 python3.13 python3.12 python3.11 python}; do \
		if "$$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
			found="$$candidate"; break; \
		fi; \
	done; \
	if [ -z "$$found" ]; then \
		echo "No usable Python: $${python:-python3} is missing, older than 3.11, or has no venv module" >&2; \
		echo "(Debian, Ubuntu: apt install python3-venv). Or name one: make PYTHON=/path/to/python3.12 ..." >&2; \
		exit 1; \
	fi; \
	[ -x "$(BIN)/python" ] || { echo "Making $(VENV) with $$found"; "$$found" -m venv "$(VENV)"; }
	@echo "Installing into $(VENV); torch takes several GB and some minutes, once"
	@"$(BIN)/python" -m pip install --quiet --disable-pip-version-check --editable ".[test]"
	@touch "$@"

clean:
	rm -rf $(RUN) site .pytest_cache .mypy_cache .ruff_cache .hypothesis
