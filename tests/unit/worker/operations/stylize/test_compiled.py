"""Compiled models, and work in tiles when memory is short."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0

from imagemill.shared.errors import OutOfMemory
from imagemill.shared.settings import DiffusionSettings
from imagemill.worker.hardware.device import Device
from imagemill.worker.operations.stylize import pipeline as module
from imagemill.worker.operations.stylize.buckets import bucket
from imagemill.worker.operations.stylize.pipeline import Canvas
from tests.devices import SHORT
from tests.styles import difference, loaded, prepared, styled
from tests.unit.worker.operations.conformance import scene


def test_compiled_model_uses_coarser_buckets(weights: Path) -> None:
    operation = loaded(weights, compiled=True)
    shape = prepared(operation, size=512).samples[0].data.pixels.shape[:2]
    assert shape[::-1] == bucket((120, 90), 512, 64)
    assert all(side % 64 == 0 for side in shape)


def test_compiled_model_is_warmed_up_for_each_size(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **_: compiled.append(type(self).__name__))
    shapes: list[tuple[Any, ...]] = []
    run = module.Pipeline._run

    def watched(self: module.Pipeline, canvases: list[Canvas], options: Any) -> Any:
        shapes.append((len(canvases), canvases[0].pixels.shape[:2], options.cfg > 1))
        return run(self, canvases, options)

    monkeypatch.setattr(module.Pipeline, "_run", watched)
    styled(loaded(weights, compiled=True, warm_up=["64x128", "64x64"]))
    assert compiled == ["UNet2DConditionModel", "Decoder", "ControlNetModel"]
    assert shapes[:4] == [(1, (128, 64), True), (1, (128, 64), False), (1, (64, 64), True), (1, (64, 64), False)]


def test_warm_up_stops_at_the_batch_size_that_fits_into_memory(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *_, **__: None)
    ran: list[tuple[int, float]] = []
    room = 4

    def short(_: module.Pipeline, canvases: list[Canvas], options: Any) -> Any:
        ran.append((len(canvases), options.cfg))
        if len(canvases) * options.cfg > room:
            raise SHORT["torch"]()
        return []

    monkeypatch.setattr(module.Pipeline, "_run", short)
    monkeypatch.setattr(module, "torch_device", lambda *_: torch.device("cpu"))
    device = Device(gpu=0, weights=weights, dtype="fp32", compile=True, diffusion=DiffusionSettings(warm_up=("64x64",)))
    module.Pipeline("sd15-canny", device)
    assert ran == [(1, 2), (2, 2), (4, 2), (1, 1), (2, 1), (4, 1), (8, 1)]
    room = 0
    with pytest.raises(OutOfMemory):
        module.Pipeline("sd15-canny", device)


def test_model_is_compiled_for_each_shape(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: Counter[str] = Counter()
    build = torch.nn.Module.compile

    def traced(part: torch.nn.Module, **how: Any) -> None:
        def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
            def run(*chosen: Any) -> Any:
                compiled[type(part).__name__] += 1
                return graph(*chosen)

            return run

        build(part, backend=backend, **how)

    monkeypatch.setattr(torch.nn.Module, "compile", traced)
    with torch._dynamo.config.patch(recompile_limit=1):  # lower than torch's limit of eight, so that two shapes exceed it
        device = Device(weights=weights, compile=True, diffusion=DiffusionSettings(warm_up=("64x64",)))
        module.Pipeline("sd15-canny", device)
    torch._dynamo.reset()
    assert compiled == {"UNet2DConditionModel": 2, "ControlNetModel": 2, "Decoder": 2}, "with guidance and without"


def test_vae_works_in_tiles_for_large_images_and_when_memory_is_short(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    operation = loaded(weights)
    plain = styled(operation)
    pipeline = operation._pipeline.current
    assert pipeline is not None
    pipe = pipeline._text
    assert not pipe.vae.use_tiling
    monkeypatch.setattr(module, "TILED_ABOVE", 64 * 64 - 1)
    styled(operation, scene(50, 50))
    assert pipe.vae.use_tiling
    monkeypatch.undo()
    assert np.array_equal(styled(operation), plain)
    assert not pipe.vae.use_tiling
    assert attention(pipeline) == {AttnProcessor2_0}, "torch's fused attention"
    for level in (1, 2):
        assert operation.relieve(level)
        result = styled(operation)
        assert pipe.vae.use_tiling
        assert pipe.vae.use_slicing
        assert difference(result, plain) < 3
    assert not operation.relieve(3)
    assert AttnProcessor2_0 not in attention(pipeline)
    assert operation.relieve(0)
    assert np.array_equal(styled(operation), plain)
    assert attention(pipeline) == {AttnProcessor2_0}


def attention(pipeline: module.Pipeline) -> set[type]:
    parts = pipeline._text.unet, *pipeline.controlnets.networks
    return {type(processor) for part in parts for processor in part.attn_processors.values()}
