# `make demo`, `make test`, `make docs`: each installs what is missing first; a second time it starts at once.
PYTHON ?= python3
VENV   ?= .venv
RUN    := $(VENV)/bin/python
# A process a core, each with one thread: two threads each on two cores would be several times slower. What was
# compiled is kept: without, each worker and each process that a test starts compiles all of lotus anew.
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto --dist loadfile
export VENV PYTHON

.PHONY: demo test check fast format lint lint-and-types types docs setup soak doctor clean

demo: setup   ## every stage on scikit-learn's digits, ends with the report
	@$(RUN) tools/run.py configs/digits.yaml

test: setup   ## the whole test suite
	@$(PYTEST)

check: setup   ## before every commit: under two minutes
	@$(MAKE) --no-print-directory -j 2 fast lint-and-types

fast:
	@$(PYTEST) -m "not slow"

lint-and-types: lint types

lint:
	@$(RUN) -m ruff format --check .
	@$(RUN) -m ruff check .

types:
	@$(RUN) -m mypy

docs: setup   ## the guides and the reference as pages in build/docs; a warning is an error
	@NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --quiet --strict

format:
	@$(RUN) -m ruff format .
	@$(RUN) -m ruff check --fix .

setup:
	@tools/setup.sh

soak: setup   ## strike runs at random moments; each must end as if nothing had happened (KILLS=20); then files (MUTANTS=20000)
	@$(RUN) tools/soak.py --kills $(or $(KILLS),20)
	@mkdir -p build && PYTHONPATH=. $(RUN) -W ignore tests/test_fuzz.py 0 $(or $(MUTANTS),20000) 2>build/fuzz.log

doctor: setup
	@$(RUN) -m lotus doctor

clean:
	rm -rf $(VENV) runs build dist
