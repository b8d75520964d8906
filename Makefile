# Everything runs in .venv, made on first use; `make` alone lists the targets.
PYTHON ?= python3
BIN := .venv/bin
export MPLBACKEND := Agg

.PHONY: help install demo test test-slow lint types experiments clean
help:            ; @grep -E '^[a-z-]+:' Makefile | cut -d: -f1 | tr '\n' ' '; echo
install: .venv/installed
# torch first and by the constraint, so that no other package drags in another build of it
.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[single-cell,test,dev]'
	touch $@
demo: install    ; $(BIN)/pyro-scm demo --out results/demo
test: install    ; $(BIN)/python -m pytest -m 'not slow' -n 2
test-slow: install ; $(BIN)/python -m pytest -m slow
lint: install    ; $(BIN)/ruff check . && $(BIN)/ruff format --check .
types: install   ; $(BIN)/mypy
experiments: install
	for script in papalexi_thp1 l1000_unseen_drugs; do $(BIN)/python -m experiments.$$script || exit; done
clean:           ; rm -rf .venv results build *.egg-info
