#!/usr/bin/env bash
# Pulls the third-party images that docker-compose.yml names by tag, and writes each with its digest into .env.
# `make pin-images` calls this. Run it again to move to what the tags mean today.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -f .env ] || { echo "there is no .env: copy deploy/.env.example to .env and fill it in" >&2; exit 1; }

pinned=()
for variable in $(grep -oE '\{[A-Z]+_IMAGE:-[^}]+' docker-compose.yml | tr -d '{' | grep -v '^GPU_' | sort -u); do
    name=${variable%%:-*} image=${variable#*:-}
    docker pull --quiet "$image" >/dev/null
    digest=$(docker image inspect --format '{{join .RepoDigests "\n"}}' "$image" | grep -m 1 "^${image%:*}@sha256:") ||
        { echo "$image has no digest from a registry; .env is as it was" >&2; exit 1; }
    pinned+=("$name=$image@${digest#*@}")
done
for line in "${pinned[@]}"; do
    sed -i "/^${line%%=*}=/d" .env
    echo "$line" | tee -a .env
done
