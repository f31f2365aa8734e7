"""Compares every session with rembg's own: its registry, its files, and its masks from the same small models."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from imagemill.shared.engines import REMBG_MODELS, parse_options
from imagemill.shared.errors import BadMask, ModelUnavailable, OperationFailed
from imagemill.shared.messages import Item
from imagemill.shared.options.remove_background import PROMPTED_MODELS
from imagemill.worker.hardware.device import Device
from imagemill.worker.imaging.picture import Picture, Pixels
from imagemill.worker.models.catalogue import LICENSED, WEIGHTS
from imagemill.worker.operations.base import Inputs, Work
from imagemill.worker.operations.remove_background import segment_anything
from imagemill.worker.operations.remove_background.rembg import Rembg
from imagemill.worker.operations.remove_background.run_once import RunOnce
from tests.special_models import special_folder
from tests.unit.worker.operations.conformance import scene
from tests.unit.worker.operations.remove_background.test_model_families import CUSTOM

LEFT_OUT = {"sam_vit_h_4b8939.encoder.onnx"} | {f"sam_vit_h_4b8939.encoder_data.{part}.bin" for part in (1, 2, 3)}
LEFT_OUT |= {"sam_vit_h_4b8939.decoder.onnx"}
"""Files of rembg's that the catalogue leaves out: the largest Segment Anything is there with 8 bits."""


