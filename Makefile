# `make` alone lists what there is.
PYTHON ?= python3
BIN := .venv/bin
DEMO := build/fl-digits
PROJECT := {{cookiecutter.__folder}}
TESTS_MAY := --allow-untyped-defs --allow-incomplete-defs --allow-any-generics

help:  ## list the targets
	@sed -n 's|^\([a-z-]*\):.*## \(.*\)|  make \1\t\2|p' Makefile | expand -t 20

demo: .venv/ready  ## render a project with its digits data set and run it: 2 sites, 5 rounds, no network
	$(BIN)/cookiecutter . --no-input --overwrite-if-exists --output-dir build project_name="Federated digits" \
		project_slug=fl-digits dataset=digits rounds=5 setup=skip
	cd $(DEMO) && ../../$(BIN)/python job.py --local_epochs 2

test-fast: .venv/ready  ## rendering, questions, hooks: the fast tests that do not import a rendered project
	$(BIN)/python -m pytest -m "not slow" --ignore tests/project

test: .venv/ready  ## all fast tests, and one federation
	$(BIN)/python -m pytest -m "not slow"

test-all: .venv/ready  ## all tests: faults, more federations, real environments
	$(BIN)/python -m pytest

snapshots: .venv/ready  ## write tests/snapshots/ anew, after a change of what is rendered; then look at `git diff`
	SNAPSHOTS=write $(BIN)/python -m pytest -q tests/test_snapshots.py

lint: .venv/ready  ## ruff on everything where it stands
	$(BIN)/ruff check --no-cache --config pyproject.toml . && $(BIN)/ruff format --no-cache --check --config pyproject.toml .

types: .venv/ready  ## mypy: strict on the template's Python and on a rendered project, less strict on their tests
	$(BIN)/python -m mypy
	$(BIN)/python -m mypy $(TESTS_MAY) --exclude /project/ tests
	$(BIN)/cookiecutter . --no-input --overwrite-if-exists --output-dir build project_slug=fl-types setup=skip
	cd build/fl-types && ../../$(BIN)/python -m mypy
	cd build/fl-types && MYPYPATH=../../tests:../../tests/project ../../$(BIN)/python -m mypy $(TESTS_MAY) ../../tests/project

bench: .venv/ready  ## measure the speed beside a plain loop and the textbook way; BENCH="--data DIR" takes your images
	$(BIN)/python benchmarks/speed.py $(BENCH)

bench-quick: .venv/ready  ## the same on few images: shows that the benchmark works, no more
	$(BIN)/python benchmarks/speed.py --quick $(BENCH)

.venv/ready: requirements-dev.txt $(PROJECT)/requirements.txt $(PROJECT)/requirements-dev.txt
	$(PYTHON) "$(PROJECT)/install.py" --no-gpu --venv .venv \
		-r requirements-dev.txt -r "$(PROJECT)/requirements.txt" -r "$(PROJECT)/requirements-dev.txt"
	touch $@

clean:  ## remove what was built here
	rm -rf build .venv

.PHONY: help demo test-fast test test-all snapshots lint types bench bench-quick clean
