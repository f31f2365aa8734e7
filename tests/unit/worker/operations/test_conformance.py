"""Every engine passes the conformance kit, with options for each of its code paths."""

from __future__ import annotations

from typing import Any

import pytest

from imagemill.shared.engines import ENGINES, parse_options
from imagemill.worker.hardware.device import Device
from imagemill.worker.operations import registry
from tests.generators import lama_file
from tests.models import weights_folder
from tests.pipelines import pipeline_folder
from tests.unit.worker.operations import conformance

MORE: dict[tuple[str, str], list[dict[str, Any]]] = {
    ("remove-background", "opencv"): [
        {"long_edge": 32, "feather": 0},
        {"long_edge": "none", "background": "#ff8000"},
    ],
    ("remove-background", "rembg"): [
        {"long_edge": 32, "background": "#ff8000"},
        {"long_edge": "original", "background_image": conformance.REFERENCE},
        {"alpha_matting": True, "shadow": True},
        {"mask_only": True},
        {"exact": True},
    ],
    ("inpaint", "opencv"): [
        {"method": "navier-stokes", "mask_dilate": 2, "mask_feather": 3},
        {"mask_feather": 200, "radius": 15},
    ],
    ("inpaint", "lama"): [
        {"mask_dilate": 2, "mask_feather": 3},
        {"strategy": "tile", "tile": 512, "mask_feather": 200},
        {"strategy": "resize", "tile": 512},
        {"strategy": "whole"},
    ],
    ("stylize", "diffusion"): [
        {"mode": "text-to-image", "scheduler": "euler", "cfg": 1},
        {"scheduler": "ddim", "seed_policy": "per-item", "reference": conformance.REFERENCE, "long_edge": 128},
    ],
    ("stylize", "opencv"): [
        {"style": "pencil-sketch", "strength": 0.5, "long_edge": 40},
        {"style": "pencil-sketch", "colour": True},
        {"style": "detail"},
        {"style": "colour-transfer", "reference": conformance.REFERENCE},
    ],
}
"""In addition to the defaults."""

SMALL: dict[tuple[str, str], dict[str, Any]] = {("stylize", "diffusion"): {"size": 64, "steps": 1}}
"""Overrides of defaults that would take minutes."""

PAIRS = [(row.operation, row.name) for row in ENGINES]
CASES = [(*pair, SMALL.get(pair, {}) | options) for pair in PAIRS for options in ({}, *MORE.get(pair, []))]


@pytest.mark.parametrize(("operation", "engine", "options"), CASES, ids=lambda value: str(value))
def test_engine_keeps_the_contract(
    operation: str, engine: str, options: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    weights = weights_folder(tmp_path_factory.getbasetemp() / "weights", *(["u2net"] if engine == "rembg" else []))
    if engine == "lama":
        lama_file(weights / "lama" / "lama.safetensors")
    if engine == "diffusion":
        pipeline_folder(weights)
    instance = registry.create(operation, engine)
    instance.load(Device(threads=1, weights=weights))
    assert (instance.spec.name, instance.spec.engine) == (operation, engine)
    conformance.check(instance, parse_options(operation, engine, options))
