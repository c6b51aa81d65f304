# make install   a virtual environment in .venv with the `grappa` command, once
# make demo      the whole pipeline on built-in images, offline after the installation
# make test      lint, types and tests; those on a Slurm cluster and in a browser where there is one (tests/cluster/install.sh,
#                tests/browser/install.sh)
# make test-narrow   the tests that compute, as on a CPU without wide vector units: results differ in rounding only
# make test-faults   the fault campaigns: signals at random moments, damaged files; half an hour
# make bench     every performance gate, some hours; `make bench ONLY=R5` one of them, `QUICK=--quick` toy sizes
# The faiss build follows the machine: a GPU if nvidia-smi sees one. Otherwise say it: `make clean install EXTRA=gpu`.

PYTHON ?= python3
EXTRA ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)
TEST_WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
NARROW := ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_ENABLE_INSTRUCTIONS=SSE4_2
PYTEST := $(BIN)/python -m pytest -q --numprocesses $(TEST_WORKERS) --dist loadfile

.PHONY: install demo test test-narrow test-faults lint bench clean
.DELETE_ON_ERROR:

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; say which: make PYTHON=python3.12 install")'
	@echo 'Installing into $(VENV) with the $(EXTRA) build of faiss (a minute or two) ...'
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[all,$(EXTRA),dev]'
	@touch $@

demo: install
	$(BIN)/grappa demo

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy grappa

test: lint
	$(ONE_THREAD) $(PYTEST)

test-narrow: install
	$(ONE_THREAD) $(NARROW) $(PYTEST) tests/library tests/pipeline/engine/test_processes.py tests/pipeline/report

test-faults: install
	$(ONE_THREAD) $(BIN)/python -m tests.faults kills
	$(ONE_THREAD) $(BIN)/python -m tests.faults damage

bench: install
	$(BIN)/python -m tests.benchmarks $(if $(ONLY),--only $(ONLY)) $(QUICK)

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
