from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from imagemill.shared.errors import OperationFailed
from imagemill.worker.models.matting import KINDS
from imagemill.worker.operations.remove_background import model_families as families
from imagemill.worker.operations.remove_background.model_families import FAMILIES, Family, in_bytes, scaled
from tests.unit.worker.operations.conformance import scene

U2NET, BIREFNET = FAMILIES["u2net"], FAMILIES["birefnet-general"]
CUSTOM = {"u2net_custom": "u2net", "dis_custom": "isnet", "ben_custom": "ben", "birefnet-general-fp16": "birefnet"}
"""rembg's sessions for your own file, and the families with which `imagemill models add` takes it."""
BRIGHT = np.full((5, 5, 3), 240, np.uint8)


class Recorder:
    """Stands in for onnxruntime in a rembg session: records the input and returns a given output."""

    def __init__(self, output: NDArray[np.float32]) -> None:
        self.output = output

    def get_inputs(self) -> list[Any]:
        return [type("Input", (), {"name": "input"})]

    def run(self, _: Any, feed: dict[str, Any]) -> list[Any]:
        self.tensor = feed["input"]
        return [self.output[None]]


def rembgs(model: str, pixels: NDArray[np.uint8], output: NDArray[np.float32]) -> tuple[Any, Any]:
    """rembg's input tensor for an image, and its mask for a given output of the model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # rembg imports libraries that warn
        from rembg.sessions import sessions
    session = object.__new__(sessions[model])
    session.inner_session = Recorder(output)
    (mask,) = session.predict(Image.fromarray(pixels))
    return session.inner_session.tensor[0], np.asarray(mask)


def outputs(family: Family) -> NDArray[np.float32]:
    """A synthetic model output [1, size, size]: probabilities, or logits for a family that needs a sigmoid."""
    across = np.linspace(-1, 1, family.size, dtype=np.float32)
    found = np.exp(-4 * (across[:, None] ** 2 + across**2))[None]
    return found * 150 - 100 if family.logits else found * 0.9


@pytest.mark.parametrize("model", [name for name in FAMILIES if name != "ben2"])
def test_input_and_matte_of_every_model_equal_rembgs(model: str) -> None:
    pixels = scene(90, 130)
    output = outputs(FAMILIES[model])
    with np.errstate(over="ignore"):
        tensor, mask = rembgs(model, pixels, output)
    assert FAMILIES[model].tensor(pixels).tobytes() == tensor.tobytes()
    matte = in_bytes(FAMILIES[model].matte(output))
    assert np.array_equal(Image.fromarray(matte).resize((130, 90), Image.Resampling.LANCZOS), mask)


@pytest.mark.parametrize(("session", "family"), CUSTOM.items())
def test_families_of_added_models_equal_rembgs_custom_sessions(session: str, family: str) -> None:
    pixels, output = scene(90, 130), outputs(KINDS[family])
    with np.errstate(over="ignore"):
        tensor, mask = rembgs(session, pixels, output)
    assert KINDS[family].tensor(pixels).tobytes() == tensor.tobytes()
    matte = in_bytes(KINDS[family].matte(output))
    assert np.array_equal(Image.fromarray(matte).resize((130, 90), Image.Resampling.LANCZOS), mask)


def test_ben2_gets_the_image_as_its_publisher_prepares_it() -> None:
    pixels = np.zeros((1024, 1024, 3), np.uint8)
    pixels[0, :256] = np.arange(256)[:, None]
    assert np.allclose(FAMILIES["ben2"].tensor(pixels), pixels.transpose(2, 0, 1) / 255)


@pytest.mark.parametrize("shape", [(700, 900), (900, 400), (320, 320), (1, 1), (3, 500), (600, 2)])
def test_input_of_any_shape_equals_rembgs(shape: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    tensor, _ = rembgs("u2net", pixels, outputs(U2NET))
    assert U2NET.tensor(pixels).tobytes() == tensor.tobytes()


@pytest.mark.parametrize("shape", [(840, 1000), (803, 1201)])
def test_input_of_large_image_is_close_to_rembgs_and_exact_on_request(shape: tuple[int, int]) -> None:
    down, across = np.mgrid[: shape[0], : shape[1]]
    noise = np.random.default_rng(0).normal(0, 4, shape)
    waves = 128 + 60 * np.sin(down / 31) * np.cos(across / 23) + 40 * (across / shape[1] - 0.5) + noise
    pixels = np.dstack([waves, waves[::-1], waves[:, ::-1]]).clip(0, 255).astype(np.uint8)
    expected = np.asarray(Image.fromarray(pixels).resize((320, 320), Image.Resampling.LANCZOS)).astype(int)
    assert np.array_equal(scaled(pixels, 320, as_rembg=True), expected)
    error = scaled(pixels, 320) - expected
    assert 0 < np.abs(error).mean() < 0.6
    assert np.abs(error.mean(axis=(0, 1))).max() < 0.2
    assert np.abs(error[-4:]).mean() < 0.6, "the last rows of an odd number are where they belong"
    assert np.abs(error[:, -4:]).mean() < 0.6


@pytest.mark.parametrize("channels", [3, 4])
def test_input_of_panorama_equals_rembgs(channels: int) -> None:
    pixels = scene(810, 2100, channels=channels)
    if channels == 4:
        pixels[..., 3] = 255
    assert np.array_equal(scaled(pixels, 320), scaled(pixels, 320, as_rembg=True))


@pytest.mark.parametrize("shape", [(700, 900), (900, 700)])
def test_scaling_in_strips_is_close_to_scaling_at_once(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 4), np.uint8)
    whole = scaled(pixels, 320).astype(int)
    monkeypatch.setattr(families, "WHOLE", 1000)
    assert np.abs(scaled(pixels, 320) - whole).mean() < 0.5  # Pillow may scale vertically first, and rounds in between


def test_input_is_relative_to_the_brightest_value() -> None:
    dark = U2NET.tensor(BRIGHT // 4)
    assert np.array_equal(dark, U2NET.tensor(BRIGHT))
    assert dark[0, 0, 0] == pytest.approx((1 - 0.485) / 0.229)


def test_black_image_gives_finite_input() -> None:
    tensor = U2NET.tensor(np.zeros((5, 5, 3), np.uint8))
    assert np.isfinite(tensor).all()
    assert tensor[0, 0, 0] == pytest.approx(-0.485 / 0.229)


def test_hidden_colours_are_ignored_except_as_rembg() -> None:
    for size in ((900, 1000), (40, 60)):
        one, other = (np.dstack([scene(*size, seed=seed), np.zeros(size, np.uint8)]) for seed in (0, 1))
        assert np.array_equal(U2NET.tensor(one), U2NET.tensor(other))
    hidden, _ = rembgs("u2net", one, outputs(U2NET))
    assert np.array_equal(U2NET.tensor(one, as_rembg=True), hidden)


def test_opaque_alpha_channel_changes_nothing() -> None:
    pixels = scene(40, 60)
    assert np.array_equal(U2NET.tensor(np.dstack([pixels, np.full((40, 60), 255, np.uint8)])), U2NET.tensor(pixels))


@pytest.mark.parametrize("level", [0.0, 0.3, 1.0])
def test_flat_output_gives_an_empty_matte(level: float) -> None:
    flat = np.full((1, 320, 320), level, np.float32)
    flat[0, 0, 0] += 1e-8
    assert not U2NET.matte(flat).any()


def test_matte_is_stretched_to_the_full_range() -> None:
    matte = U2NET.matte(outputs(U2NET) * 0.01 + 0.4)
    assert (matte.dtype, matte.shape) == (np.float32, (320, 320))
    assert (matte.min(), matte.max()) == (0, 1)


def test_matte_does_not_depend_on_the_scale_of_the_output() -> None:
    strong = outputs(U2NET)
    assert np.allclose(U2NET.matte(strong), U2NET.matte(strong * 0.1), atol=1e-5)


def test_logits_that_overflow_exp_give_0_and_1() -> None:
    logits = np.full((1, 1024, 1024), -1000, np.float32)
    logits[0, :10] = 1000
    matte = BIREFNET.matte(logits)
    assert matte[:10].min() == 1
    assert matte[10:].max() == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_output_fails_the_image(bad: float) -> None:
    output = outputs(U2NET)
    output[0, 3, 3] = bad
    with pytest.raises(OperationFailed, match="not finite"):
        U2NET.matte(output)
