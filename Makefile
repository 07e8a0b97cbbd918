# `make` alone lists the targets.
PYTHON ?= python3
BIN := .venv/bin
DEMO := build/fl-digits
PROJECT := {{cookiecutter.__folder}}
TESTS_MAY := --allow-untyped-defs --allow-incomplete-defs --allow-any-generics

help:  ## list the targets
	@sed -n 's|^\([a-z-]*\):.*## \(.*\)|  make \1\t\2|p' Makefile | expand -t 20

demo: .venv/ready  ## render a project with the digits data set, and run it
	$(BIN)/cookiecutter . --no-input --overwrite-if-exists --output-dir build project_name="Federated digits" \
		project_slug=fl-digits dataset=digits rounds=5 setup=skip
	cd $(DEMO) && ../../$(BIN)/python job.py --local_epochs 2

test-fast: .venv/ready  ## fast tests of rendering, questions and hooks
	$(BIN)/python -m pytest -m "not slow" --ignore tests/project

test: .venv/ready  ## also those of a rendered project, and one federation
	$(BIN)/python -m pytest -m "not slow"

test-all: .venv/ready  ## also failures, more federations, real environments
	$(BIN)/python -m pytest

snapshots: .venv/ready  ## update tests/snapshots/; then review `git diff`
	SNAPSHOTS=write $(BIN)/python -m pytest -q tests/test_snapshots.py

lint: .venv/ready  ## ruff on the template and the project
	$(BIN)/ruff check --no-cache --config pyproject.toml . && $(BIN)/ruff format --no-cache --check --config pyproject.toml .

types: .venv/ready  ## mypy on the template and a rendered project
	$(BIN)/python -m mypy
	$(BIN)/python -m mypy $(TESTS_MAY) --exclude /project/ tests
	$(BIN)/cookiecutter . --no-input --overwrite-if-exists --output-dir build project_slug=fl-types setup=skip
	cd build/fl-types && ../../$(BIN)/python -m mypy
	cd build/fl-types && MYPYPATH=../../tests:../../tests/project ../../$(BIN)/python -m mypy $(TESTS_MAY) ../../tests/project

bench: .venv/ready  ## compare with peers; BENCH="--data_root DIR" uses your images
	$(BIN)/python benchmarks/peers.py $(BENCH)

bench-quick: .venv/ready  ## the same on a few images, to see that it works
	$(BIN)/python benchmarks/peers.py --quick --repeats 1 $(BENCH)

.venv/ready: requirements-dev.txt $(PROJECT)/requirements.txt $(PROJECT)/requirements-dev.txt
	$(PYTHON) "$(PROJECT)/install.py" --no-gpu --venv .venv \
		-r requirements-dev.txt -r "$(PROJECT)/requirements.txt" -r "$(PROJECT)/requirements-dev.txt"
	touch $@

clean:  ## remove build/ and .venv
	rm -rf build .venv

.PHONY: help demo test-fast test test-all snapshots lint types bench bench-quick clean
