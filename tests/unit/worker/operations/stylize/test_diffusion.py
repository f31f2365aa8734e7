"""The engine on a small pipeline of real components: its options, sizes and precision, and the profile and format it keeps."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from imagemill.shared.engines import parse_options
from imagemill.shared.settings import WeightsSettings
from imagemill.worker.hardware.device import Device
from imagemill.worker.imaging.picture import Pixels
from imagemill.worker.models.catalogue import repository
from imagemill.worker.models.hugging_face import pull
from imagemill.worker.models.repositories import folder_of, is_here, state
from imagemill.worker.operations.stylize import pipeline as module
from imagemill.worker.operations.stylize.buckets import bucket
from imagemill.worker.operations.stylize.diffusion import Diffusion
from imagemill.worker.operations.stylize.palette import colours_of
from imagemill.worker.operations.stylize.pipeline import Styled
from tests.hub import COMMIT, Hub
from tests.pipelines import pipeline_folder
from tests.styles import PHOTO, QUICK, difference, loaded, prepared, styled
from tests.unit.worker.operations.conformance import REFERENCE, scene


def test_each_style_option_changes_the_image(operation: Diffusion) -> None:
    plain = styled(operation)
    for chosen in (
        *(
            {"prompt": "a blue hat"},
            {"prompt": "a (red:1.5) shoe"},
            {"negative_prompt": "a hat"},
            {"cfg": 3},
            {"steps": 3},
            {"strength": 0.9},
        ),
        *({"control_scale": 0}, {"control": "none"}, {"mode": "text-to-image"}, {"scheduler": "lcm"}, {"loras": "red:0.5"}),
    ):
        assert difference(plain, styled(operation, **chosen)) > 0.2, chosen
    assert np.array_equal(styled(operation), plain)


def test_canny_thresholds_change_the_image(operation: Diffusion) -> None:
    many, none = {"canny_low": 5, "canny_high": 10}, {"canny_low": 1000, "canny_high": 1000}
    assert set(np.unique(prepared(operation, **many).samples[0].data.controls[0])) == {0, 255}
    assert not prepared(operation, **none).samples[0].data.controls[0].any()
    assert difference(styled(operation, **many), styled(operation, **none)) > 0.2


@pytest.mark.parametrize("strength", [0.05, 0.35, 0.5, 0.51, 0.9, 1.0])
def test_number_of_steps_does_not_depend_on_strength(
    strength: float, operation: Diffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    styled(operation)
    calls: list[int] = []
    assert operation._pipeline.current is not None
    unet = operation._pipeline.current._text.unet
    handle = unet.register_forward_hook(lambda *_: calls.append(1))
    try:
        styled(operation, strength=strength, steps=7)
    finally:
        handle.remove()
    assert len(calls) == 7


def test_without_guidance_the_model_runs_once_and_ignores_the_negative_prompt(operation: Diffusion) -> None:
    styled(operation)
    assert operation._pipeline.current is not None
    sizes: list[int] = []
    handle = operation._pipeline.current._text.unet.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
    try:
        plain = styled(operation, cfg=1)
        styled(operation)
    finally:
        handle.remove()
    assert sizes == [1, 1, 2, 2]
    assert np.array_equal(styled(operation, cfg=1, negative_prompt="other"), plain)


def test_prompt_is_encoded_once_per_job(weights: Path) -> None:
    operation = loaded(weights)
    styled(operation)
    assert operation._pipeline.current is not None
    calls: list[int] = []
    handle = operation._pipeline.current._text.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    for _ in range(3):
        styled(operation)
    assert calls == []
    work = prepared(operation, prompt="shoe " * 100)
    for _ in range(2):
        operation.finish(work, operation.run(work.samples))
    assert work.notes == [], "nothing of a long prompt is cut"
    assert len(calls) == 2 * 6, "pieces of the prompt and the negative prompt"
    handle.remove()


def test_reference_sets_the_palette_of_all_results(operation: Diffusion) -> None:
    target = colours_of(scene(30, 30, seed=3))
    for seed in range(2):
        result = colours_of(styled(operation, scene(90, 120, seed=seed), reference=REFERENCE))
        assert np.allclose(result.mean, target.mean, atol=6)
    assert not np.allclose(colours_of(styled(operation)).mean, target.mean, atol=6)


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [({}, (120, 90)), ({"long_edge": 40}, (40, 30)), ({"crop": "1x1"}, (90, 90)), ({"crop": "1x2", "long_edge": 30}, (15, 30))],
)
def test_result_has_the_requested_size_or_the_source_size(
    chosen: dict[str, Any], expected: tuple[int, int], operation: Diffusion
) -> None:
    result = styled(operation, **chosen)
    assert result.shape == (expected[1], expected[0], 3)


def test_each_control_and_its_weight_changes_the_image(operation: Diffusion) -> None:
    chosen = ["canny", "canny:0.3", "tile", "canny;tile:0.4", "canny;tile:0.2", "tile:0.4;canny", "none"]
    results = [styled(operation, control=control) for control in chosen]
    for number, result in enumerate(results):
        for other in range(number):
            same = {chosen[number], chosen[other]} == {"canny;tile:0.4", "tile:0.4;canny"}
            assert same or difference(result, results[other]) > 0.05, (chosen[number], chosen[other])
    assert np.array_equal(styled(operation, control="canny:0.4"), styled(operation, control_scale=0.4))
    assert np.array_equal(styled(operation, control={"controlnet-canny": 0.8}), results[0]), "by its own name"


def test_own_control_image_replaces_the_first_picture_and_is_cropped_like_the_source(operation: Diffusion) -> None:
    drawing = np.zeros((180, 300, 3), np.uint8)  # wider than the photo
    drawing[:, 148:152] = 255
    for control in ("canny", "canny;tile"):
        canvas = prepared(operation, own=drawing, control=control).samples[0].data
        plain = prepared(operation, control=control).samples[0].data
        assert canvas.controls[0].shape == canvas.pixels.shape
        assert 30 <= canvas.controls[0][20].argmax() // 3 <= 40, "the line stays in the middle"
        assert len(canvas.controls) == len(plain.controls)
        assert all(np.array_equal(*pair) for pair in zip(canvas.controls[1:], plain.controls[1:], strict=True))
    ours = prepared(operation, own=drawing).evidence
    assert ours.comparable
    assert ours.edges is not None
    assert ours.edges[20].any(), "the result should have the edges of the drawing"
    assert not np.array_equal(ours.edges, prepared(operation).evidence.edges)
    by_url = prepared(operation, control_image=REFERENCE).samples[0].data.controls[0]
    assert np.array_equal(by_url, prepared(operation, own=scene(30, 30, seed=3)).samples[0].data.controls[0])


@pytest.mark.parametrize(
    ("chosen", "comparable", "some"),
    [
        ({"mode": "text-to-image"}, True, True),
        ({"mode": "text-to-image", "control": "tile"}, True, True),
        ({"control": "none"}, True, True),
        ({"control": "none", "crop": "1x1"}, False, True),
        ({"mode": "text-to-image", "control": "none"}, False, False),
    ],
)
def test_evidence_follows_what_the_result_keeps_of_the_source(
    chosen: dict[str, Any], comparable: bool, some: bool, operation: Diffusion
) -> None:
    evidence = prepared(operation, **chosen).evidence
    assert evidence.comparable == comparable
    assert evidence.edges is not None
    assert evidence.edges.any() == some


def test_sdxl_keeps_the_contract_of_the_options(operation: Diffusion) -> None:
    plain = styled(operation, model="sdxl")
    assert plain.shape == PHOTO.shape
    for chosen in (
        *({"prompt": "a blue hat"}, {"negative_prompt": "a hat"}, {"cfg": 3}, {"control": "scribble"}, {"control": "none"}),
        *({"mode": "text-to-image"}, {"scheduler": "euler-trailing", "cfg": 1}, {"loras": "xl"}),
    ):
        assert difference(plain, styled(operation, model="sdxl", **chosen)) > 0.2, chosen
    assert np.array_equal(styled(operation, model="sdxl"), plain)
    assert difference(styled(operation), plain) > 0.2


@pytest.mark.parametrize(("model", "size", "side"), [("sd15", None, 512), ("sdxl", None, 1024), ("sdxl", 256, 256)])
def test_each_family_works_at_the_size_it_was_trained_on_unless_another_is_set(
    model: str, size: int | None, side: int, operation: Diffusion
) -> None:
    pixels = prepared(operation, model=model, size=size).samples[0].data.pixels
    assert pixels.shape[1::-1] == bucket((120, 90), side, 8)


def test_sdxl_uses_its_vae_in_float32_where_half_precision_would_overflow(
    operation: Diffusion, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = styled(operation, scene(64, 64), model="sdxl", control="none")
    monkeypatch.setattr(module, "dtype_of", lambda _: torch.float16)
    folder = shutil.copytree(weights / "diffusion", tmp_path / "diffusion").parent
    config = folder / "diffusion" / "sdxl-vae" / "config.json"
    for overflows, dtype in ((True, torch.float32), (False, torch.float16)):
        config.write_text(json.dumps(json.loads(config.read_text()) | {"force_upcast": overflows}))
        half = loaded(folder)
        assert difference(styled(half, scene(64, 64), model="sdxl", control="none"), plain) < 4
        pipe = half._pipeline.current._text  # type: ignore[union-attr]
        assert {part.dtype for part in (pipe.unet, pipe.text_encoder, pipe.text_encoder_2)} == {torch.float16}
        assert pipe.vae.dtype == dtype


def test_group_key_depends_on_options_and_bucket_only(operation: Diffusion) -> None:
    def key(pixels: Pixels = PHOTO, **chosen: Any) -> Any:
        return operation.group_key(prepared(operation, pixels, **chosen).samples[0])

    assert key() == key(scene(45, 60, seed=1), index=5)
    assert key(scene(91, 120)) == key(), "the same bucket"
    changes = (
        {"steps": 3},
        {"scheduler": "ddim"},
        {"loras": "red"},
        {"control": "tile"},
        {"control": "none"},
        {"model": "sdxl"},
    )
    different = [key(), key(scene(120, 90)), *(key(**one) for one in changes)]
    assert len(set(different)) == len(different)


def test_fingerprint_depends_on_weights_and_device_settings(weights: Path, tmp_path: Path) -> None:
    other = pipeline_folder(tmp_path, seed=1)
    options = parse_options("stylize", "diffusion", QUICK)
    fingerprints = [
        loaded(weights).fingerprint(options),
        loaded(other).fingerprint(options),
        loaded(weights, compiled=True).fingerprint(options),
        loaded(weights, safety_checker=True).fingerprint(options),
    ]
    assert len(set(fingerprints)) == 4
    assert loaded(weights, threads=2).fingerprint(options) == fingerprints[0]


def test_fingerprint_names_every_part(weights: Path, tmp_path: Path) -> None:
    def fingerprint(**chosen: Any) -> str:
        return operation.fingerprint(parse_options("stylize", "diffusion", QUICK | chosen))

    operation = loaded(shutil.copytree(weights, tmp_path / "weights"))
    assert fingerprint().startswith("sd15-canny ")
    assert "controlnet-canny " in fingerprint()
    assert "controlnet-tile " in fingerprint(control="canny;tile")
    assert "controlnet" not in fingerprint(model="sdxl", control="none").partition("sdxl ")[2]
    assert len(fingerprint(model="sdxl").split(",")[0].split()) == 3, "the checkpoint and its VAE"
    before = fingerprint(control="tile")
    path = tmp_path / "weights" / "diffusion" / "controlnet-tile" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes() + b" ")
    assert fingerprint(control="tile") != before
    assert fingerprint() != before


@pytest.mark.parametrize("mode", ["image-to-image", "text-to-image"])
def test_half_precision_changes_the_image_only_slightly(
    mode: str, operation: Diffusion, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The noise has 4 * 8 * 8 values. If that is not a multiple of 16, torch draws the last ones differently in half precision.
    pixels = scene(64, 64)
    plain = styled(operation, pixels, mode=mode)
    assert {part.dtype for part in parts_of(operation)} == {torch.float32}, "on a CPU"
    for dtype in (torch.float16, torch.bfloat16):
        monkeypatch.setattr(module, "dtype_of", lambda _, dtype=dtype: dtype)
        half = loaded(weights)
        assert difference(styled(half, pixels, mode=mode), plain) < 4
        assert {part.dtype for part in parts_of(half)} == {dtype}


def parts_of(operation: Diffusion) -> list[Any]:
    styled(operation)
    pipe = operation._pipeline.current._text  # type: ignore[union-attr]
    return [pipe.unet, *operation._pipeline.current.controlnets.networks, pipe.vae, pipe.text_encoder]


def test_precision_setting_changes_fingerprint_and_footprint(weights: Path) -> None:
    fingerprints, footprints = [], []
    for dtype in ("auto", "fp16", "bf16", "fp32"):
        operation = Diffusion()
        operation.load(Device(gpu=0, weights=weights, dtype=dtype))
        (sample,) = prepared(operation).samples
        fingerprints.append(operation.fingerprint(sample.options))
        footprints.append(sample.footprint)
    assert footprints == [f"72x56 torch.{name} guided" for name in ("float16", "float16", "bfloat16", "float32")]
    assert fingerprints[0] == fingerprints[1]
    assert len(set(fingerprints)) == 3


def test_half_precision_weights_are_loaded_when_they_were_pulled(weights: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(weights, tmp_path / "weights")
    for path in [
        *(folder / "diffusion" / "sd15").rglob("*.safetensors"),
        *(folder / "diffusion" / "controlnet-canny").rglob("*.safetensors"),
    ]:
        path.rename(path.with_name(path.name.replace(".safetensors", ".fp16.safetensors")))
    assert np.array_equal(styled(loaded(folder)), styled(loaded(weights)))


EXTRA = (
    *("README.md", "sd_xl_base_1.0.safetensors", "unet/diffusion_pytorch_model.safetensors", "unet/model.onnx"),
    *("text_encoder/flax_model.msgpack", "text_encoder_2/model.safetensors", "text_encoder_2/model.onnx_data"),
    *("vae_decoder/model.onnx", "vae_1_0/diffusion_pytorch_model.fp16.safetensors", "vae/diffusion_pytorch_model.safetensors"),
)
"""Further files that are published with SDXL, and that nobody needs to download."""


def test_sdxl_is_pulled_from_a_hub_and_loaded_as_it_is_published(tmp_path: Path) -> None:
    published, pulled = pipeline_folder(tmp_path / "published", "sdxl", ["canny"], half=True), tmp_path / "pulled"
    for name in ("sdxl", "sdxl-vae", "controlnet-sdxl-canny"):
        entry = replace(repository(name), revision=COMMIT)
        folder = folder_of(published, entry)
        files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        if name == "controlnet-sdxl-canny":  # published in half precision, and without saying so
            files = {path.replace(".fp16", ""): data for path, data in files.items()}
        extra = dict.fromkeys(EXTRA, b"not needed") if name == "sdxl" else {}
        with Hub(entry.source, extra | files) as hub:
            assert pull(entry, WeightsSettings(folder=pulled, mirror=hub.url)) == "pulled"
        assert state(pulled, entry) == "there"
        there = {str(path.relative_to(folder_of(pulled, entry))) for path in folder_of(pulled, entry).rglob("*.*")}
        assert {path for path in there if path.endswith(".safetensors")} == {
            path for path in files if path.endswith(".safetensors") and not path.startswith("vae/")
        }
    assert is_here(pulled, "sdxl")
    assert not is_here(pulled, "sdxl-turbo")
    assert np.array_equal(styled(loaded(pulled), model="sdxl"), styled(loaded(published), model="sdxl"))


def test_transparency_is_kept_and_hidden_colours_have_no_influence(operation: Diffusion) -> None:
    pixels = scene(90, 120, channels=4, seed=1)
    pixels[:, 60:, 3] = 0
    result = styled(operation, pixels)
    assert np.array_equal(result[..., 3], pixels[..., 3])
    hidden = pixels.copy()
    hidden[:, 60:, :3] = 0
    assert np.array_equal(styled(operation, hidden), result)


@pytest.mark.parametrize("ground", [0, 255])
def test_a_model_that_changes_nothing_leaves_the_colours_of_soft_edges(operation: Diffusion, ground: int) -> None:
    """A dark disc on a transparent ground: with white under its edge, they came back lighter by 43 levels on average."""
    height, width = 160, 160
    rows, columns = np.mgrid[:height, :width]
    distance = np.hypot(rows - 80, columns - 80)
    alpha = np.clip((50 - distance) / 12 * 255, 0, 255).astype(np.uint8)
    pixels = np.full((height, width, 4), ground, np.uint8)
    pixels[alpha > 0, :3] = (40, 60, 90)
    pixels[..., 3] = alpha
    work = prepared(operation, pixels)
    result = operation.finish(work, [Styled(work.samples[0].data.pixels)]).pixels
    seen = alpha > 8
    assert np.abs(result[seen][:, :3].astype(int) - pixels[seen][:, :3]).max() <= 3
    assert np.array_equal(result[..., 3], alpha)


def test_result_keeps_profile_and_format(operation: Diffusion) -> None:
    work = prepared(operation)
    work.plan = replace(work.plan, picture=replace(work.plan.picture, icc=b"profile", format="jpeg"))
    picture = operation.finish(work, operation.run(work.samples))
    assert (picture.icc, picture.format) == (b"profile", "jpeg")
