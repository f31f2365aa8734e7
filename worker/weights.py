"""The models' files: where they come from, pinned and with checksums. Workers load from disk and never download."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from shared.settings import WeightsSettings

REMBG = "https://github.com/danielgatis/rembg/releases/download/v0.0.0"
"""The release that rembg itself downloads from; its files never change."""


@dataclass(frozen=True)
class Weights:
    """One file. `checksum` is `md5:...` or `sha256:...`, as its publisher gives it; `bytes` is None where it isn't known."""

    name: str
    engine: str
    file: str
    url: str
    checksum: str
    licence: str
    bytes: int | None = None
    commercial: bool = True


def _rembg(name: str, md5: str, licence: str, file: str | None = None) -> Weights:
    file = file or f"{name}.onnx"
    return Weights(name, "rembg", file, f"{REMBG}/{file}", f"md5:{md5}", licence)


WEIGHTS: tuple[Weights, ...] = (
    _rembg("u2net", "60024c5c889badc19c04ad937298a77b", "Apache-2.0"),
    _rembg("u2netp", "8e83ca70e441ab06c318d82300c84806", "Apache-2.0"),
    _rembg("u2net_human_seg", "c09ddc2e0104f800e3e1bb4652583d1f", "Apache-2.0"),
    _rembg("silueta", "55e59e0d8062d2f5d013f4725ee84782", "Apache-2.0"),
    _rembg("isnet-general-use", "fc16ebd8b0c10d971d3513d564d01e29", "Apache-2.0"),
    _rembg("isnet-anime", "6f184e756bb3bd901c8849220a83e38e", "Apache-2.0"),
    _rembg("birefnet-general", "7a35a0141cbbc80de11d9c9a28f52697", "MIT", "BiRefNet-general-epoch_244.onnx"),
    _rembg(
        "birefnet-general-lite", "4fab47adc4ff364be1713e97b7e66334", "MIT", "BiRefNet-general-bb_swin_v1_tiny-epoch_232.onnx"
    ),
)


def path_of(weights: Weights, settings: WeightsSettings) -> Path:
    """Where a model's file lies, or would: `{folder}/{engine}/{name}.onnx`."""
    return settings.folder.expanduser() / weights.engine / f"{weights.name}{Path(weights.file).suffix}"
