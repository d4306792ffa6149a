# `make help` lists the targets. Every target that needs the environment makes it first (scripts/setup.sh).

DATA    ?= glyphs
MODEL   ?= models:/drnet-$(DATA)@champion
SAMPLES ?= data/$(DATA)/samples/*
TESTS   ?=
UPGRADE ?=

PYTHON := .venv/bin/python
RUFF   := .venv/bin/ruff
TY     := .venv/bin/ty
CODE   := datasets pipeline jobs benchmarks tests

# Neither Ray nor MLflow reports its use over the network.
export RAY_USAGE_STATS_ENABLED = 0
export MLFLOW_DISABLE_TELEMETRY = true
# Ray starts many processes; without bytecode each of them compiles torch, Ray and MLflow anew, 6 s of CPU.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup demo search test chaos lint format lock audit docs clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## make .venv from requirements.lock, with the system packages that FFCV is built against
	@scripts/setup.sh

demo: setup ## prepare, train, evaluate, register and predict on this machine; DATA=glyphs (default) or elpv
	$(PYTHON) -m jobs.prepare --config $(DATA)
	$(PYTHON) -m jobs.train --config $(DATA)
	$(PYTHON) -m jobs.register --config $(DATA)
	$(PYTHON) -m jobs.predict --model $(MODEL) $(SAMPLES)
	@echo
	@echo "The report: runs/$(DATA)/report/report.html (also report.md, report.json and the figures beside it)"

search: setup ## search the predictor's size for the demo's backbone (after `make demo`), choose and register; DATA as there
	$(PYTHON) -m jobs.tune --config $(DATA) --max-accuracy-drop 1 --register

test: lint ## lint, then every test; TESTS="tests/unit -k config" runs some of them
	$(PYTHON) -m pytest $(TESTS)

chaos: setup ## every row of the fault matrix, about half an hour, as root; writes docs/faults.md
	rm -f faults.jsonl
	DRNET_FAULTS=$(CURDIR)/faults.jsonl $(PYTHON) -m pytest -m "" tests/chaos tests/ray/test_training.py tests/ray/test_submit.py
	$(PYTHON) -m tests.chaos.matrix faults.jsonl > docs/faults.md
	rm faults.jsonl

lint: setup ## ruff (lint and format) and ty (types)
	$(RUFF) check $(CODE)
	$(RUFF) format --check $(CODE)
	$(TY) check

format: setup ## sort imports, repair what ruff can repair, format
	$(RUFF) check --fix $(CODE)
	$(RUFF) format $(CODE)

lock: ## write requirements.lock from pyproject.toml; UPGRADE=--upgrade takes the newest versions
	scripts/setup.sh uv pip compile pyproject.toml --group dev --quiet --universal --fork-strategy fewest \
		--generate-hashes --no-emit-index-url --annotation-style line --custom-compile-command "make lock" \
		$(UPGRADE) --output-file requirements.lock

audit: setup ## report known vulnerabilities of what requirements.lock pins; needs the OSV database, and never fails
	scripts/audit.sh

docs: setup ## write docs/configuration.md from the configuration's fields
	$(PYTHON) -m jobs.cli > docs/configuration.md

clean: ## remove .venv, .tools and caches; data, runs and the MLflow store stay
	rm -rf .venv/.setup-finished .venv .tools .ruff_cache .pytest_cache .hypothesis
	find $(CODE) -name __pycache__ -type d -prune -exec rm -rf {} +
