"""`imagemill models add` with the id of a repository on a hub."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load

from imagemill.worker.models import added
from imagemill.worker.models.catalogue import repository
from imagemill.worker.models.repositories import folder_of
from imagemill.worker.models.sources import OnHub, on_hub
from tests.hub import COMMIT, Hub
from tests.pipelines import diffusers, pipeline_folder
from tests.styles import loaded, styled
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
    ("source", "place"),
    [
        ("a/b", OnHub("a/b", None, None)),
        ("a/b@v1.0", OnHub("a/b", None, "v1.0")),
        ("a/b/c/d.safetensors", OnHub("a/b", "c/d.safetensors", None)),
        ("a/b/d.safetensors@refs/pr/1", OnHub("a/b", "d.safetensors", "refs/pr/1")),
        ("https://huggingface.co/a/b", OnHub("a/b", None, None)),
        ("https://huggingface.co/a/b/tree/main", OnHub("a/b", None, "main")),
        ("https://huggingface.co/a/b/blob/main/c/d.ckpt", OnHub("a/b", "c/d.ckpt", "main")),
        ("https://huggingface.co/a/b/resolve/v1/d%20e.ckpt?download=true", OnHub("a/b", "d e.ckpt", "v1")),
        ("a/d.safetensors", None),
        ("./a/b", None),
        ("/a/b", None),
        ("https://other.example/a/b", None),
    ],
)
def test_sources_on_the_hub_are_told_from_paths(source: str, place: OnHub | None) -> None:
    assert on_hub(source) == place


def test_one_file_of_a_repository_is_added(hub: Hub, run: Run, weights: Path, published: Path) -> None:
    folder = folder_of(published, repository("controlnet-canny"))
    hub.files = {"nets/canny.safetensors": (folder / "diffusion_pytorch_model.safetensors").read_bytes(), "README.md": b""}
    source = f"{SOURCE}/nets/canny.safetensors"
    refused(run, "add", "mine", source, reason="run `imagemill models pull sd15` first")
    assert any(request.startswith("GET") and request.endswith("canny.safetensors") for request in hub.requests)
    pipeline_folder(weights, "sd15", ())
    hub.requests.clear()
    done = run("add", "mine", source, "--revision", COMMIT)
    assert done.exit_code == 0, done.output
    assert not any(request.startswith("GET") and request.endswith("canny.safetensors") for request in hub.requests), "kept"
    record = added.find(weights, "mine")
    assert record is not None
    assert (record.source, record.parameters) == (f"{SOURCE}/nets/canny.safetensors@{COMMIT}", {"control": "canny"})
    assert same(weights_of(weights / "diffusion" / "mine", "controlnet"), weights_of(folder, "controlnet"))
    assert not list(weights.rglob(".*"))


def test_moved_branch_is_another_model(hub: Hub, run: Run, weights: Path, published: Path) -> None:
    put(hub, folder_of(published, repository("controlnet-canny")))
    assert run("add", "mine", SOURCE).exit_code == 0
    assert "mine: already there:" in run("add", "mine", SOURCE, "--revision", COMMIT).stdout
    hub.commit = "f" * 40
    refused(run, "add", "mine", SOURCE, reason=f"from {SOURCE}@{COMMIT}: choose another name, or add --replace")
    assert "mine: replaced:" in run("add", "mine", SOURCE, "--replace").stdout
    record = added.find(weights, "mine")
    assert record is not None
    assert record.source == f"{SOURCE}@{'f' * 40}"


def test_interrupted_download_goes_on_with_the_files_that_are_missing(
    hub: Hub, run: Run, weights: Path, published: Path
) -> None:
    put(hub, folder_of(published, repository("sd15")))
    unet = "unet/diffusion_pytorch_model.safetensors"
    hub.broken = {unet}
    refused(run, "add", "mine", SOURCE, reason=f"complete files are kept in {weights}/diffusion/.fetching-mine", status=3)
    assert added.find(weights, "mine") is None
    hub.broken, hub.requests = set(), []
    assert run("add", "mine", SOURCE).exit_code == 0
    got = {request.rpartition(f"/{COMMIT}/")[2] for request in hub.requests if request.startswith("GET") and COMMIT in request}
    assert {name for name in got if name.endswith(".safetensors")} == {unet}
    assert not list(weights.rglob(".*"))


def test_weights_in_half_precision_and_in_several_files_are_chosen(
    hub: Hub, run: Run, weights: Path, published: Path, tmp_path: Path
) -> None:
    folder = folder_of(published, repository("controlnet-canny"))
    put(hub, folder)
    shards = tmp_path / "shards"
    network = diffusers().ControlNetModel.from_pretrained(folder, torch_dtype=torch.float16)
    network.save_pretrained(shards, variant="fp16", max_shard_size="200KB")
    hub.files |= {path.name: path.read_bytes() for path in shards.iterdir()}
    hub.files["diffusion_pytorch_model.bin"] = b"a pickle"
    assert run("add", "mine", SOURCE).exit_code == 0
    taken = {Path(name).name for name in contents(weights) if name.startswith("diffusion/mine/")}
    assert taken == {"imagemill.json", *(path.name for path in shards.iterdir())}
    operation = loaded(pipeline_folder(weights, "sd15", ()))
    half = network.float().state_dict()
    styled(operation, model="sd15", control="mine")
    assert operation._pipeline.current is not None
    assert same(operation._pipeline.current.controlnets.networks[0].state_dict(), half)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("shop/none",), "the hub has no shop/none at main, or it is not public"),
        (("shop/none.safetensors",), "there is no file shop/none.safetensors"),
        ((f"{SOURCE}/none.safetensors",), f"{SOURCE} at main has no none.safetensors"),
        ((f"{SOURCE}/some.onnx",), f"{SOURCE}/some.onnx is not a file of tensors: download it and add the file"),
        ((f"{SOURCE}/some.ckpt",), f"{SOURCE}/some.ckpt is a pickle, which can contain code"),
        ((SOURCE, "--revision", "v9"), f"the hub has no {SOURCE} at v9"),
        ((f"{SOURCE}@v9",), f"the hub has no {SOURCE} at v9"),
        ((f"{SOURCE}@main", "--revision", "v9"), "--revision can't be combined with the revision in"),
        (
            (SOURCE,),
            f"{SOURCE}: it has neither model_index.json nor config.json; expected a folder in diffusers' layout, "
            "or one of its files, such as some.ckpt",
        ),
    ],
)
def test_what_the_hub_does_not_have_is_named_and_nothing_is_left(
    words: tuple[str, ...], reason: str, hub: Hub, run: Run, weights: Path
) -> None:
    hub.files |= {"README.json": b"{}", "some.onnx": b"\x08\x08ir", "some.ckpt": b"\x80\x02}q"}
    refused(run, "add", "mine", *words, reason=reason)
    assert not weights.exists() or contents(weights) == set()


def test_gated_repository_is_refused(hub: Hub, run: Run, weights: Path, published: Path) -> None:
    put(hub, folder_of(published, repository("controlnet-canny")))
    hub.gated = True
    refused(run, "add", "mine", SOURCE, reason=f"{SOURCE} at {COMMIT} is gated: its owners ask everybody to accept their terms")
    assert contents(weights) == set()


def test_pickled_weights_of_a_repository_are_read_as_data(hub: Hub, run: Run, weights: Path, published: Path) -> None:
    folder = folder_of(published, repository("sd15"))
    put(hub, folder)
    for part in ("vae/diffusion_pytorch_model", "text_encoder/model"):
        pickled = io.BytesIO()
        torch.save(load(hub.files.pop(f"{part}.safetensors")), pickled)
        hub.files[f"{part.replace('/model', '/pytorch_model')}.bin"] = pickled.getvalue()
    assert run("add", "mine", SOURCE).exit_code == 0
    taken = {name.removeprefix("diffusion/mine/") for name in contents(weights)}
    assert {"vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"} <= taken
    assert not any(name.endswith(".bin") for name in taken)
    assert same(weights_of(weights / "diffusion" / "mine" / "vae", "vae"), weights_of(folder / "vae", "vae"))
    old = {"config.json": b'{"_class_name": "AutoencoderKL"}', "diffusion_pytorch_model.bin": b"\x80\x02}q"}
    hub.files = old
    refused(run, "add", "old", SOURCE, reason=f"{SOURCE}: diffusion_pytorch_model.bin is a pickle, which can contain code")


def test_file_outside_of_the_repository_is_refused(hub: Hub, run: Run, weights: Path) -> None:
    hub.files = {"config.json": b"{}", "../config.json": b"{}"}
    refused(run, "add", "mine", SOURCE, reason=f"{SOURCE} has a file outside of its folder, '../config.json'")
