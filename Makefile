# make demo     sets up .venv-demo (no torch) and runs every operation on real photos
# make test     sets up .venv (everything) and runs the tests
# make venv     only .venv; .venv/bin/imagemill is the command
# make check    format, lint and types
# make bench    the benchmarks
# make clean    removes everything these targets create
#
# ARGS is passed on: make demo ARGS="--images ~/photos", make test ARGS="tests/unit -x"
# With another Python: make test PYTHON=python3.12

PYTHON ?= python3
ARGS ?=

.PHONY: demo test venv check bench clean
.DELETE_ON_ERROR:

demo: .venv-demo/.installed
	@.venv-demo/bin/imagemill demo $(ARGS)

test: venv
	@.venv/bin/python -m pytest $(ARGS)

venv: .venv/.installed

check: venv
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy

bench: venv
	@.venv/bin/python -m bench $(ARGS)

clean:
	rm -rf .venv .venv-demo .services demo-output build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

# The stamp is written after a complete installation, so a second run installs nothing.
.venv/.installed: EXTRAS = dev
.venv-demo/.installed: EXTRAS = demo
%/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { echo \
	  'imagemill needs Python 3.11 or newer with venv (on Debian: apt install python3-venv). $(PYTHON) is not:' \
	  'choose another one, for example with PYTHON=python3.12.' >&2; exit 1; }
	@echo 'Setting up $(@D) with imagemill[$(EXTRAS)] ...'
	@$(PYTHON) -m venv $(@D)
	@$(@D)/bin/python -m pip install -qq --disable-pip-version-check -e '.[$(EXTRAS)]' -c constraints.txt
	@touch $@
