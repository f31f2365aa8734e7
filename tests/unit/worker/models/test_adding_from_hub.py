"""`imagemill models add` with the id of a repository on a hub."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from imagemill.worker.models import added
from imagemill.worker.models.catalogue import repository
from imagemill.worker.models.repositories import folder_of
from tests.hub import COMMIT, Hub
from tests.pipelines import pipeline_folder
from tests.unit.worker.models.test_adding_commands import Run, contents, refused, run, weights
from tests.unit.worker.models.test_adding_tensors import in_this_process, same, weights_of

__all__ = ["in_this_process", "run", "weights"]

SOURCE = "shop/photo-canny"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub(SOURCE, {}) as server:
        monkeypatch.setenv("IMAGEMILL_WEIGHTS__MIRROR", server.url)
        yield server


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pipeline_folder(tmp_path_factory.mktemp("published"), seed=5)


def put(hub: Hub, folder: Path) -> None:
    hub.files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_parts_and_checkpoints_are_added_at_the_commit_of_their_revision(
    hub: Hub, run: Run, weights: Path, published: Path
) -> None:
    base = folder_of(published, repository("sd15"))
    sources = {"unet": base, "vae": base / "vae", "controlnet": folder_of(published, repository("controlnet-canny"))}
    for part, folder in sources.items():
        put(hub, folder)
        asked = [f"{SOURCE}@main"] if part == "vae" else [SOURCE, "--revision", COMMIT]
        done = run("add", f"my-{part}", *asked)
        assert done.exit_code == 0, done.output
        record = added.find(weights, f"my-{part}")
        assert record is not None
        assert record.source == f"{SOURCE}@{COMMIT}"
        assert record.parameters == ({"control": "canny"} if part == "controlnet" else {})
        own = weights / "diffusion" / f"my-{part}" / ("unet" if part == "unet" else "")
        assert same(weights_of(own, part), weights_of(folder / ("unet" if part == "unet" else ""), part))
    assert not list(weights.rglob(".adding-*"))
    assert run("verify").exit_code == 0


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("shop/none",), "the hub has no shop/none at main"),
        ((SOURCE, "--revision", "v9"), f"the hub has no {SOURCE} at v9"),
        ((f"{SOURCE}@v9",), f"the hub has no {SOURCE} at v9"),
        ((f"{SOURCE}@main", "--revision", "v9"), "--revision can't be combined with the revision in"),
        ((SOURCE,), f"{SOURCE}: it has neither model_index.json nor config.json"),
    ],
)
def test_what_the_hub_does_not_have_is_named_and_nothing_is_left(
    words: tuple[str, ...], reason: str, hub: Hub, run: Run, weights: Path
) -> None:
    hub.files["README.json"] = b"{}"
    refused(run, "add", "mine", *words, reason=reason)
    assert not weights.exists() or contents(weights) == set()
