from __future__ import annotations

import hashlib
import json
import sys
import tomllib
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from importlib.metadata import EntryPoint
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file

from imagemill.producer.lazy_commands import SHORT_HELP, Commands
from imagemill.worker.models import added
from imagemill.worker.models import commands as module
from imagemill.worker.models.added import TITLES, Added, AddedFile
from imagemill.worker.models.catalogue import WEIGHTS, Weights, repository
from imagemill.worker.models.files import variant
from imagemill.worker.models.repositories import is_here, models_here
from tests.generators import lama_checkpoint, lama_file, lama_script, lama_weights
from tests.hub import COMMIT, Hub
from tests.models import birefnet_like_onnx, u2net_onnx
from tests.services.images import ImageServer, redirect
from tests.special_models import sam_onnx
from tests.workers import ROOT

Run = Callable[..., Result]


@pytest.fixture(scope="module")
def model_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Small files of three of rembg's models and of LaMa, by name."""
    folder = tmp_path_factory.mktemp("published")
    sam_onnx(folder / "sam.encoder.onnx", folder / "sam.decoder.onnx")
    paths = {
        "u2net": u2net_onnx(folder / "u2net.onnx", size=32),
        "birefnet-general": birefnet_like_onnx(folder / "birefnet.onnx", size=64),
        **{file.name.removesuffix(".onnx"): file for file in (folder / "sam.encoder.onnx", folder / "sam.decoder.onnx")},
        "bria-rmbg": u2net_onnx(folder / "bria.onnx", size=32, seed=1),
        "lama": lama_script(folder / "big-lama.pt"),
    }
    return {name: path.read_bytes() for name, path in paths.items()}


@pytest.fixture
def published(
    model_files: dict[str, bytes], tmp_path: Path, images: ImageServer, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Weights]:
    """Serves `model_files` from a mirror like the real server, with an empty weights folder; their entries by name."""
    rows = []
    for row in (row for row in WEIGHTS if row.name in model_files):
        data = model_files[row.name]
        path = row.url.removeprefix("https://github.com")
        images.routes |= {path: redirect(f"/assets/{row.name}"), f"/assets/{row.name}": data}
        kind = row.checksum.partition(":")[0]
        checksum = f"{kind}:{hashlib.new(kind, data, usedforsecurity=False).hexdigest()}"
        rows.append(Weights(**{**vars(row), "checksum": checksum, "about_bytes": len(data)}))
    monkeypatch.setattr(module, "WEIGHTS", tuple(rows))
    monkeypatch.setenv("IMAGEMILL_WEIGHTS__FOLDER", str(tmp_path / "weights"))
    monkeypatch.setenv("IMAGEMILL_WEIGHTS__MIRROR", images.url(""))
    return {row.name: row for row in rows}


@pytest.fixture
def run() -> Run:
    """Runs `imagemill models ...` with the exit codes of `imagemill`."""
    group = Commands("imagemill")
    group.add_command(module.models)
    return lambda *words: CliRunner().invoke(group, ["models", *words])


def listed(run: Run) -> dict[str, dict[str, object]]:
    return {row["name"]: row for row in map(json.loads, run("list", "--json").stdout.splitlines())}


def test_command_is_installed_and_has_short_help() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["imagemill.commands"]
    assert isinstance(EntryPoint("models", scripts["models"], "imagemill.commands").load(), click.Group)
    assert set(SHORT_HELP) == set(scripts)


def test_pulled_model_is_listed_and_verified(run: Run, published: dict[str, Weights], tmp_path: Path) -> None:
    assert {row["state"] for row in listed(run).values()} == {"missing"}
    assert "no models in" in run("verify").stdout
    done = run("pull", "u2net")
    assert done.exit_code == 0, done.output
    assert f"u2net: pulled, checksum correct: {tmp_path}/weights/rembg/u2net.onnx" in done.stdout
    rows = listed(run)
    assert (rows["u2net"]["state"], rows["u2net"]["bytes"]) == ("there", published["u2net"].about_bytes)
    assert rows["bria-rmbg"]["state"] == "missing"
    assert "u2net: correct (md5:" in run("verify").stdout
    assert "already there" in run("pull", "u2net").stdout


def test_list_shows_state_and_licence_of_every_model(run: Run, published: dict[str, Weights]) -> None:
    run("pull", "u2net")
    table = run("list").stdout
    for name, words in {"u2net": ["there", "Apache-2.0"], "bria-rmbg": ["missing", "non-commercial"]}.items():
        (line,) = [line for line in table.splitlines() if line.split()[:1] == [name]]
        assert all(word in line for word in words), line


