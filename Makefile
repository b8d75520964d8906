# Everything runs in .venv, made on first use; `make` alone lists the targets.
PYTHON ?= python3
BIN := .venv/bin
export MPLBACKEND := Agg

.PHONY: help install demo test test-slow lint types notebooks docs experiments clean
help:            ; @grep -E '^[a-z-]+:' Makefile | cut -d: -f1 | tr '\n' ' '; echo
install: .venv/installed
# torch first and by the constraint, so that no other package drags in another build of it
.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[single-cell,test,dev,notebooks,docs]'
	touch $@
demo: install    ; $(BIN)/pyro-scm demo --out results/demo
test: install    ; $(BIN)/python -m pytest -m 'not slow' -n 2
test-slow: install ; $(BIN)/python -m pytest -m slow
lint: install    ; $(BIN)/ruff check . && $(BIN)/ruff format --check .
types: install   ; $(BIN)/mypy
# in place, outputs kept; on real cells where PYRO_SCM_DATA names their folder, on simulated ones elsewhere
notebooks: install ; OMP_NUM_THREADS=1 $(BIN)/python notebooks/execute.py
docs: install    ; NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build
# every figure at its quick size, two scripts at a time; those of real data where PYRO_SCM_DATA names its folder
SIMULATED := two_latents five_latents densities hard_interventions counting_algorithm adversarial_prior irm_verdict \
  ablation temporal next_environment recover_truth why_rotated unmixing_choices latent_graphs dose_curves \
  screen_with_truth calibration
REAL := l1000_explosion l1000_ceiling l1000_unseen_drugs papalexi_thp1 gene_programmes known_answers_crispr \
  known_answers_l1000 known_answers_pairs sachs norman_pairs kang_ifnb tggates_doses l1000_cell_lines pretraining_helps \
  held_out_proteins adversary_helps
experiments: install
	test -n "$$PYRO_SCM_DATA" || echo "PYRO_SCM_DATA is not set: leaving out $(REAL)"
	printf '%s\n' $${PYRO_SCM_DATA:+$(REAL)} $(SIMULATED) | \
	  OMP_NUM_THREADS=1 xargs -P 2 -I{} sh -c '$(BIN)/python -m experiments.{} || { echo "{} failed" >&2; exit 255; }'
clean:           ; rm -rf .venv results build *.egg-info
