#!/usr/bin/env bash
# Runs the compose files for GPUs on a machine without any.
#
#   deploy/try-compose.sh [IMAGES]      tests eight containers, then one container with eight nodes; 400 images per job
#   deploy/try-compose.sh start         starts eight containers, with Prometheus and Grafana, and leaves them running
#   deploy/try-compose.sh stop          removes everything
#
# The nodes run the opencv engines, and a stand-in for nvidia-smi lists the GPUs. Everything else is as in production, except
# for the reservation of devices, which needs NVIDIA's container toolkit. The project is called imagemill-try and has its own volumes;
# a test takes any free ports and removes everything. It needs Docker with compose, 4 GB of memory, and ten minutes.
#
#   COMPOSE="docker compose"      the command to call
#   BUILD=no                      use the images imagemill-worker and imagemill-tools as they are
set -euo pipefail
cd "$(dirname "$0")/.."

case ${1:-400} in
    start | stop) mode=$1 images=0 ;;
    *[!0-9]* | 0) sed -n '2,15s/^# \{0,1\}//p' "$0" && exit 2 ;;
    *) mode=test images=${1:-400} ;;
esac
read -ra compose_command <<<"${COMPOSE:-docker compose}"
folder=$(mktemp -d)
layout=()

compose() { "${compose_command[@]}" --project-name imagemill-try --project-directory . --env-file "$folder/env" "${layout[@]}" "$@"; }
say() { printf '\n=== %(%H:%M:%S)T %s\n' -1 "$*"; }
fail() { echo "FAILED: $*" >&2; exit 1; }

remove() { compose down --volumes --timeout 90 --remove-orphans; }
clean_up() {
    local status=$?
    if [ "$status" != 0 ]; then compose ps; compose logs --tail 15; fi
    [ "$mode" = start ] || remove
    rm -r "$folder"
    exit "$status"
} >&2

# Wait up to $1 seconds until the rest of the arguments succeed.
await() {
    local end=$((SECONDS + $1)) && shift
    until "$@"; do
        [ "$SECONDS" -lt "$end" ] || fail "waited in vain for: $*"
        sleep 1
    done
}

without_devices() { sed '/^    deploy: {resources/d' "$1" >"$folder/$(basename "$1")"; }

# imagemill's command line, in a container that runs anyway and that nothing below stops.
imagemill() { compose exec -T flower imagemill "$@"; }

# The names of all live nodes, with `!` where one isn't ready.
nodes() {
    compose exec -T flower sh -c 'imagemill fleet --json | python -c "$0"' \
        'import json, sys; print(*(node["node"] + "!" * (not node["ready"]) for node in json.load(sys.stdin)))' 2>/dev/null
}
eight="gpu0@server gpu1@server gpu2@server gpu3@server gpu4@server gpu5@server gpu6@server gpu7@server"
eight_are_ready() { [ "$(nodes)" = "$eight" ]; }
all_are_healthy() {
    local service
    for service in "$@"; do
        [ "$(docker inspect --format '{{.State.Health.Status}}' "$(compose ps -q "$service")")" = healthy ] || return 1
    done
}

