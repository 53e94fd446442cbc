# Python 3.11 or newer. PIP_FLAGS passes options to pip, for instance an index that offers the CPU build of torch.
PYTHON ?= python3
PIP_FLAGS ?=
PIP = .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(PIP_FLAGS)

.PHONY: demo test check tables reproduce-smoke clean

demo: .venv/core        ## set up and segment two real images with the embedded model
	.venv/bin/python examples/demo.py

test: .venv/dev         ## set up and run the tests
	.venv/bin/python -m pytest

check: .venv/dev        ## lint and types
	.venv/bin/ruff check src tests benchmarks examples
	.venv/bin/pyright

tables: .venv/dev       ## write the tables of README and docs from the result files
	.venv/bin/python benchmarks/report.py

reproduce-smoke: .venv/dev       ## one tiny arm of every table of the papers, on drawn tissue
	.venv/bin/python benchmarks/smoke.py

clean:
	rm -rf .venv demo

.venv/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "nuguide needs Python 3.11 or newer; make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	touch $@

.venv/core: .venv/python pyproject.toml constraints.txt
	@echo "installing nuguide into .venv (torch is large; a minute or two)"
	$(PIP) -e .
	touch $@

.venv/dev: .venv/core
	@echo "installing what tests and checks need"
	$(PIP) -e '.[dev]'
	touch $@
