# Everything runs in .venv; `make demo` on a bare machine needs Python >= 3.10 with venv, and nothing else.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.ready

.PHONY: help setup demo test lab docs export readme results clean

help:  ## list the commands
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 10

setup: $(STAMP)  ## make .venv (about 7 GB, minutes; once)

$(STAMP): settings.ini setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { echo "$(PYTHON): Python >= 3.10 is needed; install it, or: make PYTHON=/path/to/python3 $(MAKECMDGOALS)"; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) lacks venv; on Debian and Ubuntu: apt-get install python3-venv"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing dinolab and its tools into .venv"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]' || { echo "installing failed (see above); needed: a network with a Python package index, 10 GB of disk; then run make again"; exit 2; }
	@touch $@

demo: $(STAMP)  ## features of two volumes, from image to picture (minutes)
	@echo "running nbs/experiments/multires_features.ipynb: some minutes"
	@folder=$$($(BIN)/dinolab run multires_features --out runs --figures-to runs/demo) && cat "$$folder/timing.txt" && echo "pictures in runs/demo, everything in $$folder"

test: $(STAMP)  ## all tests: notebooks and tests/
	@PATH="$(CURDIR)/$(BIN):$$PATH" tests/run

EXPERIMENT ?= multires_features
lab: $(STAMP)  ## JupyterLab on an experiment, at its parameters (EXPERIMENT=name)
	@$(BIN)/jupyter lab --notebook-dir nbs --LabApp.default_url=/lab/tree/experiments/$(EXPERIMENT).ipynb

docs: $(STAMP)  ## the site, in _docs (minutes)
	@PATH="$(CURDIR)/$(BIN):$$PATH" python -c 'from dinolab.site.build import build; print(build())'

export: $(STAMP)  ## notebooks -> dinolab/, cleaned
	@PATH="$(CURDIR)/$(BIN):$$PATH" nbdev_export && PATH="$(CURDIR)/$(BIN):$$PATH" nbdev_clean

readme: $(STAMP)  ## README.md and CONTRIBUTING.md from their pages
	@$(BIN)/python -c 'from dinolab.site.docs import write_readme; write_readme()'

results: $(STAMP)  ## the page of results from the summaries in nbs/results
	@$(BIN)/python -c 'from dinolab.site.docs import write_results; write_results()'

clean:  ## remove .venv and built files (not runs/ or data/)
	rm -rf .venv _docs _proc build *.egg-info
