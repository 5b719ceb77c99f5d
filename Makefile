# make demo    a picture-book scene, segmented by the embedded model
# make test    the quick tests; make test-slow: the others; make lint: style and types
PYTHON ?= python3

.PHONY: demo test test-slow lint

demo: .venv/.installed
	.venv/bin/sptseg demo

test: .venv/.installed
	.venv/bin/python -m pytest

test-slow: .venv/.installed
	.venv/bin/python -m pytest -m "slow or browser"

lint: .venv/.installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pyright

.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	    { echo "sptseg needs Python 3.11 or newer, and '$(PYTHON)' is not: try make PYTHON=python3.11" >&2; exit 1; }
	@echo "Installing sptseg and what it needs into .venv; the download takes some minutes."
	@$(PYTHON) -m venv .venv
	@.venv/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[all]"
	@touch $@
