# Two commands from a fresh clone: `make demo` and `make test`. Both set up a virtual environment first.
VENV ?= .venv
PYTHON ?= python3
DEMO_OUTPUT ?= demo-output

.PHONY: help install demo test lint clean

help:
	@echo "make demo   from photographs to a released codec, in a few minutes on a CPU"
	@echo "make test   the test suite (CPU only)"
	@echo "make lint   ruff and mypy"
	@echo "make clean  remove the virtual environment and what the demo wrote"

# The stamp is newer than pyproject.toml once the installation has gone through. deepspeed comes last and not isolated,
# because it comes as source, and its setup wants the torch that it will run with. Nothing of it is compiled.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VENV)/bin/python -m pip install --quiet --editable '.[dev]'
	$(VENV)/bin/python -m pip install --quiet 'setuptools>=77' wheel
	DS_BUILD_OPS=0 $(VENV)/bin/python -m pip install --quiet --no-build-isolation --editable '.[deepspeed]'
	touch $@

install: $(VENV)/.installed

demo: install
	$(VENV)/bin/python demo/run_demo.py --output $(DEMO_OUTPUT)

test: install
	$(VENV)/bin/python -m pytest

lint: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

clean:
	rm -rf $(VENV) $(DEMO_OUTPUT)
