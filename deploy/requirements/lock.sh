#!/usr/bin/env bash
# Writes a file for each extra that an image may install, one for the GPU image and one for what builds the program: every package,
# with the hashes of its wheels.
# `make locks` calls this after pyproject.toml or constraints.txt has changed.
#
#   UV=uv                  the command to call
#   TORCH_INDEX=URL        a package index with a torch for CPUs, which is locked instead of the one with CUDA
set -euo pipefail
cd "$(dirname "$0")/../.."

# This machine's settings, such as other indexes, don't count.
unset UV_INDEX UV_DEFAULT_INDEX UV_EXTRA_INDEX_URL UV_INDEX_URL UV_FIND_LINKS UV_CONSTRAINT

# lock NAME [OPTION...] compiles pyproject.toml, or what `-` reads.
lock() {
    local file=deploy/requirements/$1.txt
    shift
    "${UV:-uv}" pip compile --quiet --no-config --universal --python-version 3.11 \
        --only-binary :all: --constraints constraints.txt --generate-hashes --no-annotate --no-header --output-file "$file" "$@"
    echo "$file"
}

project() { python3 -c "import tomllib; file = tomllib.load(open('pyproject.toml', 'rb')); print(*$1)"; }

project "file['build-system']['requires']" | tr ' ' '\n' | lock build -

# The files of several extras are installed together, so they must agree. They do, as constraints.txt has all that they share.
# What the extras of the GPU image share, CUDA, is not there, so that image has one file for all.
cpu=()
if [ -n "${TORCH_INDEX:-}" ]; then cpu=(--index "$TORCH_INDEX" --index-strategy unsafe-best-match --upgrade-package torch); fi
others="{'demo', 'dev', 'docs', 'metrics', 'release', 'rembg-gpu'}"
for extra in $(project "sorted(file['project']['optional-dependencies'].keys() - $others)"); do
    lock "$extra" --extra "$extra" "${cpu[@]}" pyproject.toml
done
lock gpu --extra formats --extra rembg-gpu --extra lama --extra diffusion pyproject.toml