def test_list_shows_kind_and_family_of_every_model(run: Run, published: dict[str, Weights], tmp_path: Path) -> None:
    folder = tmp_path / "weights" / "rembg"
    folder.mkdir(parents=True)
    (folder / "shop.onnx").write_bytes(b"onnx")
    file = AddedFile(path="rembg/shop.onnx", size=4, sha256="0" * 64)
    when = datetime(2026, 1, 1, tzinfo=UTC)
    shop = Added(name="shop", kind="matting", family="isnet", files=(file,), source="a.onnx", added=when)
    added.write(tmp_path / "weights", shop)
    wanted = {
        "u2net": ("matting", ""),
        "lama": ("inpainting", ""),
        "sdxl-vae": ("vae", "sdxl"),
        "controlnet-canny": ("controlnet", "sd15"),
        "sd15-safety-checker": ("checker", "sd15"),
        "shop": ("matting", "isnet"),
    }
    rows, table = listed(run), run("list").stdout
    assert {name: (rows[name]["kind"], rows[name]["family"]) for name in wanted} == wanted
    for name, (kind, family) in wanted.items():
        (line,) = [line for line in table.splitlines() if line.split()[:1] == [name]]
        assert f" {TITLES[kind]} " in line
        assert not family or f" {family} " in line


def test_pull_of_an_engine_skips_non_commercial_models(run: Run, published: dict[str, Weights]) -> None:
    assert run("pull", "--engine", "rembg", "--accept-licence").exit_code == 0
    assert {name for name, row in listed(run).items() if row["state"] == "there"} == published.keys() - {"bria-rmbg", "lama"}


def test_model_of_two_files_is_pulled_by_its_own_name(run: Run, published: dict[str, Weights]) -> None:
    result = run("pull", "sam")
    assert result.exit_code == 0, result.output
    assert [line.partition(":")[0] for line in result.stdout.splitlines()] == ["sam.encoder", "sam.decoder"]
    assert "batch axis" not in result.output
    rows = listed(run)
    assert [rows[name]["state"] for name in ("sam.encoder", "sam.decoder")] == ["there"] * 2
    assert models_here(Path(rows["sam.encoder"]["path"]).parent.parent, "rembg") == ["sam"]


def test_non_commercial_model_is_pulled_by_name_after_accepting_its_licence(run: Run, published: dict[str, Weights]) -> None:
    refused = run("pull", "bria-rmbg")
    assert (refused.exit_code, "--accept-licence" in refused.stderr) == (2, True)
    assert listed(run)["bria-rmbg"]["state"] == "missing"
    folder = Path(listed(run)["bria-rmbg"]["path"]).parent.parent
    assert not is_here(folder, "bria-rmbg")
    assert run("pull", "bria-rmbg", "--accept-licence").exit_code == 0
    assert listed(run)["bria-rmbg"]["state"] == "there"
    assert models_here(folder, "rembg") == ["bria-rmbg"]


def test_pull_frees_a_fixed_batch_axis_and_reports_it_once(run: Run, published: dict[str, Weights]) -> None:
    first = run("pull", "birefnet-general", "u2net")
    assert first.stdout.count("batch axis was fixed at 1; made a variant that takes batches") == 1
    assert listed(run)["birefnet-general"]["also"] == ["dynamic"]
    assert listed(run)["u2net"]["also"] == []
    assert "batch axis" not in run("pull", "birefnet-general").stdout
    assert "birefnet-general.dynamic.onnx: correct" in run("verify").stdout


def test_killed_trial_of_the_batch_axis_is_reported_and_repeated(
    run: Run, published: dict[str, Weights], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("imagemill.worker.models.trials.tried", lambda *_: "killed")
        assert "the trial was killed" in run("pull", "birefnet-general").stdout
    assert "made a variant that takes batches" in run("pull", "birefnet-general").stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["u2nett"], "there is no model 'u2nett'; did you mean 'u2net'?"),
        ([], "name a model"),
        (["--engine", "opencv"], "'opencv' is not"),
    ],
)
def test_pull_of_an_unknown_model_is_a_usage_error(
    run: Run, published: dict[str, Weights], words: list[str], message: str
) -> None:
    done = run("pull", *words)
    assert (done.exit_code, message in done.stderr) == (2, True), done.output


def test_pull_refuses_a_file_with_a_wrong_checksum(run: Run, published: dict[str, Weights], images: ImageServer) -> None:
    images.routes["/assets/u2net"] = b"something else"
    done = run("pull", "u2net")
    assert done.exit_code == 2
    assert "is not the published file and was deleted" in done.stderr
    assert listed(run)["u2net"]["state"] == "missing"