def picture(height: int, width: int, channels: int = 3) -> Pixels:
    """A scene in which each garment has its place."""
    pixels = scene(height, width, channels=channels)
    pixels[:, : width // 2, 1] //= 3
    pixels[: height // 3, :, 2] = 200
    return pixels


PICTURES = {"landscape": picture(180, 300), "portrait": picture(300, 210), "with alpha": picture(50, 60, channels=4)}
GARMENTS = ("upper", "lower", "full")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return special_folder(tmp_path_factory.getbasetemp() / "weights")


@pytest.fixture(scope="module")
def theirs() -> Any:
    """The rembg package."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # rembg imports libraries that warn
        import rembg
    return rembg


@pytest.fixture(scope="module")
def operation(weights: Path) -> Rembg:
    operation = Rembg()
    operation.load(Device(threads=1, weights=weights))
    return operation


def removed(theirs: Any, weights: Path, model: str, pixels: Pixels, **more: Any) -> Pixels:
    """The result of `rembg.remove` with the engine's own files."""
    home = weights / "theirs"
    home.mkdir(exist_ok=True)
    names = {"sam.encoder": "sam_vit_b_01ec64.encoder", "sam.decoder": "sam_vit_b_01ec64.decoder"}
    for own in ("u2net_cloth_seg", *names):
        if not (home / f"{names.get(own, own)}.onnx").exists():
            os.link(weights / "rembg" / f"{own}.onnx", home / f"{names.get(own, own)}.onnx")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("U2NET_HOME", str(home))
        session = theirs.new_session(model, providers=["CPUExecutionProvider"])
    return np.asarray(theirs.remove(Image.fromarray(pixels), session=session, **more))


def prepared(operation: Rembg, pixels: Pixels, chosen: dict[str, Any], full_size: tuple[int, int] = (0, 0), **row: Any) -> Work:
    item = Item(index=0, source="https://images.example/one.png", **row)
    options = parse_options("remove-background", "rembg", chosen)
    return operation.prepare(Picture(pixels, full_size=full_size), Inputs(item, options))


def cut(operation: Rembg, pixels: Pixels, chosen: dict[str, Any], full_size: tuple[int, int] = (0, 0), **row: Any) -> Pixels:
    work = prepared(operation, pixels, chosen, full_size, **row)
    return operation.finish(work, operation.run(work.samples)).pixels


# --- rembg's registry -------------------------------------------------------------------------------------------------


def test_every_session_of_rembg_is_there(theirs: Any) -> None:
    local = {name for name, session in theirs.sessions.sessions.items() if session.is_local()}
    known = {*REMBG_MODELS, *LICENSED, *CUSTOM}
    assert local <= known, "rembg has a new session"
    assert local >= CUSTOM.keys()
    assert known - local == {"ben2", *PROMPTED_MODELS} - {"sam"}


def test_every_file_of_rembg_is_in_the_catalogue_with_rembgs_checksum(theirs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: set[tuple[str, str]] = set()

    def retrieve(url: str, known_hash: str, **_: Any) -> None:
        asked.add((url, known_hash))

    for name, session in theirs.sessions.sessions.items():
        if not session.is_local() or name in CUSTOM:
            continue
        module = __import__(session.__module__, fromlist=["pooch"])
        monkeypatch.setattr(module.pooch, "retrieve", retrieve)
        monkeypatch.setattr(session, "resolve_existing", lambda *_, **__: None)
        if name != "sam":
            session.download_models()
        else:
            release = "https://github.com/danielgatis/rembg/releases/download/v0.0.0"
            asked |= {(f"{release}/{file}", known) for file, known in module.SAM_CHECKSUMS.items() if file not in LEFT_OUT}
    own = {(entry.url, entry.checksum) for entry in WEIGHTS if entry.engine == "rembg" and not entry.hub}
    assert own == asked


# --- garments ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PICTURES)
def test_garments_equal_rembgs(name: str, operation: Rembg, weights: Path, theirs: Any) -> None:
    pixels, chosen = PICTURES[name], {"model": "u2net_cloth_seg", "exact": True}
    mine = [cut(operation, pixels, chosen, part=part) for part in GARMENTS]
    assert np.array_equal(np.concatenate(mine), removed(theirs, weights, "u2net_cloth_seg", pixels))
    assert all(result[..., 3].std() > 5 for result in mine), "an empty mask would prove nothing"
    attire = cut(operation, pixels, chosen, part="attire")
    assert np.array_equal(attire, removed(theirs, weights, "u2net_cloth_seg", pixels, cloth_category="attire"))


def test_garments_have_no_rim_of_another_garment_unless_exact(operation: Rembg) -> None:
    """rembg scales the classes 0 to 3 as shades of grey, so `upper` (1) surrounds `full` (3)."""
    output = np.zeros((4, 768, 768), np.float32)
    output[0], output[3, 205:497, 205:497] = 0.5, 1
    seen = {}
    for exact in (False, True):
        for part in GARMENTS:
            work = prepared(operation, picture(100, 100), {"model": "u2net_cloth_seg", "exact": exact}, part=part)
            seen[exact, part] = bool(operation.finish(work, [output]).pixels[..., 3].any())
            assert work.notes == ([] if seen[exact, part] else ["empty_cutout"])
            assert work.evidence.absent == (not seen[exact, part])
    assert seen == {
        **{(False, part): part == "full" for part in GARMENTS},
        **{(True, part): True for part in GARMENTS},
    }


def test_results_of_one_image_take_one_run_of_the_model(operation: Rembg, monkeypatch: pytest.MonkeyPatch) -> None:
    work = [prepared(operation, PICTURES["landscape"], {"model": "u2net_cloth_seg"}, part=part) for part in GARMENTS]
    work += [prepared(operation, PICTURES["portrait"], {"model": "u2net_cloth_seg"}, part=part) for part in GARMENTS]
    samples = [sample for one in work for sample in one.samples]
    alone = [operation.run([sample])[0] for sample in samples]
    model = operation._model.current
    assert isinstance(model, RunOnce)
    sizes: list[int] = []
    run = model._model.run
    monkeypatch.setattr(model._model, "run", lambda data, **how: sizes.append(len(data)) or run(data, **how))
    model._latest.clear()
    together = operation.run(samples[:4]) + operation.run(samples[4:])
    assert sizes == [2, 0]
    assert all(np.array_equal(*pair) for pair in zip(together, alone, strict=True))


@pytest.mark.parametrize("output", [np.zeros((1, 768, 768)), np.zeros((768, 768)), np.full((4, 768, 768), np.nan)])
def test_output_that_is_not_a_map_of_garments_fails_the_image(output: Any, operation: Rembg) -> None:
    work = prepared(operation, picture(20, 20), {"model": "u2net_cloth_seg"}, part="upper")
    with pytest.raises(OperationFailed, match=r"4 maps|not finite"):
        operation.finish(work, [output.astype(np.float32)])


# --- Segment Anything -------------------------------------------------------------------------------------------------

PROMPTS: list[tuple[dict[str, Any], list[dict[str, Any]] | None]] = [
    ({}, None),
    ({"points": "30,20"}, [{"type": "point", "label": 1, "data": [30, 20]}]),
    (
        {"points": "90,60;105,90,0", "boxes": "15,30,90,75"},
        [
            {"type": "point", "label": 1, "data": [90, 60]},
            {"type": "point", "label": 0, "data": [105, 90]},
            {"type": "rectangle", "label": 1, "data": [15, 30, 105, 105]},
        ],
    ),
    ({"boxes": "9,12,120,90"}, [{"type": "rectangle", "label": 1, "data": [9, 12, 129, 102]}]),
]


@pytest.mark.parametrize(("name", "row"), [("landscape", 0), ("with alpha", 1), ("portrait", 2), ("landscape", 3)])
def test_sam_equals_rembgs(name: str, row: int, operation: Rembg, weights: Path, theirs: Any) -> None:
    pixels, (given, prompt) = PICTURES[name], PROMPTS[row]
    expected = removed(theirs, weights, "sam", pixels, **({} if prompt is None else {"sam_prompt": prompt}))
    exact = {"model": "sam", "exact": True}
    assert np.array_equal(cut(operation, pixels, exact, **given), expected)
    assert np.array_equal(cut(operation, pixels, {**exact, **given}), expected), "the job's prompts are for every image"
    assert expected[..., 3].std() > 5, "an empty mask would prove nothing"
    if pixels.shape[2] == 3:  # rembg shows hidden colours to the model, the fast path does not
        fast, slow = cut(operation, pixels, {"model": "sam"}, **given)[..., 3] > 127, expected[..., 3] > 127
        assert np.count_nonzero(fast & slow) / np.count_nonzero(fast | slow) > 0.85


def test_sam_in_strips_equals_sam_at_once(operation: Rembg, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = cut(operation, PICTURES["landscape"], {"model": "sam", "exact": True})
    monkeypatch.setattr(segment_anything, "STRIP", 200_000)
    assert np.array_equal(cut(operation, PICTURES["landscape"], {"model": "sam", "exact": True}), whole)


def test_prompts_of_a_row_replace_those_of_the_job(operation: Rembg) -> None:
    pixels, chosen = PICTURES["landscape"], {"model": "sam"}
    own = cut(operation, pixels, chosen, points="10,10")
    for job in ({"points": "240,120"}, {"boxes": "150,60,120,90"}):
        assert np.array_equal(cut(operation, pixels, {**chosen, **job}, points="10,10"), own)
        assert not np.array_equal(cut(operation, pixels, {**chosen, **job}), own)


@pytest.mark.parametrize(
    ("pixels", "fractions"),
    [
        ({"points": "90,45;180,135,0"}, {"points": "0.3,0.25;0.6,0.75,0"}),
        ({"boxes": "30,18,150,90"}, {"boxes": "0.1,0.1,0.5,0.5"}),
    ],
)
def test_places_may_be_fractions_and_are_those_of_the_source(
    pixels: dict[str, str], fractions: dict[str, str], operation: Rembg
) -> None:
    image, chosen = PICTURES["landscape"], {"model": "sam"}
    result = cut(operation, image, chosen, **pixels)
    assert np.array_equal(cut(operation, image, chosen, **fractions), result)
    twice = {name: ";".join(_doubled(part) for part in value.split(";")) for name, value in pixels.items()}
    assert np.array_equal(cut(operation, image, chosen, (600, 360), **twice), result), "decoded at half its size"


def _doubled(prompt: str) -> str:
    numbers = prompt.split(",")
    places = numbers if len(numbers) == 4 else numbers[:2]
    return ",".join([*(str(2 * int(place)) for place in places), *numbers[len(places) :]])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"points": "301,5"}, "the point 301,5 lies outside the image, which is 300x180"),
        ({"points": "5,5;5,181,0"}, "the point 5,181 lies outside the image, which is 300x180"),
        ({"boxes": "400,10,5,5"}, "the box 400,10,5,5 lies outside the image, which is 300x180"),
    ],
)
def test_place_outside_the_image_fails_the_image(row: dict[str, str], message: str, operation: Rembg) -> None:
    with pytest.raises(BadMask) as caught:
        prepared(operation, PICTURES["landscape"], {"model": "sam"}, **row)
    assert caught.value.message == message


