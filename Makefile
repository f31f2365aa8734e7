# make demo         sets up .venv-demo (without torch) and runs jobs on real photos
# make test         sets up .venv (everything) and runs the tests
# make venv         sets up .venv; the command is .venv/bin/imagemill
# make check        formatting, lint, types
# make docs         builds the documentation into site/; make docs-serve shows it while you write
# make bench        runs the benchmarks
# make gpu-wheels   collects what `python3 -m bench.gpu` needs on a machine with a GPU and no network
# make locks        writes the hashes of all packages that the images install; run it after changing their versions
# make sbom         lists these packages in sbom/, as CycloneDX
# make pin-images   writes the digests of third-party images into .env
# make clean        removes everything that these targets create
#
# ARGS is passed on: make demo ARGS="--images ~/photos", make test ARGS="tests/unit -x"
# Another Python version: make test PYTHON=python3.12

PYTHON ?= python3
ARGS ?=
TORCH_INDEX ?=

.PHONY: demo test venv check docs docs-serve bench gpu-wheels locks sbom pin-images clean
.DELETE_ON_ERROR:

demo: .venv-demo/.installed
	@.venv-demo/bin/imagemill demo $(ARGS)

test: venv
	@.venv/bin/python -m pytest --numprocesses 3 --dist loadfile $(ARGS)

venv: .venv/.installed

check: venv
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy

docs: venv
	@NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict --quiet $(ARGS)

docs-serve: venv
	@NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs serve $(ARGS)

bench: venv
	@.venv/bin/python -m bench $(ARGS)

gpu-wheels: venv
	@.venv/bin/python -m bench.gpu.wheels $(ARGS)

locks: .venv-release/.installed
	@UV=.venv-release/bin/uv TORCH_INDEX=$(TORCH_INDEX) deploy/requirements/lock.sh

sbom: .venv-release/.installed
	@mkdir -p sbom
	@for file in deploy/requirements/*.txt; do \
	  .venv-release/bin/python -W ignore -m cyclonedx_py requirements --pyproject pyproject.toml --output-reproducible \
	    --output-file sbom/$$(basename $$file .txt).cdx.json $$file || exit; done
	@ls sbom/*.cdx.json

pin-images:
	@deploy/pin-images.sh

clean:
	rm -rf .venv .venv-demo .venv-release .services demo-output sbom site build gpu-wheels gpu-packages src/*.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

# The stamp's time is that of the last complete installation, so a second run installs nothing.
.venv/.installed: EXTRAS = dev
.venv-demo/.installed: EXTRAS = demo
.venv-release/.installed: EXTRAS = release
%/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { echo \
	  'imagemill needs Python 3.11 or newer with venv (on Debian: apt install python3-venv). $(PYTHON) is not:' \
	  'choose another with PYTHON=python3.12.' >&2; exit 1; }
	@echo 'Setting up $(@D) with imagemill[$(EXTRAS)] ...'
	@$(PYTHON) -m venv $(@D)
	@$(@D)/bin/python -m pip install -qq --disable-pip-version-check -e '.[$(EXTRAS)]' -c constraints.txt
	@touch $@
