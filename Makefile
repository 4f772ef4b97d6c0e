# make demo       install, run the main job on a thousand handwritten digits, say where the report is
# make test       install with the test extras, run every test
# make test-fast  the same without the slow ones, which are marked: under two minutes on two cores
# make lint       ruff, its formatting, pyright, import-linter
# make docs       install with the docs extras, build the site from docs/ into docs/_build/html; a warning or a dead link is an error
# make format     let ruff lay out the code
# make clean      remove what was built, the caches and demo/; the environment in .venv stays
# Needs Python 3.11 or newer (PYTHON=/path/to/python chooses one) and make.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= demo
SITE := docs/_build/html
PINS := pyproject.toml constraints.txt
export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-fast lint docs format clean
.DEFAULT_GOAL := demo

demo: $(VENV)/.installed-core
	$(BIN)/meanfield solve --pair 3,5 --out $(OUT)
	@echo "The report is $(abspath $(OUT))/report.html: open it in a browser."

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n 2

test-fast: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n 2 -m "not slow"

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

docs: $(VENV)/.installed-docs
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs $(SITE)
	$(BIN)/python docs/extensions/links.py $(SITE)
	@echo "The site is $(abspath $(SITE))/index.html: open it in a browser."

format: $(VENV)/.installed-test
	$(BIN)/ruff check --select I --fix .
	$(BIN)/ruff format .

$(VENV)/.created:
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) is not on the PATH; install Python 3.11 or newer" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; v = "%d.%d" % sys.version_info[:2]; sys.exit(0 if sys.version_info >= (3, 11) else \
		"error: $(PYTHON) is Python " + v + "; meanfield needs 3.11 or newer (make PYTHON=/path/to/a/newer/python)")'
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.installed-core: $(PINS) $(VENV)/.created
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-test: $(PINS) $(VENV)/.created
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test]'
	@touch $(VENV)/.installed-core $@

$(VENV)/.installed-docs: $(PINS) $(VENV)/.created
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[docs]'
	@touch $(VENV)/.installed-core $@

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache demo docs/_build docs/gallery docs/api
	find meanfield tests benchmarks theory_checks docs -name __pycache__ -type d -prune -exec rm -rf {} +