def test_sam_gives_the_same_alone_and_in_any_batch(operation: Rembg) -> None:
    rows = [(name, row) for name in ("landscape", "portrait") for row in ({"points": "10,10"}, {"boxes": "5,5,30,30"})]
    work = [prepared(operation, PICTURES[name], {"model": "sam"}, **row) for name, row in rows]
    samples = [sample for one in work for sample in one.samples]
    alone = [operation.run([sample])[0] for sample in samples]
    for order in ([0, 1, 2, 3], [2, 0, 3]):
        outputs = operation.run([samples[place] for place in order])
        assert all(np.array_equal(output, alone[place]) for place, output in zip(order, outputs, strict=True))


def test_image_is_embedded_once_for_all_of_its_prompts(operation: Rembg, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: Counter[str] = Counter()
    run = segment_anything.Network.run
    monkeypatch.setattr(segment_anything.Network, "run", lambda self, feed: runs.update([min(feed)]) or run(self, feed))
    image = picture(40, 61)
    work = [prepared(operation, image, {"model": "sam"}, points=f"{place},10") for place in (5, 25, 45)]
    operation.run([sample for one in work for sample in one.samples])
    assert runs == {"input_image": 1, "has_mask_input": 3}


def test_images_that_are_cut_out_already_are_still_divided(operation: Rembg) -> None:
    pixels = np.dstack([PICTURES["landscape"], np.full((180, 300), 255, np.uint8)])
    pixels[:4, :, 3] = pixels[-4:, :, 3] = pixels[:, :4, 3] = pixels[:, -4:, 3] = 0
    for chosen, row in (({"model": "sam"}, {"points": "10,10"}), ({"model": "u2net_cloth_seg"}, {"part": "upper"})):
        result = cut(operation, pixels, chosen, **row)
        assert (result[..., 3] < pixels[..., 3]).any()
        assert (result[..., 3] <= pixels[..., 3]).all()


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (1, 33), (17, 1), (1500, 2)])
def test_images_of_any_shape_have_a_mask_of_that_shape(shape: tuple[int, int], exact: bool, operation: Rembg) -> None:
    for model, maps in (("sam", (1, 684, 1024)), ("u2net_cloth_seg", (4, 768, 768))):
        work = prepared(operation, scene(*shape), {"model": model, "exact": exact})
        assert operation.finish(work, [np.ones(maps, np.float32)]).pixels.shape == (*shape, 4)


