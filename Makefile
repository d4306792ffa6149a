# `make help` lists the targets. Targets that need the environment create it first (scripts/setup.sh).

DATA    ?= glyphs
MODEL   ?= models:/drnet-$(DATA)@champion
SAMPLES ?= data/$(DATA)/samples/*
TESTS   ?=
UPGRADE ?=

PYTHON := .venv/bin/python
RUFF   := .venv/bin/ruff
TY     := .venv/bin/ty
CODE   := datasets pipeline jobs benchmarks tests

# Ray and MLflow do not report their use over the network.
export RAY_USAGE_STATS_ENABLED = 0
export MLFLOW_DISABLE_TELEMETRY = true
# Ray starts many processes. Without bytecode, each of them compiles torch, Ray and MLflow again, 6 s of CPU.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup demo search test chaos lint format lock audit docs clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## create .venv from requirements.lock, and install the system packages that FFCV needs
	@scripts/setup.sh

demo: setup ## prepare, train, evaluate, register and predict on this machine; DATA=glyphs (default) or elpv
	$(PYTHON) -m jobs.prepare --config $(DATA)
	$(PYTHON) -m jobs.train --config $(DATA)
	$(PYTHON) -m jobs.register --config $(DATA)
	$(PYTHON) -m jobs.predict --model $(MODEL) $(SAMPLES)
	@echo
	@echo "The report: runs/$(DATA)/report/report.html (also report.md, report.json and the figures beside it)"

search: setup ## after `make demo`: search the predictor's size for its backbone, choose and register; DATA=glyphs only
	$(PYTHON) -m jobs.tune --config $(DATA) --max-accuracy-drop 1 --register

test: lint ## lint, then all tests except those of `make chaos`; TESTS="tests/unit -k config" runs some of them
ifdef TESTS
	$(PYTHON) -m pytest $(TESTS)
else
	$(PYTHON) -m pytest -m "not chaos and not distributed" -n auto --maxprocesses 4 --dist loadfile
	$(PYTHON) -m pytest -m "not chaos and distributed"
endif

chaos: setup ## run every row of the fault matrix as root, about half an hour; writes docs/faults.md
	rm -f faults.jsonl
	DRNET_FAULTS=$(CURDIR)/faults.jsonl $(PYTHON) -m pytest -m "" tests/chaos tests/ray \
		tests/unit/test_compile.py tests/unit/test_connection.py tests/unit/test_serving.py
	$(PYTHON) -m tests.chaos.matrix faults.jsonl > docs/faults.md
	rm faults.jsonl

lint: setup ## check with ruff (lint and format) and ty (types)
	$(RUFF) check $(CODE)
	$(RUFF) format --check $(CODE)
	$(TY) check

format: setup ## sort imports, fix what ruff can fix, format
	$(RUFF) check --fix $(CODE)
	$(RUFF) format $(CODE)

lock: ## write requirements.lock from pyproject.toml; UPGRADE=--upgrade takes the newest versions
	scripts/setup.sh uv pip compile pyproject.toml --group dev --group pretrained --quiet --universal --fork-strategy fewest \
		--generate-hashes --no-emit-index-url --annotation-style line --custom-compile-command "make lock" \
		$(UPGRADE) --output-file requirements.lock

audit: setup ## report known vulnerabilities of the pinned packages; needs the OSV database, and never fails
	scripts/audit.sh

docs: setup ## write docs/configuration.md from the configuration's fields
	$(PYTHON) -m jobs.cli > docs/configuration.md

clean: ## remove .venv, .tools and caches; keeps data, runs and the MLflow store
	rm -rf .venv/.setup-finished .venv .tools .ruff_cache .pytest_cache .hypothesis
	find $(CODE) -name __pycache__ -type d -prune -exec rm -rf {} +
