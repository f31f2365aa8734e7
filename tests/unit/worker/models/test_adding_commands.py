"""`imagemill models add`, and how the other commands know what was added."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from imagemill.producer.lazy_commands import Commands
from imagemill.shared.engines import parse_options
from imagemill.shared.messages import Item
from imagemill.worker.hardware.device import Device
from imagemill.worker.imaging.picture import Picture
from imagemill.worker.models import added
from imagemill.worker.models.commands import models
from imagemill.worker.operations.base import Inputs
from imagemill.worker.operations.remove_background.rembg import Rembg
from tests.models import in_half_precision, u2net_onnx
from tests.networks import NO_MODELS, network
from tests.unit.worker.models.test_added import record
from tests.unit.worker.operations.conformance import scene

Run = Callable[..., Result]


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("IMAGEMILL_WEIGHTS__FOLDER", str(tmp_path / "weights"))
    return tmp_path / "weights"


@pytest.fixture
def run(weights: Path) -> Run:
    """Runs `imagemill models ...` with the exit codes of `imagemill`."""
    group = Commands("imagemill")
    group.add_command(models)
    return lambda *words: CliRunner().invoke(group, ["models", *map(str, words)])


def contents(weights: Path) -> set[str]:
    """All files in the weights folder, without remembered checksums."""
    files = {str(path.relative_to(weights)) for path in weights.rglob("*") if path.is_file()}
    return {name for name in files if not name.endswith(".sums.json")}


def listed(run: Run) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in map(json.loads, run("list", "--json").stdout.splitlines())}


def refused(run: Run, *words: Any, reason: str, status: int = 2) -> None:
    done = run(*words)
    assert (done.exit_code, reason in done.stderr) == (status, True), done.output


def test_onnx_file_is_added_used_verified_and_removed(run: Run, weights: Path, tmp_path: Path) -> None:
    source = network(tmp_path / "cutout.onnx", weight=3.0)
    done = run("add", "shop-v1.2", source, "--family", "isnet")
    assert done.exit_code == 0, done.output
    assert "shop-v1.2: family: isnet (as you said)" in done.stdout
    assert f"shop-v1.2: added: {weights}/rembg/shop-v1.2.onnx" in done.stdout
    assert "use it with: --operation remove-background --engine rembg --set model=shop-v1.2" in done.stdout
    assert "the batch axis was fixed at 1; made a variant that takes batches" in done.stdout
    assert contents(weights) == {
        *("added/shop-v1.2.json", "rembg/shop-v1.2.onnx"),
        *("rembg/shop-v1.2.dynamic.onnx", "rembg/shop-v1.2.dynamic.onnx.made.json", "rembg/shop-v1.2.fp32.onnx.made.json"),
    }
    row = listed(run)["shop-v1.2"]
    assert (row["engine"], row["state"], row["source"], row["also"]) == ("rembg", "there", str(source), ["dynamic"])
    verified = run("verify")
    assert (verified.exit_code, "shop-v1.2: correct" in verified.stdout) == (0, True), verified.output

    operation, pixels = Rembg(), scene(40, 60)
    operation.load(Device(threads=1, weights=weights))
    options = parse_options("remove-background", "rembg", {"model": "shop-v1.2"})
    work = operation.prepare(Picture(pixels), Inputs(Item(index=0, source="https://a.example/1.png"), options))
    assert np.ptp(operation.finish(work, operation.run(work.samples)).pixels[..., 3]) == 255

    again = run("add", "shop-v1.2", source)
    assert (again.exit_code, again.stdout) == (0, f"shop-v1.2: already there: {weights}/rembg/shop-v1.2.onnx\n"), again.output
    removed = run("remove", "shop-v1.2")
    assert (removed.exit_code, "shop-v1.2: removed" in removed.stdout) == (0, True), removed.output
    assert contents(weights) == set()
    refused(run, "remove", "shop-v1.2", reason="there is no model 'shop-v1.2'")


@pytest.mark.parametrize("keep_io", [True, False], ids=["weights", "input too"])
def test_file_in_half_precision_is_added_and_used(run: Run, weights: Path, tmp_path: Path, keep_io: bool) -> None:
    full = u2net_onnx(tmp_path / "full.onnx", size=64)
    done = run("add", "half", in_half_precision(full, tmp_path / "half.onnx", keep_io=keep_io), "--family", "u2net")
    assert done.exit_code == 0, done.output
    operation = Rembg()
    operation.load(Device(threads=1, weights=weights))
    options = parse_options("remove-background", "rembg", {"model": "half"})
    work = operation.prepare(Picture(scene(40, 60)), Inputs(Item(index=0, source="https://a.example/1.png"), options))
    assert operation.finish(work, operation.run(work.samples)).pixels.shape == (40, 60, 4)


def test_another_file_with_the_same_name_needs_replace(run: Run, weights: Path, tmp_path: Path) -> None:
    first, second = network(tmp_path / "1.onnx", outputs="abcdefg"), network(tmp_path / "2.onnx", weight=2.0, outputs="abcdef")
    assert run("add", "shop", first).exit_code == 0
    before = added.find(weights, "shop")
    refused(run, "add", "shop", second, reason=f"from {first}: choose another name, or add --replace")
    refused(run, "add", "shop", first, "--mean", "0.5", reason="or add --replace")
    assert added.find(weights, "shop") == before
    done = run("add", "shop", second, "--replace")
    assert (done.exit_code, "shop: replaced" in done.stdout) == (0, True), done.output
    after = added.find(weights, "shop")
    assert before is not None
    assert after is not None
    assert (before.family, after.family) == ("u2net", "isnet")
    assert before.files[0].sha256 != after.files[0].sha256
    assert run("verify").exit_code == 0


@pytest.mark.parametrize("what", NO_MODELS)
@pytest.mark.parametrize("name", ["model.onnx", "model.safetensors"])
def test_file_that_is_not_a_model_is_refused_and_leaves_nothing(
    what: str, name: str, run: Run, weights: Path, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(NO_MODELS[what])
    refused(run, "add", "shop", tmp_path / name, reason=f"{tmp_path / name} {what}")
    assert not weights.exists()


def test_pointer_to_a_file_in_git_lfs_is_seen_wherever_weights_are(run: Run, weights: Path, tmp_path: Path) -> None:
    pointer = NO_MODELS["is a Git LFS pointer"]
    path = network(tmp_path / "net" / "a.onnx", outside="a.onnx.data")
    (path.parent / "a.onnx.data").write_bytes(pointer)
    refused(run, "add", "shop", path, "--family", "isnet", reason="a.onnx.data is a Git LFS pointer and not the file itself")
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(pointer)
    refused(run, "add", "shop", tmp_path / "vae", reason="model.safetensors is a Git LFS pointer and not the file itself")
    (tmp_path / "net" / "config.txt").write_text("a folder with an ONNX file")
    refused(run, "add", "shop", tmp_path / "net", reason="or one of its files, such as a.onnx")
    assert contents(weights) == set()


def test_network_that_does_not_fit_is_refused_and_leaves_what_was_there(run: Run, weights: Path, tmp_path: Path) -> None:
    record(weights, "other")
    before = contents(weights)
    path = network(tmp_path / "grey.onnx", channels=2)
    refused(run, "add", "shop", path, "--family", "isnet", reason=f"{path} is not a model for remove-background: its output")
    assert contents(weights) == before
    assert {path.name for path in weights.iterdir()} == {"added", "rembg"}


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("u2net", "u2net is a model in imagemill's own catalogue"),
        ("sd15-canny", "is a model in imagemill's own catalogue"),
        ("a/b", "a name has 1 to 64 letters, digits and ._-"),
        ("../a", "a name has 1 to 64 letters, digits and ._-"),
        ("shop.dynamic", "is the name of files that imagemill makes itself"),
        ("shop.int8", "is the name of files that imagemill makes itself"),
        ("shop photo", "a name has 1 to 64 letters, digits and ._-"),
        ("a" * 65, "a name has 1 to 64 letters, digits and ._-"),
        ("", "a name has 1 to 64 letters, digits and ._-"),
        ("loras", "is the name of files that imagemill makes itself"),
    ],
)
def test_names_that_are_taken_or_do_not_fit_are_refused(
    name: str, reason: str, run: Run, weights: Path, tmp_path: Path
) -> None:
    refused(run, "add", name, network(tmp_path / "a.onnx"), reason=reason)
    assert not weights.exists()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--mean", "1,2"), "'1,2' is neither one number nor three, such as 0.5,0.5,0.5"),
        (("--mean", "nan"), "'nan' is neither one number nor three"),
        (("--deviation", "1,0,1"), "--deviation can't be 0"),
        (("--input-size", "15"), "is not in the range"),
    ],
)
def test_wrong_values_are_usage_errors(words: tuple[str, str], reason: str, run: Run, tmp_path: Path) -> None:
    refused(run, "add", "shop", network(tmp_path / "a.onnx"), *words, reason=reason)


def test_source_that_is_not_there_is_named(run: Run, tmp_path: Path) -> None:
    refused(run, "add", "shop", tmp_path / "none.onnx", reason=f"there is no file {tmp_path}/none.onnx")
    (tmp_path / "link").symlink_to(tmp_path / "gone.onnx")
    refused(
        run, "add", "shop", tmp_path / "link", reason=f"{tmp_path}/link is a link to {tmp_path}/gone.onnx, which is not there"
    )
    refused(run, "add", "shop", "https://models.example/a.onnx", reason="is a URL; expected a file or folder on this host")
    refused(run, "add", "shop", "s3://models/a.onnx", reason="is a URL; expected a file or folder on this host")
    refused(run, "add", "shop", tmp_path / ("a" * 300), reason="can't be read: ")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("model/a.onnx", b"onnx")
    refused(
        run, "add", "shop", tmp_path / "a.zip", reason="is a zip archive with model/a.onnx in it: unpack it first; expected"
    )
    os.mkfifo(tmp_path / "pipe")
    refused(run, "add", "shop", tmp_path / "pipe", reason="is not a regular file")


def test_verify_and_list_report_changed_missing_and_damaged_models(run: Run, weights: Path) -> None:
    made = record(weights, "shop")
    refused(run, "verify", "shop", reason="shop.onnx has changed since it was added: its SHA-256 is", status=1)
    (weights / made.files[0].path).write_bytes(b"longer than before")
    assert listed(run)["shop"]["state"] == "damaged"
    (weights / made.files[0].path).unlink()
    refused(run, "verify", reason="shop.onnx is missing: imagemill models add shop SOURCE --replace", status=1)
    assert listed(run)["shop"]["state"] == "missing"
    added.record_path(weights, "shop").write_text("{}")
    refused(run, "verify", reason="shop.json is damaged", status=1)
    shown = run("list")
    assert (shown.exit_code, "shop.json is damaged" in shown.stderr) == (0, True)
    assert run("remove", "shop").exit_code == 0
    assert run("verify").stdout.startswith("no models in")


def test_remove_deletes_pulled_files_and_nothing_at_a_wrong_name(run: Run, weights: Path) -> None:
    for name in ("u2net.onnx", "u2net.onnx.sums.json", "u2net.dynamic.onnx", "u2net.dynamic.onnx.made.json", "u2netp.onnx"):
        (weights / "rembg").mkdir(parents=True, exist_ok=True)
        (weights / "rembg" / name).write_bytes(b"model")
    folder = weights / "diffusion" / "controlnet-canny"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    refused(run, "remove", "u2net", "u3net", reason="there is no model 'u3net'")
    refused(run, "remove", "controlnet-canny", reason="was not written by `imagemill models pull`")
    assert (weights / "rembg" / "u2net.onnx").is_file()
    (folder / "imagemill.json").write_text("{}")
    done = run("remove", "u2net", "silueta", "controlnet-canny")
    assert "u2net: removed" in done.stdout
    assert "silueta is not there" in done.stdout
    assert contents(weights) == {"rembg/u2netp.onnx"}
    assert not folder.exists()