# Noise, so that no image is like another.
upload_photos() {
    compose run --rm -T --no-deps --entrypoint python gpus - "$1" <<'END'
import sys
import cv2, numpy
from imagemill.shared.s3 import make_client
from imagemill.shared.settings import load_settings

s3, random = make_client(load_settings().s3), numpy.random.default_rng(1)
for number in range(int(sys.argv[1])):
    small = random.integers(0, 255, (16, 16, 3), dtype=numpy.uint8)
    image = cv2.resize(small, (512, 512), interpolation=cv2.INTER_CUBIC)
    s3.put_object(Bucket="results", Key=f"photos/{number:05}.jpg", Body=cv2.imencode(".jpg", image)[1].tobytes())
END
}
submit() { compose run --rm -T imagemill submit s3://results/photos/ --operation stylize --name "$1" --output "s3://results/$1" >/dev/null; }
# One figure of a job, such as `done`.
figure() {
    compose exec -T flower sh -c 'imagemill status "$1" --json | python -c "$0" "$2"' \
        'import json, sys; print(json.load(sys.stdin)[sys.argv[1]])' "$1" "$2"
}
has_begun() { [ "$(figure "$1" done)" -gt 0 ]; }
is_over() { [ "$(figure "$1" state)" = done ]; }
check_job() {
    await 600 is_over "$1"
    [ "$(figure "$1" done)" = "$images" ] && [ "$(figure "$1" failed)" = 0 ] || fail "$1: $(imagemill status "$1")"
    [ "$(imagemill results "$1" --format csv | grep -c "s3://results/$1/")" = "$images" ] || fail "$1: not every image has a result"
    echo "$1: $images images done, none failed"
}

# SIGKILL to every process of a container, except its init, which exits with the node; Docker then starts it again.
kill_processes() { compose exec -T "$1" python -c 'import os; os.kill(-1, 9)' || true; }

trap clean_up EXIT
for name in REDIS_PASSWORD MINIO_ROOT_PASSWORD AWS_SECRET_ACCESS_KEY FLOWER_PASSWORD GRAFANA_PASSWORD; do
    echo "$name=$(od -An -tx1 -N24 /dev/urandom | tr -d ' \n')"
done >"$folder/env"
cat >>"$folder/env" <<END
MINIO_ROOT_USER=administrator
AWS_ACCESS_KEY_ID=${AWS_ACCESS_KEY_ID:-imagemill}
GPU_CPUS=0
GPUS_CPUS=0
GPU_IMAGE=imagemill-worker
GPU_ENGINES=["opencv"]
END
if [ "$mode" = test ]; then printf '%s_PORT=0\n' REDIS S3 S3_CONSOLE FLOWER >>"$folder/env"; fi
without_devices docker-compose.yml
without_devices deploy/compose.8gpu.yml
base=(-f "$folder/docker-compose.yml")
containers=("${base[@]}" -f "$folder/compose.8gpu.yml" -f deploy/try/8gpu.yml --profile gpu)
layout=("${containers[@]}" --profile watch)
if [ "$mode" = stop ]; then exit; fi

if [ "${BUILD:-}" != no ]; then
    say "builds the images"
    compose build worker flower
fi
if [ "$mode" = start ]; then
    compose up -d
    await 300 eight_are_ready
    imagemill fleet
    upload_photos 40
    grep -E 'PASSWORD|AWS_' "$folder/env"
    exit
fi

say "a container per GPU"
layout=("${containers[@]}")
compose up -d
await 300 eight_are_ready
await 300 all_are_healthy gpu0 gpu1 gpu2 gpu3 gpu4 gpu5 gpu6 gpu7
imagemill fleet
upload_photos "$images"

say "under load, gpu3 is recreated and gpu5 is killed"
submit containers
await 300 has_begun containers
before=$(compose ps -q gpu3)
compose up -d --no-deps --force-recreate gpu3
[ "$(compose ps -q gpu3)" != "$before" ] || fail "gpu3 is the same container as before"
kill_processes gpu5
is_over containers && fail "the job was too small: give more IMAGES"
await 300 eight_are_ready
check_job containers
imagemill fleet
await 300 all_are_healthy gpu0 gpu1 gpu2 gpu3 gpu4 gpu5 gpu6 gpu7
compose exec -T flower python - "$eight" <<'END'
import base64, json, os, sys, urllib.request

request = urllib.request.Request("http://127.0.0.1:5555/workers?json=1")
request.add_header("Authorization", "Basic " + base64.b64encode(os.environ["FLOWER_BASIC_AUTH"].encode()).decode())
names = {worker["hostname"] for worker in json.load(urllib.request.urlopen(request, timeout=30))["data"]}
assert names == set(sys.argv[1].split()), f"Flower shows {names}"
print("Flower shows", *sorted(names))
END

say "stops all eight"
compose stop gpu0 gpu1 gpu2 gpu3 gpu4 gpu5 gpu6 gpu7
compose rm -f gpu0 gpu1 gpu2 gpu3 gpu4 gpu5 gpu6 gpu7

say "one container with a node per GPU"
layout=("${base[@]}" -f deploy/try/gpus.yml --profile gpu)
compose up -d
await 300 eight_are_ready
await 300 all_are_healthy gpus
imagemill fleet
submit one-container
await 300 has_begun one-container
kill_processes gpus
is_running() { [ "$(docker inspect --format '{{.State.Running}}' "$(compose ps -q gpus)")" = true ]; }
await 60 is_running
await 300 eight_are_ready
check_job one-container
await 300 all_are_healthy gpus

say "all is well"
