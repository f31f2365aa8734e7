"""Downloads with the real huggingface_hub over HTTP, from a fake hub."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from imagemill.shared.errors import ConfigurationError, ServiceUnavailable
from imagemill.shared.settings import WeightsSettings
from imagemill.worker.models import hugging_face as module
from imagemill.worker.models.catalogue import Repository, repository
from imagemill.worker.models.repositories import RECORD, digest_of, folder_of, state, verify
from tests.hub import COMMIT, Hub

FILES = {
    "config.json": b'{"_class_name": "ControlNetModel"}',
    "diffusion_pytorch_model.fp16.safetensors": b"weights in half precision",
    "diffusion_pytorch_model.safetensors": b"weights in full precision",
    "diffusion_pytorch_model.bin": b"a pickle",
    "README.md": b"about",
}
WANTED = {"config.json", "diffusion_pytorch_model.fp16.safetensors"}


@pytest.fixture
def entry() -> Repository:
    return Repository(**{**vars(repository("controlnet-canny")), "revision": COMMIT})


@pytest.fixture
def hub(entry: Repository) -> Iterator[Hub]:
    with Hub(entry.source, FILES) as server:
        yield server


@pytest.fixture
def settings(hub: Hub, tmp_path: Path) -> WeightsSettings:
    return WeightsSettings(folder=tmp_path, mirror=hub.url)


def test_pull_downloads_checks_and_records_only_the_files_to_load(
    entry: Repository, hub: Hub, settings: WeightsSettings, tmp_path: Path
) -> None:
    assert state(tmp_path, entry) == "missing"
    assert module.pull(entry, settings) == "pulled"
    folder = folder_of(tmp_path, entry)
    assert {path.name for path in folder.iterdir() if path.is_file()} == {*WANTED, RECORD}
    record = json.loads((folder / RECORD).read_text())
    assert record["commit"] == COMMIT
    assert {name: file["sha256"] for name, file in record["files"].items()} == {
        name: hashlib.sha256(FILES[name]).hexdigest() for name in WANTED
    }
    assert state(tmp_path, entry) == "there"
    assert list(verify(tmp_path, entry)) == [(True, f"controlnet-canny: correct (commit {COMMIT})")]
    requests = len(hub.requests)
    assert module.pull(entry, settings) == "present"
    assert len(hub.requests) == requests


def test_pull_resolves_a_branch_to_its_commit(entry: Repository, settings: WeightsSettings, tmp_path: Path) -> None:
    assert module.pull(entry, settings, "main") == "pulled"
    record = json.loads((folder_of(tmp_path, entry) / RECORD).read_text())
    assert (record["asked"], record["commit"]) == ("main", COMMIT)


@pytest.mark.parametrize("name", sorted(WANTED))
def test_file_with_a_wrong_checksum_is_deleted_and_the_folder_stays_incomplete(
    name: str, entry: Repository, hub: Hub, settings: WeightsSettings, tmp_path: Path
) -> None:
    hub.altered[name] = bytes(reversed(FILES[name]))
    with pytest.raises(ConfigurationError, match="does not match the hub's checksum"):
        module.pull(entry, settings)
    assert not (folder_of(tmp_path, entry) / name).exists()
    assert state(tmp_path, entry) != "there"


def test_verify_finds_changed_and_missing_files(entry: Repository, settings: WeightsSettings, tmp_path: Path) -> None:
    module.pull(entry, settings)
    before = digest_of(folder_of(tmp_path, entry))
    path = folder_of(tmp_path, entry) / "diffusion_pytorch_model.fp16.safetensors"
    path.write_bytes(bytes(reversed(path.read_bytes())))
    ((correct, finding),) = verify(tmp_path, entry)
    assert (correct, "has changed since it was pulled" in finding) == (False, True)
    path.unlink()
    ((correct, finding),) = verify(tmp_path, entry)
    assert (correct, "is missing" in finding) == (False, True)
    assert state(tmp_path, entry) == "missing"
    module.pull(entry, settings)
    assert all(correct for correct, _ in verify(tmp_path, entry))
    assert digest_of(folder_of(tmp_path, entry)) == before


def test_revision_or_file_that_the_hub_does_not_have_is_refused(entry: Repository, hub: Hub, settings: WeightsSettings) -> None:
    with pytest.raises(ConfigurationError, match="no-such-branch"):
        module.pull(entry, settings, "no-such-branch")
    del hub.files["diffusion_pytorch_model.fp16.safetensors"]
    with pytest.raises(ConfigurationError, match=r"has no diffusion_pytorch_model\.fp16\.safetensors"):
        module.pull(entry, settings)


def test_hub_that_does_not_answer_is_service_unavailable(entry: Repository, tmp_path: Path) -> None:
    with Hub(entry.source, FILES) as stopped:
        url = stopped.url
    with pytest.raises(ServiceUnavailable):
        module.pull(entry, WeightsSettings(folder=tmp_path, mirror=url))
