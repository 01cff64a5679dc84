# One command each. The tools live in .venv, made on first use.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo test test-all lint types docs lessons clean

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $@

demo: $(VENV)/.installed  ## install everything and draw a picture
	$(BIN)/latentdiff generate "a red circle above a blue square" --seed 1

# in several processes of one thread each: most of a test is starting up, which no thread shortens; three for
# two cores, since some wait for processes of their own
test: $(VENV)/.installed
	@command -v chromium >/dev/null || command -v google-chrome >/dev/null || echo "No Chromium here: the web page is not tested. apt-get install chromium"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n 3 --dist loadfile --no-loadscope-reorder

test-all: $(VENV)/.installed
	$(BIN)/python -m pytest

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed
	$(BIN)/mypy

lessons: $(VENV)/.installed  ## run the lessons and write their pages
	$(BIN)/python -m pip install --quiet -e '.[docs]'
	$(BIN)/python scripts/docs/lessons.py

docs: $(VENV)/.installed  ## the manual, into site/; warnings are errors, links are checked
	$(BIN)/python -m pip install --quiet -e '.[docs]'
	$(BIN)/mkdocs build --quiet

clean:
	rm -rf $(VENV) site .pytest_cache .mypy_cache .ruff_cache
