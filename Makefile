# Everything runs in .venv; `make demo` on a bare machine needs Python >= 3.10 with venv, and nothing else.
PYTHON ?= python3
BIN := .venv/bin
# What is installed: the package itself; with what the tests need; with JupyterLab; with what builds the site.
BASE := .venv/.base
TEST := .venv/.test
LAB := .venv/.lab
DOCS := .venv/.docs

.PHONY: help setup demo test test-readme test-long gpu-check lab docs export readme results format clean

help:  ## list the commands
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

setup: $(BASE)  ## make .venv with dinolab and what it needs to run (minutes, once)

# Installing says which large files it fetches, and when it unpacks; everything else is in .venv/install.log.
define install
	@echo "installing $(2) into .venv (the log is .venv/install.log)"
	@{ $(BIN)/python -m pip install --disable-pip-version-check --no-input --progress-bar off --editable '$(1)' 2>&1 || echo FAILED; } | tee .venv/install.log | awk ' \
	  /Downloading .*\([0-9.]+ [MG]B\)/ { size = $$(NF - 1); sub(/\(/, "", size); size += 0; unit = $$NF; \
	    if (unit ~ /GB/ || size >= 30) { name = $$2; sub(/.*\//, "", name); sub(/-.*/, "", name); print "  fetching " name ", " size " " substr(unit, 1, 2) } } \
	  /^Collecting/ { n++; if (n % 40 == 0) print "  " n " packages looked up" } \
	  /^Installing collected packages/ { print "  unpacking " NF - 3 " packages (a minute or two)" } \
	  /^ERROR|No space left/ { print "  " $$0 } { fflush() }'
	@tail -n 1 .venv/install.log | grep -qv FAILED || { echo "installing failed (see .venv/install.log); needed: a network with a Python package index, 10 GB of disk; then run make again"; exit 2; }
	@touch $@
endef

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { echo "$(PYTHON): Python >= 3.10 is needed; install it, or: make PYTHON=/path/to/python3 $(MAKECMDGOALS)"; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) lacks venv; on Debian and Ubuntu: apt-get install python3-venv"; exit 2; }
	@$(PYTHON) -m venv .venv

$(BASE): settings.ini setup.py | .venv/bin/python
	$(call install,.,dinolab and what it needs to run)

$(TEST): settings.ini setup.py | .venv/bin/python
	$(call install,.[test],what the tests need)
	@touch $(BASE)

$(LAB): $(BASE)
	$(call install,.[lab],JupyterLab)

$(DOCS): $(BASE)
	$(call install,.[docs],what builds the site)

demo: $(BASE)  ## features of two volumes, from image to picture (minutes)
	@folder=$$($(BIN)/dinolab run multires_features --out runs --figures-to runs/demo) && cat "$$folder/timing.txt" && echo "pictures in runs/demo, everything in $$folder"
	@echo "to type dinolab in this terminal: . .venv/bin/activate"

test: $(TEST)  ## all quick tests: notebooks and tests/ (minutes)
	@PATH="$(CURDIR)/$(BIN):$$PATH" tests/run

test-readme: $(TEST)  ## the README, typed line by line in an empty folder (minutes)
	@PATH="$(CURDIR)/$(BIN):$$PATH" python -m pytest -q tests/test_readme_runs.py --readme

test-long: $(TEST)  ## also kills, whole experiments and the README (an hour)
	@PATH="$(CURDIR)/$(BIN):$$PATH" tests/run --long

gpu-check: $(BASE)  ## correctness and speed on this machine's GPU, into nbs/results/gpu.json (8 minutes)
	@$(BIN)/python -c "from dinolab.book.gpu import main; main()"

EXPERIMENT ?= multires_features
lab: $(LAB)  ## JupyterLab on an experiment, at its parameters (EXPERIMENT=name)
	@$(BIN)/jupyter lab --notebook-dir nbs --LabApp.default_url=/lab/tree/experiments/$(EXPERIMENT).ipynb

docs: $(DOCS)  ## the site, in _docs (minutes)
	@PATH="$(CURDIR)/$(BIN):$$PATH" python -c 'from dinolab.site.build import build; print(build())'

export: $(TEST)  ## notebooks -> dinolab/, formatted and cleaned
	@PATH="$(CURDIR)/$(BIN):$$PATH" && ruff format --quiet nbs tests && nbdev_export && nbdev_clean

format: $(TEST)  ## what the formatter and the linter say
	@PATH="$(CURDIR)/$(BIN):$$PATH" && ruff format --check nbs tests && ruff check nbs tests

readme: $(TEST)  ## README.md and CONTRIBUTING.md from their pages
	@$(BIN)/python -c 'from dinolab.site.docs import write_readme; write_readme()'

results: $(TEST)  ## the page of results from the summaries in nbs/results
	@$(BIN)/python -c 'from dinolab.site.docs import write_results; write_results()'

clean:  ## remove .venv and built files (not runs/ or data/)
	rm -rf .venv _docs _proc build *.egg-info
