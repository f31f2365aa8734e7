"""The shell scripts in deploy/, with stand-ins for the programs that they call."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.workers import ROOT

MC = """#!/bin/sh
echo "$@" >>"$LOG"
case "$*" in
    "admin user add store") cat >>"$LOG" ;;
    "admin user info --json store app") echo "$INFO" ;;
esac
"""
DOCKER = """#!/bin/sh
[ "$1" = pull ] && exit
for image; do :; done
printf 'elsewhere/mirror@sha256:1\\n%s@sha256:%s\\n' "${image%:*}" "$DIGEST"
"""
WITHOUT = '{"status":"success","accessKey":"app","userStatus":"enabled"}'
WITH = '{"status":"success","accessKey":"app","policyName":"imagemill","userStatus":"enabled"}'


def run(folder: Path, program: str, text: str, script: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """A script with a stand-in for `program`."""
    stand_in = folder / "bin" / program
    stand_in.parent.mkdir(exist_ok=True)
    stand_in.write_text(text, encoding="utf-8")
    stand_in.chmod(0o755)
    environment = {
        "PATH": f"{stand_in.parent}:{os.environ['PATH']}",
        "TMPDIR": str(folder),
        "LOG": str(folder / "log"),
        **variables,
    }
    shell = ["bash" if script.read_text(encoding="utf-8").startswith("#!/usr/bin/env bash") else "sh"]
    return subprocess.run([*shell, str(script)], env=environment, capture_output=True, text=True, timeout=30, check=False)


# --- the bucket and its user ------------------------------------------------------------------------------------------


def set_up(folder: Path, info: str, root: str = "administrator") -> subprocess.CompletedProcess[str]:
    variables = {
        "MC_HOST_store": f"http://{root}:secret@minio:9000",
        "BUCKET": "photos",
        "ACCESS_KEY": "app",
        "SECRET_KEY": "key",
    }
    return run(folder, "mc", MC, ROOT / "deploy" / "minio" / "set-up.sh", INFO=info, **variables)


@pytest.mark.parametrize(("info", "attached"), [(WITHOUT, True), (WITH, False)], ids=["first time", "again"])
def test_bucket_and_user_are_made_with_the_policy_for_that_bucket(info: str, attached: bool, tmp_path: Path) -> None:
    done = set_up(tmp_path, info)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "log").read_text(encoding="utf-8").splitlines() == [
        "mb --ignore-existing store/photos",
        f"admin policy create store imagemill {tmp_path}/policy.json",
        "admin user add store",
        "app",
        "key",
        "admin user info --json store app",
        *(["admin policy attach store imagemill --user app"] if attached else []),
    ]
    policy = json.loads((tmp_path / "policy.json").read_text(encoding="utf-8"))
    places = [place for statement in policy["Statement"] for place in statement["Resource"]]
    assert places == ["arn:aws:s3:::photos", "arn:aws:s3:::photos/*"]


def test_user_must_not_be_the_administrator(tmp_path: Path) -> None:
    done = set_up(tmp_path, WITHOUT, root="app")
    assert done.returncode == 1
    assert "AWS_ACCESS_KEY_ID is MinIO's administrator" in done.stderr
    assert not (tmp_path / "log").exists()


# --- digests ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    (tmp_path / "deploy").mkdir()
    for name in ("docker-compose.yml", "deploy/pin-images.sh"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def pin(checkout: Path, digest: str) -> subprocess.CompletedProcess[str]:
    return run(checkout, "docker", DOCKER, checkout / "deploy" / "pin-images.sh", DIGEST=digest)


def test_images_are_pinned_in_env_and_pinned_again(checkout: Path) -> None:
    env = checkout / ".env"
    env.write_text("BUCKET=photos\n#REDIS_IMAGE=redis:7-alpine\n", encoding="utf-8")
    for digest in ("aaa", "bbb"):
        done = pin(checkout, digest)
        assert done.returncode == 0, done.stderr
        assert env.read_text(encoding="utf-8").splitlines() == [
            "BUCKET=photos",
            "#REDIS_IMAGE=redis:7-alpine",
            f"GRAFANA_IMAGE=grafana/grafana:12.1.1@sha256:{digest}",
            f"MC_IMAGE=minio/mc:RELEASE.2025-08-13T08-35-41Z@sha256:{digest}",
            f"MINIO_IMAGE=minio/minio:RELEASE.2025-09-07T16-13-09Z@sha256:{digest}",
            f"PROMETHEUS_IMAGE=prom/prometheus:v3.5.0@sha256:{digest}",
            f"PYTHON_IMAGE=python:3.11-slim@sha256:{digest}",
            f"REDIS_IMAGE=redis:7-alpine@sha256:{digest}",
        ]


def test_images_without_digests_change_nothing(checkout: Path) -> None:
    (checkout / ".env").write_text("BUCKET=photos\n", encoding="utf-8")
    done = run(checkout, "docker", "#!/bin/sh\n", checkout / "deploy" / "pin-images.sh")
    assert done.returncode == 1
    assert "has no digest from a registry" in done.stderr
    assert (checkout / ".env").read_text(encoding="utf-8") == "BUCKET=photos\n"