def test_verify_reports_a_damaged_file_and_how_to_fix_it(run: Run, published: dict[str, Weights], tmp_path: Path) -> None:
    run("pull", "u2net", "birefnet-general")
    original = tmp_path / "weights" / "rembg" / "u2net.onnx"
    original.write_bytes(original.read_bytes()[:-1])
    assert listed(run)["u2net"]["state"] == "unchecked"
    done = run("verify")
    assert done.exit_code == 1
    assert f"{original} is not the published file" in done.stderr
    assert done.stderr.rstrip().endswith("imagemill models pull u2net")
    assert "birefnet-general: correct" in done.stdout
    assert listed(run)["u2net"]["state"] == "damaged"
    assert run("pull", "u2net").exit_code == 0
    assert run("verify").exit_code == 0


def test_verify_checks_variants_too(run: Run, published: dict[str, Weights], tmp_path: Path) -> None:
    run("pull", "birefnet-general")
    original = tmp_path / "weights" / "rembg" / "birefnet-general.onnx"
    file = variant(original, "dynamic")
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    done = run("verify", "birefnet-general")
    assert (done.exit_code, "has changed since it was made" in done.stderr) == (1, True)
    file.write_bytes(content)
    assert run("verify").exit_code == 0
    original.write_bytes(b"other")
    assert "was made from another birefnet-general.onnx" in run("verify").stderr


def test_verify_of_a_missing_model_fails(run: Run, published: dict[str, Weights]) -> None:
    done = run("verify", "u2net")
    assert (done.exit_code, "u2net is missing: imagemill models pull u2net" in done.stderr) == (1, True)


