from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from imagemill.worker.operations.inpaint.lama_generator import PREFIX, Fourier, Generator
from tests.generators import lama_weights
from tests.workers import ROOT

VECTORS = ROOT.parent / "shared" / "vectors" / "lama-small.npz"
SIZES: dict[str, dict[str, Any]] = {
    "small": {},
    "wide and deep": dict(width=8, blocks=3),
    "two levels": dict(levels=2),
    "four levels": dict(levels=4, width=2),
    "half global": dict(ratio=0.5),
}


def source(height: int = 32, width: int = 48, batch: int = 1, seed: int = 0) -> Tensor:
    """A generator's input: pictures of noise with a hole."""
    x = torch.rand((batch, 4, height, width), generator=torch.Generator().manual_seed(seed))
    x[:, 3] = 0
    x[:, 3, height // 4 : height // 2, width // 4 : width // 2] = 1
    x[:, :3] *= 1 - x[:, 3:]
    return x


def painted(generator: Generator, x: Tensor) -> Tensor:
    with torch.inference_mode():
        return generator(x).clone()


def test_generator_reproduces_the_output_of_the_published_one() -> None:
    if not VECTORS.is_file():
        pytest.skip(f"{VECTORS} does not exist")
    with np.load(VECTORS) as arrays:
        vectors = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    weights = {name.removeprefix("weight/"): value for name, value in vectors.items() if name.startswith("weight/")}
    x = torch.cat([vectors["image"] * (1 - vectors["mask"]), vectors["mask"]], dim=1)
    plain, banded, folded = Generator(weights), Generator(weights, band=16 * x.shape[-1]), Generator(weights).fold()
    for generator in (plain, banded, folded):
        assert (painted(generator, x) - vectors["predicted"]).abs().max() <= 1e-5


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_generator_takes_its_size_from_the_weights(size: dict[str, Any]) -> None:
    weights = lama_weights(**size)
    result = painted(Generator(weights), source(batch=2))
    assert result.shape == (2, 3, 32, 48)
    assert result.min() >= 0
    assert result.max() <= 1
    assert result.std() > 0.01
    assert {f"generator.{name}" for name in Generator(weights).state_dict()} == set(weights)


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_folding_removes_the_batch_norms_and_barely_changes_the_output(size: dict[str, Any]) -> None:
    weights = lama_weights(**size)
    copies = {name: tensor.clone() for name, tensor in weights.items()}
    plain, folded = Generator(weights), Generator(weights).fold()
    assert not any(isinstance(part, nn.BatchNorm2d) for part in folded.modules())
    assert (painted(plain, source()) - painted(folded, source())).abs().max() <= 1e-4
    assert all(torch.equal(weights[name], copy) for name, copy in copies.items()), "the caller's weights stay unchanged"


@settings(max_examples=20)
@given(
    levels=st.integers(1, 4),
    rows=st.integers(2, 12),
    columns=st.integers(2, 4),
    band=st.integers(1, 6000),
    batch=st.integers(1, 2),
)
def test_output_is_the_same_in_bands(levels: int, rows: int, columns: int, band: int, batch: int) -> None:
    weights = lama_weights(levels=levels, width=2)
    x = source(rows << levels, columns << levels, batch)
    whole, banded = painted(Generator(weights), x), painted(Generator(weights, band), x)
    assert banded.shape == whole.shape
    assert (banded - whole).abs().max() <= 1e-5


def test_output_for_a_picture_does_not_depend_on_the_rest_of_the_batch() -> None:
    generator, x = Generator(lama_weights()).fold(), source(batch=3)
    together = painted(generator, x)
    for place in range(3):
        assert (painted(generator, x[place : place + 1]) - together[place]).abs().max() <= 1e-6


def test_every_output_pixel_depends_on_distant_pixels() -> None:
    generator, x = Generator(lama_weights()), source(256, 256)
    other = x.clone()
    other[..., :8, :8] = 1
    changed = (painted(generator, x) - painted(generator, other)).abs()[..., -8:, -8:]  # beyond the reach of convolutions
    assert changed.max() > 1e-6


def test_generator_accepts_the_smallest_size() -> None:
    assert painted(Generator(lama_weights()), source(16, 16)).shape == (1, 3, 16, 16)


def test_fourier_unit_is_a_convolution_of_the_spectrum() -> None:
    """Chi et al., figure 2 and section 3.3, in numpy: channels are real and imaginary parts, alternating."""
    prefix = f"{PREFIX}5.conv1.ffc.convg2g.fu."
    weights = {name.removeprefix(prefix): value for name, value in lama_weights().items() if name.startswith(prefix)}
    unit = Fourier(weights)
    unit.load_state_dict(weights)
    unit.eval()
    x = torch.rand((1, len(weights["bn.weight"]) // 2, 6, 10), generator=torch.Generator().manual_seed(0))
    waves = np.fft.rfft2(x[0].numpy(), norm="ortho")
    parts = np.stack([waves.real, waves.imag], axis=1).reshape(-1, *waves.shape[1:])
    mixed = np.einsum("oi,ihw->ohw", weights["conv_layer.weight"][:, :, 0, 0].numpy(), parts)
    mean, variance, gain, bias = (weights[f"bn.{name}"].numpy() for name in ("running_mean", "running_var", "weight", "bias"))
    normed = (mixed - mean[:, None, None]) / np.sqrt(variance + 1e-5)[:, None, None] * gain[:, None, None] + bias[:, None, None]
    parts = np.maximum(normed, 0).reshape(-1, 2, *waves.shape[1:])
    expected = np.fft.irfft2(parts[:, 0] + 1j * parts[:, 1], s=x.shape[2:], norm="ortho")
    with torch.inference_mode():
        assert np.allclose(unit(x)[0].numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fourier_transform_runs_in_fp32_in_a_half_precision_model(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    dtypes: set[torch.dtype] = set()

    def watched(x: Tensor, **arguments: Any) -> Tensor:
        dtypes.add(x.dtype)
        return transform(x, **arguments)

    transform = torch.fft.rfft2
    x, weights = source(), lama_weights()
    exact = painted(Generator(weights), x)
    monkeypatch.setattr(torch.fft, "rfft2", watched)
    result = painted(Generator(weights).fold().to(dtype), x.to(dtype))
    assert dtypes == {torch.float32}
    assert result.dtype is dtype
    assert (result.float() - exact).abs().max() < 0.1


def test_opening_and_running_leave_the_random_state_unchanged() -> None:
    state = torch.random.get_rng_state()
    painted(Generator(lama_weights()).fold(), source())
    assert torch.equal(torch.random.get_rng_state(), state)


def changed(**changes: Tensor | None) -> dict[str, Tensor]:
    """A small generator's weights with some replaced, or removed (None); `__` stands for a dot."""
    by_name = {PREFIX + name.removeprefix("_").replace("__", "."): tensor for name, tensor in changes.items()}
    merged: dict[str, Tensor | None] = {**lama_weights(), **by_name}
    return {name: tensor for name, tensor in merged.items() if tensor is not None}


@pytest.mark.parametrize(
    "weights",
    [
        {},
        {"some.other.weight": torch.ones(2)},
        {f"{PREFIX}first.weight": torch.ones(2)},
        changed(_1__ffc__convl2l__weight=None),
        changed(_5__conv1__ffc__convg2g__fu__bn__weight=None),
        changed(_5__conv1__ffc__convg2g__lfu__conv_layer__weight=torch.ones(8, 8, 1, 1)),
        changed(_2__bn_l__running_mean=torch.ones(3)),
        {name: tensor for name, tensor in lama_weights().items() if ".bn_l." not in name},
        {name: tensor for name, tensor in lama_weights().items() if not name.startswith(f"{PREFIX}17.")},
    ],
    ids=[
        "none",
        "other names",
        "no layer number",
        "no first layer",
        "no norm",
        "local Fourier unit",
        "wrong length",
        "no local norms",
        "no last layer",
    ],
)
def test_weights_of_another_model_are_rejected(weights: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match="not the weights of LaMa's generator"):
        Generator(weights)
