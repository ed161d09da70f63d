# Everything runs from the checkout: `make demo` and `make test` set up a virtual environment first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo serve test lint bench chaos fuzz format clean help

help:  ## Show what each target does.
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

$(READY): pyproject.toml scripts/setup
	@PYTHON="$(PYTHON)" VENV="$(VENV)" scripts/setup
	@touch $@

demo: $(READY)  ## Make a picture through the real service, with no download.
	@$(BIN)/python scripts/demo.py

serve: $(READY)  ## Start the service on http://127.0.0.1:8000 (Ctrl-C stops it).
	@$(BIN)/impasto serve

test: $(READY)  ## Run every test.
	@$(BIN)/python -m pytest --numprocesses auto --dist loadfile

lint: $(READY)  ## Check style, types and import rules.
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache

bench: $(READY)  ## Time pictures of several sizes and step counts.
	@$(BIN)/python -m benchmarks.latency

SECONDS_EACH ?= 300
fuzz: $(READY)  ## Feed strange bytes to every reader, SECONDS_EACH=300 seconds each.
	@$(BIN)/python -m tests.security.fuzz --seconds $(SECONDS_EACH)

SECONDS ?= 60
SEED ?= 0
chaos: $(READY)  ## Kill everything at random on both databases, SECONDS=60 each, and look for lost jobs.
	@$(BIN)/python -m scripts.chaos --seconds $(SECONDS) --seed $(SEED)

format: $(READY)  ## Rewrite the code in the house style.
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean:  ## Remove the virtual environment and the data folder of `make serve`.
	rm -rf $(VENV) impasto-data out
