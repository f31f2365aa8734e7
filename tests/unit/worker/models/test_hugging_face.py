"""Against a stand-in for the hub: huggingface_hub itself downloads, over HTTP."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from imagemill.shared.errors import ConfigurationError, ServiceUnavailable
from imagemill.shared.settings import WeightsSettings
from imagemill.worker.models import hugging_face as module
from imagemill.worker.models.catalogue import REPOSITORIES, Repository, repository
from imagemill.worker.models.repositories import RECORD, digest_of, faults, folder_of, state
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
def one() -> Repository:
    return Repository(**{**vars(repository("controlnet-canny")), "revision": COMMIT})


@pytest.fixture
def hub(one: Repository) -> Iterator[Hub]:
    with Hub(one.source, FILES) as server:
        yield server


@pytest.fixture
def settings(hub: Hub, tmp_path: Path) -> WeightsSettings:
    return WeightsSettings(folder=tmp_path, mirror=hub.url)


def test_what_is_loaded_is_pulled_checked_and_put_on_record_and_nothing_else(
    one: Repository, hub: Hub, settings: WeightsSettings, tmp_path: Path
) -> None:
    assert state(tmp_path, one) == "missing"
    assert module.pull(one, settings) == "pulled"
    folder = folder_of(tmp_path, one)
    assert {path.name for path in folder.iterdir() if path.is_file()} == {*WANTED, RECORD}
    record = json.loads((folder / RECORD).read_text())
    assert record["commit"] == COMMIT
    assert {name: told["sha256"] for name, told in record["files"].items()} == {
        name: hashlib.sha256(FILES[name]).hexdigest() for name in WANTED
    }
    assert state(tmp_path, one) == "there"
    assert list(faults(tmp_path, one)) == []
    asked = len(hub.asked)
    assert module.pull(one, settings) == "there"
    assert len(hub.asked) == asked, "what is there and pinned is not asked for again"


def test_a_branch_is_resolved_to_the_commit_that_it_is_now(one: Repository, settings: WeightsSettings, tmp_path: Path) -> None:
    assert module.pull(one, settings, "main") == "pulled"
    record = json.loads((folder_of(tmp_path, one) / RECORD).read_text())
    assert (record["asked"], record["commit"]) == ("main", COMMIT)


@pytest.mark.parametrize("name", sorted(WANTED))
def test_a_file_that_is_not_what_the_hub_says_is_removed_and_the_folder_is_no_model(
    name: str, one: Repository, hub: Hub, settings: WeightsSettings, tmp_path: Path
) -> None:
    hub.lies[name] = bytes(reversed(FILES[name]))
    with pytest.raises(ConfigurationError, match="is not the file that the hub says it is"):
        module.pull(one, settings)
    assert not (folder_of(tmp_path, one) / name).exists()
    assert state(tmp_path, one) != "there"


def test_verify_finds_a_file_that_has_changed_and_one_that_is_gone(
    one: Repository, settings: WeightsSettings, tmp_path: Path
) -> None:
    module.pull(one, settings)
    before = digest_of(folder_of(tmp_path, one))
    path = folder_of(tmp_path, one) / "diffusion_pytorch_model.fp16.safetensors"
    path.write_bytes(bytes(reversed(path.read_bytes())))
    (fault,) = faults(tmp_path, one)
    assert "is not the file that was pulled" in fault
    path.unlink()
    (fault,) = faults(tmp_path, one)
    assert "is missing" in fault
    assert state(tmp_path, one) == "missing"
    module.pull(one, settings)
    assert list(faults(tmp_path, one)) == []
    assert digest_of(folder_of(tmp_path, one)) == before


def test_a_revision_or_a_file_that_the_hub_does_not_have_is_refused(
    one: Repository, hub: Hub, settings: WeightsSettings
) -> None:
    with pytest.raises(ConfigurationError, match="no-such-branch"):
        module.pull(one, settings, "no-such-branch")
    del hub.files["diffusion_pytorch_model.fp16.safetensors"]
    with pytest.raises(ConfigurationError, match=r"has no diffusion_pytorch_model\.fp16\.safetensors"):
        module.pull(one, settings)


def test_a_hub_that_does_not_answer_is_an_unavailable_service(one: Repository, tmp_path: Path) -> None:
    with Hub(one.source, FILES) as gone:
        url = gone.url
    with pytest.raises(ServiceUnavailable):
        module.pull(one, WeightsSettings(folder=tmp_path, mirror=url))


def test_the_pinned_revisions_are_commits() -> None:
    assert all(re.fullmatch("[0-9a-f]{40}", one.revision) for one in REPOSITORIES)