def test_files_that_are_not_sams_are_refused(weights: Path, tmp_path: Path) -> None:
    folder = tmp_path / "rembg"
    folder.mkdir()
    garments, encoder, decoder = (
        (weights / "rembg" / f"{name}.onnx").read_bytes() for name in ("u2net_cloth_seg", "sam.encoder", "sam.decoder")
    )
    operation = Rembg()
    for first, second, refused in (
        (decoder, decoder, "encoder"),
        (encoder, encoder, "decoder"),
        (encoder, garments, "decoder"),
    ):
        (folder / "sam.encoder.onnx").write_bytes(first)
        (folder / "sam.decoder.onnx").write_bytes(second)
        operation.load(Device(threads=1, weights=tmp_path))
        with pytest.raises(ModelUnavailable, match=f"sam.{refused}.onnx is not Segment Anything's {refused}"):
            cut(operation, PICTURES["landscape"], {"model": "sam"})
    (folder / "sam.encoder.onnx").unlink()
    with pytest.raises(ModelUnavailable, match="models pull sam"):
        cut(operation, PICTURES["landscape"], {"model": "sam"})


def test_fingerprint_names_both_files(weights: Path, tmp_path: Path) -> None:
    folder = special_folder(tmp_path)
    operation, options = Rembg(), parse_options("remove-background", "rembg", {"model": "sam"})
    operation.load(Device(threads=1, weights=folder))
    before = operation.fingerprint(options)
    (folder / "rembg" / "sam.decoder.onnx").write_bytes((weights / "rembg" / "sam.encoder.onnx").read_bytes())
    assert operation.fingerprint(options) != before
