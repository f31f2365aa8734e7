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
    """What a generator is given: pictures of noise with a hole."""
    made = torch.rand((batch, 4, height, width), generator=torch.Generator().manual_seed(seed))
    made[:, 3] = 0
    made[:, 3, height // 4 : height // 2, width // 4 : width // 2] = 1
    made[:, :3] *= 1 - made[:, 3:]
    return made


def painted(generator: Generator, x: Tensor) -> Tensor:
    with torch.inference_mode():
        return generator(x).clone()


def test_what_upstreams_own_generator_painted_is_reproduced() -> None:
    if not VECTORS.is_file():
        pytest.skip(f"{VECTORS} is not here")
    with np.load(VECTORS) as found:
        known = {name: torch.from_numpy(found[name]) for name in found.files}
    weights = {name.removeprefix("weight/"): value for name, value in known.items() if name.startswith("weight/")}
    x = torch.cat([known["image"] * (1 - known["mask"]), known["mask"]], dim=1)
    generator = Generator(weights)
    assert (painted(generator, x) - known["predicted"]).abs().max() <= 1e-5
    assert (painted(generator.fold(), x) - known["predicted"]).abs().max() <= 1e-5
    banded = Generator(weights, band=16 * x.shape[-1])
    assert (painted(banded, x) - known["predicted"]).abs().max() <= 1e-5


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_its_size_is_read_off_the_weights(size: dict[str, Any]) -> None:
    weights = lama_weights(**size)
    made = painted(Generator(weights), source(batch=2))
    assert made.shape == (2, 3, 32, 48)
    assert made.min() >= 0
    assert made.max() <= 1
    assert made.std() > 0.01
    assert {f"generator.{name}" for name in Generator(weights).state_dict()} == set(weights)


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_folding_the_batch_norms_changes_next_to_nothing(size: dict[str, Any]) -> None:
    weights = lama_weights(**size)
    before = {name: tensor.clone() for name, tensor in weights.items()}
    plain, folded = Generator(weights), Generator(weights).fold()
    assert not any(isinstance(part, nn.BatchNorm2d) for part in folded.modules())
    assert (painted(plain, source()) - painted(folded, source())).abs().max() <= 1e-4
    assert all(torch.equal(weights[name], tensor) for name, tensor in before.items()), "the caller's weights are his"


@settings(max_examples=20)
@given(
    levels=st.integers(1, 4),
    rows=st.integers(2, 12),
    columns=st.integers(2, 4),
    band=st.integers(1, 6000),
    batch=st.integers(1, 2),
)
def test_bands_give_what_the_whole_gives(levels: int, rows: int, columns: int, band: int, batch: int) -> None:
    weights = lama_weights(levels=levels, width=2)
    x = source(rows << levels, columns << levels, batch)
    whole, banded = painted(Generator(weights), x), painted(Generator(weights, band), x)
    assert banded.shape == whole.shape
    assert (banded - whole).abs().max() <= 1e-5


def test_a_picture_is_painted_alike_alone_and_in_company() -> None:
    generator, x = Generator(lama_weights()).fold(), source(batch=3)
    together = painted(generator, x)
    for place in range(3):
        assert (painted(generator, x[place : place + 1]) - together[place]).abs().max() <= 1e-6


def test_each_pixel_sees_the_whole_picture() -> None:
    generator, x = Generator(lama_weights()), source(256, 256)
    other = x.clone()
    other[..., :8, :8] = 1
    changed = (painted(generator, x) - painted(generator, other)).abs()[..., -8:, -8:]  # too far for its convolutions
    assert changed.max() > 1e-6


def test_the_smallest_picture() -> None:
    assert painted(Generator(lama_weights()), source(16, 16)).shape == (1, 3, 16, 16)


def test_the_fourier_unit_is_a_convolution_of_the_spectrum() -> None:
    """Chi et al., figure 2 and section 3.3, in numpy: real and imaginary parts are channels, in turns."""
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
    wanted = np.fft.irfft2(parts[:, 0] + 1j * parts[:, 1], s=x.shape[2:], norm="ortho")
    with torch.inference_mode():
        assert np.allclose(unit(x)[0].numpy(), wanted, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_transform_is_in_fp32_whatever_the_rest_is_in(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.dtype] = []

    def watched(x: Tensor, **more: Any) -> Tensor:
        seen.append(x.dtype)
        return transform(x, **more)

    transform = torch.fft.rfft2
    x, weights = source(), lama_weights()
    exact = painted(Generator(weights), x)
    monkeypatch.setattr(torch.fft, "rfft2", watched)
    made = painted(Generator(weights).fold().to(dtype), x.to(dtype))
    assert set(seen) == {torch.float32}
    assert made.dtype is dtype
    assert (made.float() - exact).abs().max() < 0.1


def test_opening_and_running_leave_the_random_numbers_alone() -> None:
    before = torch.random.get_rng_state()
    painted(Generator(lama_weights()).fold(), source())
    assert torch.equal(torch.random.get_rng_state(), before)


def changed(**changes: Tensor | None) -> dict[str, Tensor]:
    """A small generator's weights with others in their place, or without some; `__` stands for a dot."""
    renamed = {PREFIX + name.removeprefix("_").replace("__", "."): tensor for name, tensor in changes.items()}
    merged: dict[str, Tensor | None] = {**lama_weights(), **renamed}
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
        "others",
        "no number",
        "no first layer",
        "no norm",
        "a local Fourier unit",
        "another length",
        "no norms",
        "no end",
    ],
)
def test_weights_of_something_else_are_refused(weights: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match="not the weights of LaMa's generator"):
        Generator(weights)