def test_pull_succeeds_without_onnx(run: Run, published: dict[str, Weights], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    done = run("pull", "birefnet-general")
    assert (done.exit_code, "pip install 'imagemill[rembg]'" in done.stderr) == (0, True)
    assert listed(run)["birefnet-general"]["state"] == "there"


# --- LaMa, which is converted -----------------------------------------------------------------------------------------


def files(folder: Path) -> set[str]:
    """The visible files in LaMa's folder, except remembered checksums."""
    return {path.name for path in (folder / "weights" / "lama").iterdir() if not path.name.startswith(".")} - {
        f"{name}.sums.json" for name in ("lama.pt", "lama.safetensors")
    }


def test_lama_is_pulled_and_converted_once(run: Run, published: dict[str, Weights], tmp_path: Path) -> None:
    done = run("pull", "lama")
    loaded = tmp_path / "weights" / "lama" / "lama.safetensors"
    assert done.exit_code == 0, done.output
    assert f"lama: pulled, checksum correct: {tmp_path}/weights/lama/lama.pt" in done.stdout
    assert f"million parameters): {loaded}" in done.stdout
    assert load_file(loaded).keys() == lama_weights().keys()
    assert files(tmp_path) == {"lama.pt", "lama.safetensors", "lama.safetensors.made.json"}
    row = listed(run)["lama"]
    assert (row["state"], row["path"], row["bytes"]) == ("there", str(loaded), loaded.stat().st_size)
    again = run("pull", "--engine", "lama")
    assert "already there" in again.stdout
    assert "converted" not in again.stdout
    verified = run("verify")
    assert verified.exit_code == 0
    assert "lama: correct (md5:" in verified.stdout
    assert "lama.safetensors: correct (sha256:" in verified.stdout


def test_lama_is_converted_again_if_the_converted_file_is_missing(
    run: Run, published: dict[str, Weights], images: ImageServer, tmp_path: Path
) -> None:
    run("pull", "lama")
    loaded = tmp_path / "weights" / "lama" / "lama.safetensors"
    loaded.unlink()
    assert listed(run)["lama"]["state"] == "unconverted"
    images.routes.clear()
    assert "lama: converted lama.pt" in run("pull", "lama").stdout
    assert listed(run)["lama"]["state"] == "there"
    loaded.write_bytes(loaded.read_bytes()[:-1])
    done = run("verify", "lama")
    assert (done.exit_code, "has changed since it was made" in done.stderr) == (1, True)


@pytest.mark.parametrize("write", [lama_checkpoint, lama_script, lama_file])
def test_lama_can_be_converted_from_the_users_file(
    write: Callable[..., Path], run: Run, published: dict[str, Weights], images: ImageServer, tmp_path: Path
) -> None:
    run("pull", "lama")
    images.routes.clear()
    own = write(tmp_path / "own" / "best.ckpt", seed=7)
    done = run("pull", "lama", "--from", str(own))
    assert (done.exit_code, "lama: converted best.ckpt" in done.stdout) == (0, True), done.output
    made = load_file(tmp_path / "weights" / "lama" / "lama.safetensors")
    assert all(torch.equal(made[name], tensor) for name, tensor in lama_weights(seed=7).items())
    assert own.is_file()
    assert files(tmp_path) == {"lama.safetensors", "lama.safetensors.made.json"}
    assert listed(run)["lama"]["state"] == "unchecked"
    verified = run("verify")
    assert (verified.exit_code, "lama.safetensors: correct" in verified.stdout) == (0, True), verified.output


def test_safetensors_file_from_elsewhere_is_unchecked(run: Run, published: dict[str, Weights], tmp_path: Path) -> None:
    path = lama_file(tmp_path / "weights" / "lama" / "lama.safetensors")
    assert listed(run)["lama"]["state"] == "unchecked"
    verified = run("verify")
    assert (verified.exit_code, "not made by imagemill" in verified.stdout) == (0, True), verified.output
    assert path.is_file()


@pytest.mark.parametrize("words", [["u2net"], ["lama", "u2net"], [], ["lama", "--engine", "lama"]])
def test_only_lama_is_converted_from_a_file(words: list[str], run: Run, published: dict[str, Weights], tmp_path: Path) -> None:
    own = lama_file(tmp_path / "own.safetensors")
    done = run("pull", *words, "--from", str(own))
    assert (done.exit_code, "needs exactly one model that is converted (lama)" in done.stderr) == (2, True), done.output


def test_failed_conversion_keeps_the_present_model(run: Run, published: dict[str, Weights], tmp_path: Path) -> None:
    run("pull", "lama")
    (tmp_path / "own").write_bytes(b"something else")
    done = run("pull", "lama", "--from", str(tmp_path / "own"))
    assert (done.exit_code, "no LaMa weights" in done.stderr) == (2, True), done.output
    assert run("verify", "lama").exit_code == 0
    assert listed(run)["lama"]["state"] == "there"


def test_pull_of_lama_without_torch_prints_the_install_command(
    run: Run, published: dict[str, Weights], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.delitem(sys.modules, "imagemill.worker.models.conversion", raising=False)
        patched.setitem(sys.modules, "torch", None)
        done = run("pull", "lama")
    assert (done.exit_code, "torch, which is not installed: pip install 'imagemill[lama]'" in done.stderr) == (2, True), (
        done.output
    )
    assert listed(run)["lama"]["state"] == "unconverted"
    assert run("pull", "lama").exit_code == 0
    assert listed(run)["lama"]["state"] == "there"


def test_lama_cannot_be_quantised(run: Run, published: dict[str, Weights], tmp_path: Path) -> None:
    done = run("quantize", "lama", "--images", str(tmp_path))
    assert (done.exit_code, "can't be quantised" in done.stderr) == (2, True), done.output


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The LCM LoRA's repository on a fake hub as the mirror, and an empty weights folder."""
    with Hub(
        repository("lcm-lora-sdv1-5").source, {"pytorch_lora_weights.safetensors": b"an adapter", "a.bin": b"no"}
    ) as server:
        monkeypatch.setenv("IMAGEMILL_WEIGHTS__FOLDER", str(tmp_path / "weights"))
        monkeypatch.setenv("IMAGEMILL_WEIGHTS__MIRROR", server.url)
        yield server


def test_model_from_the_hub_is_pulled_listed_and_verified(run: Run, hub: Hub, tmp_path: Path) -> None:
    name = "lcm-lora-sdv1-5"
    refused = run("pull", name)
    assert refused.exit_code == 2  # the fake hub does not have the pinned commit
    assert "the hub has no latent-consistency/lcm-lora-sdv1-5 at cf2fced5" in refused.stderr
    done = run("pull", name, "--revision", "main")
    folder = tmp_path / "weights" / "diffusion" / name
    assert f"{name}: pulled, commit {COMMIT}, checksums correct: {folder}" in done.stdout, done.output
    row = listed(run)[name]
    assert (row["state"], row["licence"]) == ("there", "OpenRAIL++")
    assert f"{name}: correct (commit {COMMIT})" in run("verify").stdout
    (folder / "pytorch_lora_weights.safetensors").write_bytes(b"an adaptor")
    wrong = run("verify")
    assert wrong.exit_code == 1
    assert "has changed since it was pulled: its SHA-256 is" in wrong.stderr
    assert f"imagemill models pull {name}" in wrong.stderr


def test_model_of_two_repositories_has_one_name(run: Run, hub: Hub) -> None:
    done = run("pull", "sd15-canny")
    assert done.exit_code == 2
    assert "the hub has no stable-diffusion-v1-5/stable-diffusion-v1-5 at 451f4fe1" in done.stderr
    assert run("pull", "sd15-cannyy").stderr.count("did you mean 'sd15-canny'") == 1


@pytest.mark.parametrize("words", [["u2net"], ["sd15-canny"], []])
def test_revision_needs_exactly_one_repository(run: Run, words: list[str]) -> None:
    done = run("pull", *words, "--revision", "main")
    assert (done.exit_code, "--revision needs exactly one" in done.stderr) == (2, True)


def test_model_from_the_hub_cannot_be_quantised(run: Run, tmp_path: Path) -> None:
    done = run("quantize", "sd15", "--images", str(tmp_path))
    assert (done.exit_code, "can't be quantised" in done.stderr) == (2, True)
