"""The engine on a small pipeline of real components: repeatable results, styles, sizes, limits and errors."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from billiard.exceptions import SoftTimeLimitExceeded
from diffusers.models.attention_processor import AttnProcessor2_0
from numpy.typing import NDArray

from imagemill.shared.engines import parse_options
from imagemill.shared.errors import ConfigurationError, OperationFailed, OutOfMemory, UnsafeContent
from imagemill.shared.messages import Item
from imagemill.shared.settings import DiffusionSettings
from imagemill.worker.hardware.device import Device
from imagemill.worker.imaging.picture import Picture, Pixels
from imagemill.worker.line.batch_sizes import BatchSizes, kind_of
from imagemill.worker.models.catalogue import repository
from imagemill.worker.models.repositories import folder_of
from imagemill.worker.operations.base import Inputs, Work
from imagemill.worker.operations.stylize import pipeline as module
from imagemill.worker.operations.stylize.buckets import bucket, inside
from imagemill.worker.operations.stylize.diffusion import Diffusion
from imagemill.worker.operations.stylize.palette import colours_of
from imagemill.worker.operations.stylize.pipeline import Canvas, parts
from tests.batches import run_batch
from tests.devices import SHORT
from tests.pipelines import lora_file, pipeline_folder
from tests.unit.worker.operations.conformance import REFERENCE, scene

QUICK = {"prompt": "a red shoe", "negative_prompt": "blurry", "size": 64, "steps": 2}
PHOTO = scene(90, 120)


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = pipeline_folder(tmp_path_factory.getbasetemp() / "weights", checker=True)
    for number, name in enumerate(("red", "green", "blue")):
        lora_file(folder / "diffusion" / "loras" / f"{name}.safetensors", folder, seed=number)
    return folder


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Run torch on one thread, also in tests that simulate a GPU."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def loaded(weights: Path, *, threads: int = 1, compiled: bool = False, **settings: Any) -> Diffusion:
    operation = Diffusion()
    operation.load(Device(threads=threads, weights=weights, compile=compiled, diffusion=DiffusionSettings(**settings)))
    return operation


@pytest.fixture(scope="module")
def operation(weights: Path) -> Diffusion:
    return loaded(weights)


def prepared(operation: Diffusion, pixels: Pixels = PHOTO, *, index: int = 0, source: str = "", **chosen: Any) -> Work:
    item = Item(index=index, source=source or "https://images.example/one.png")
    read = {REFERENCE: Picture(scene(30, 30, seed=3))}.__getitem__
    return operation.prepare(Picture(pixels), Inputs(item, parse_options("stylize", "diffusion", QUICK | chosen), read=read))


def styled(operation: Diffusion, pixels: Pixels = PHOTO, **chosen: Any) -> Pixels:
    work = prepared(operation, pixels, **chosen)
    (output,) = run_batch(operation, work.samples, BatchSizes())
    if isinstance(output, Exception):
        raise output
    return operation.finish(work, [output]).pixels


def difference(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
    return float(np.abs(one.astype(int) - other).mean())


# --- repeatable results -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", ["unipc", "ddim", "euler", "lcm"])
@pytest.mark.parametrize("mode", ["image-to-image", "text-to-image"])
def test_result_is_identical_alone_in_any_batch_and_on_any_worker(
    scheduler: str, mode: str, operation: Diffusion, weights: Path
) -> None:
    chosen = {"scheduler": scheduler, "mode": mode}
    works = [prepared(operation, scene(90, 120, seed=seed), index=seed, seed_policy="per-item", **chosen) for seed in range(3)]
    alone = [operation.run(work.samples)[0].pixels for work in works]
    other = loaded(weights, threads=3)
    for worker, order in ((operation, [0, 1, 2]), (other, [2, 0, 1])):
        together = worker.run([works[place].samples[0] for place in order])
        for place, result in zip(order, together, strict=True):
            assert np.array_equal(result.pixels, alone[place]), (place, order)


def test_global_random_state_is_neither_used_nor_changed(operation: Diffusion) -> None:
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    before = random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state().tolist()
    first = styled(operation, scheduler="lcm")
    assert (random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state().tolist()) == before
    torch.manual_seed(6)
    assert np.array_equal(styled(operation, scheduler="lcm"), first)
    assert not torch.are_deterministic_algorithms_enabled()


def test_seed_is_fixed_per_item_or_per_url_as_the_policy_asks(operation: Diffusion) -> None:
    def seeds(policy: str) -> list[int]:
        asked = [(0, "https://a.example/1.png"), (1, "https://a.example/2.png"), (2, "https://a.example/1.png?signature=x")]
        works = [prepared(operation, index=index, source=source, seed=7, seed_policy=policy) for index, source in asked]
        return [work.samples[0].data.seed for work in works]

    assert seeds("fixed") == [7, 7, 7]
    assert seeds("per-item") == [7, 8, 9]
    one, two, one_again = seeds("url")
    assert one == one_again != two
    assert difference(styled(operation, seed=1), styled(operation, seed=2)) > 1


def test_retry_differs_only_in_its_seed(operation: Diffusion) -> None:
    work = prepared(operation, seed=2**32 - 1)
    assert work.retry is not None
    other = work.retry()
    (one,), (two,) = work.samples, other.samples
    assert (one.data.seed, two.data.seed) == (2**32 - 1, 0)
    assert np.array_equal(one.data.pixels, two.data.pixels)
    assert np.array_equal(one.data.edges, two.data.edges)
    assert (two.options, two.footprint, operation.group_key(two)) == (one.options, one.footprint, operation.group_key(one))
    assert (other.plan, other.evidence) == (work.plan, work.evidence)
    result = operation.finish(other, operation.run(other.samples)).pixels
    assert np.array_equal(result, styled(operation, seed=0))


def test_evidence_holds_the_edges_given_to_the_controlnet(operation: Diffusion) -> None:
    for shape, size in (((90, 120), (56, 72)), ((50, 400), (32, 128))):  # the picture's; the bucket's
        work = prepared(operation, scene(*shape))
        assert work.evidence.comparable
        edges, whole = work.evidence.edges, work.samples[0].data.edges
        assert edges is not None
        assert whole.shape == size
        assert edges.shape == inside((shape[1], shape[0]), size[::-1])[::-1] != size, "without the filled part of the bucket"
        assert np.array_equal(edges, whole[: edges.shape[0], : edges.shape[1]])
    cropped = prepared(operation, crop="1x1").evidence
    assert not cropped.comparable, "a crop moves every pixel"
    assert cropped.edges is not None
    assert cropped.edges.shape == (64, 64)


def test_batch_runs_at_once_or_one_by_one_when_deterministic(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    operation = loaded(weights)
    styled(operation)
    pipeline = operation._pipeline.current
    assert pipeline is not None
    monkeypatch.setattr(pipeline, "_on_cpu", False)  # so that whole batches run
    seen: list[tuple[int, bool]] = []
    run = pipeline._run

    def watched(canvases: list[Canvas], options: Any) -> Any:
        seen.append((len(canvases), torch.are_deterministic_algorithms_enabled()))
        return run(canvases, options)

    monkeypatch.setattr(pipeline, "_run", watched)
    for deterministic in (True, False):
        samples = prepared(operation, deterministic=deterministic).samples * 3
        assert len(operation.run(samples)) == 3
    assert seen == [(1, True)] * 3 + [(3, False)]
    monkeypatch.setattr(pipeline, "_compiled", True)
    operation.run(samples)
    assert seen[4:] == [(2, False), (1, False)], "in batch sizes that are compiled"


def test_footprint_depends_on_options_that_change_memory(operation: Diffusion) -> None:
    chosen = ({}, {"deterministic": True}, {"cfg": 1}, {"size": 128})
    samples = [sample for one in chosen for sample in prepared(operation, **one).samples]
    assert len({kind_of(operation, sample) for sample in samples}) == 4
    (styles,) = prepared(operation, loras="red", prompt="blue", steps=3).samples
    assert kind_of(operation, styles) == kind_of(operation, samples[0])


def test_result_in_a_real_batch_is_close_to_the_result_alone(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    operation = loaded(weights)
    works = [prepared(operation, scene(90, 120, seed=seed)) for seed in range(4)]
    alone = [operation.run(work.samples)[0].pixels for work in works]
    monkeypatch.setattr(operation._pipeline.current, "_on_cpu", False)
    together = operation.run([work.samples[0] for work in works])
    assert max(np.abs(result.pixels.astype(int) - one).max() for result, one in zip(together, alone, strict=True)) <= 2


@pytest.mark.parametrize("count", range(1, 40))
def test_parts_are_powers_of_two_and_cover_all_images(count: int) -> None:
    found = list(parts(count, 16))
    assert [place for some in found for place in range(count)[some]] == list(range(count))
    assert all((some.stop - some.start) in (1, 2, 4, 8, 16) for some in found)


# --- options ----------------------------------------------------------------------------------------------------------


def test_each_style_option_changes_the_image(operation: Diffusion) -> None:
    plain = styled(operation)
    for chosen in (
        *({"prompt": "a blue hat"}, {"negative_prompt": "a hat"}, {"cfg": 3}, {"steps": 3}, {"strength": 0.9}),
        *({"control_scale": 0}, {"mode": "text-to-image"}, {"scheduler": "lcm"}, {"loras": "red:0.5"}),
    ):
        assert difference(plain, styled(operation, **chosen)) > 0.2, chosen
    assert np.array_equal(styled(operation), plain)


def test_canny_thresholds_change_the_image(operation: Diffusion) -> None:
    many, none = {"canny_low": 5, "canny_high": 10}, {"canny_low": 1000, "canny_high": 1000}
    assert set(np.unique(prepared(operation, **many).samples[0].data.edges)) == {0, 255}
    assert not prepared(operation, **none).samples[0].data.edges.any()
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


def test_prompt_is_encoded_once_per_job_and_a_truncated_one_gets_a_note(weights: Path) -> None:
    operation = loaded(weights)
    styled(operation)
    assert operation._pipeline.current is not None
    calls: list[int] = []
    handle = operation._pipeline.current._text.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    for _ in range(3):
        styled(operation)
    assert calls == []
    work = prepared(operation, prompt="shoe " * 100)
    operation.finish(work, operation.run(work.samples))
    assert work.notes == ["prompt_cut"]
    assert len(calls) == 2
    for number in range(30):
        styled(operation, prompt=f"shoe {number}", steps=1)
    assert len(operation._pipeline.current.prompts._known) <= 16
    handle.remove()


def test_reference_sets_the_palette_of_all_results(operation: Diffusion) -> None:
    target = colours_of(scene(30, 30, seed=3))
    for seed in range(2):
        result = colours_of(styled(operation, scene(90, 120, seed=seed), reference=REFERENCE))
        assert np.allclose(result.mean, target.mean, atol=6)
    assert not np.allclose(colours_of(styled(operation)).mean, target.mean, atol=6)


# --- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [({}, (120, 90)), ({"long_edge": 40}, (40, 30)), ({"crop": "1x1"}, (90, 90)), ({"crop": "1x2", "long_edge": 30}, (15, 30))],
)
def test_result_has_the_requested_size_or_the_source_size(
    chosen: dict[str, Any], expected: tuple[int, int], operation: Diffusion
) -> None:
    result = styled(operation, **chosen)
    assert result.shape == (expected[1], expected[0], 3)


def test_group_key_depends_on_options_and_bucket_only(operation: Diffusion) -> None:
    def key(pixels: Pixels = PHOTO, **chosen: Any) -> Any:
        return operation.group_key(prepared(operation, pixels, **chosen).samples[0])

    assert key() == key(scene(45, 60, seed=1), index=5)
    assert key(scene(91, 120)) == key(), "the same bucket"
    different = [key(), key(scene(120, 90)), *(key(**one) for one in ({"steps": 3}, {"scheduler": "ddim"}, {"loras": "red"}))]
    assert len(set(different)) == len(different)


def test_compiled_model_uses_coarser_buckets(weights: Path) -> None:
    operation = loaded(weights, compiled=True)
    shape = prepared(operation, size=512).samples[0].data.edges.shape
    assert shape[::-1] == bucket((120, 90), 512, 64)
    assert all(side % 64 == 0 for side in shape)


def test_compiled_model_is_warmed_up_for_each_size(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **_: compiled.append(type(self).__name__))
    shapes: list[tuple[Any, ...]] = []
    run = module.Pipeline._run

    def watched(self: module.Pipeline, canvases: list[Canvas], options: Any) -> Any:
        shapes.append((len(canvases), canvases[0].edges.shape, options.cfg > 1))
        return run(self, canvases, options)

    monkeypatch.setattr(module.Pipeline, "_run", watched)
    styled(loaded(weights, compiled=True, warm_up=["64x128", "64x64"]))
    assert compiled == ["UNet2DConditionModel", "ControlNetModel", "Decoder"]
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
    assert not operation.relieve(1), "no model is loaded"
    plain = styled(operation)
    pipe = operation._pipeline.current._text  # type: ignore[union-attr]
    assert not pipe.vae.use_tiling
    monkeypatch.setattr(module, "TILED_ABOVE", 64 * 64 - 1)
    styled(operation, scene(50, 50))
    assert pipe.vae.use_tiling
    monkeypatch.undo()
    assert np.array_equal(styled(operation), plain)
    assert not pipe.vae.use_tiling
    assert attention(pipe) == {AttnProcessor2_0}, "torch's fused attention"
    for level in (1, 2):
        assert operation.relieve(level)
        result = styled(operation)
        assert pipe.vae.use_tiling
        assert pipe.vae.use_slicing
        assert difference(result, plain) < 3
    assert not operation.relieve(3)
    assert AttnProcessor2_0 not in attention(pipe)
    assert operation.relieve(0)
    assert attention(pipe) == {AttnProcessor2_0}
    assert np.array_equal(styled(operation), plain)


def attention(pipe: Any) -> set[type]:
    return {type(processor) for part in (pipe.unet, pipe.controlnet) for processor in part.attn_processors.values()}


# --- LoRAs ------------------------------------------------------------------------------------------------------------


def test_least_recently_used_lora_is_dropped(weights: Path) -> None:
    operation = loaded(weights, loras=2)
    plain = styled(operation)
    pipeline = operation._pipeline.current
    assert pipeline is not None
    red = styled(operation, loras="red:0.5")
    green = styled(operation, loras="green:0.5")
    assert difference(red, green) > 0.2
    assert pipeline.loras.loaded == ["red", "green"]
    styled(operation, loras="red:0.5")
    blue = styled(operation, loras="blue:0.5")
    assert pipeline.loras.loaded == ["red", "blue"]
    assert set(pipeline._text.get_list_adapters()["unet"]) == {"red", "blue"}
    assert np.array_equal(styled(operation, loras="green:0.5"), green), "dropped and reloaded"
    assert np.array_equal(styled(operation, loras="blue:0.5"), blue)
    both = styled(operation, loras="red:0.5;green:0.5;blue:-1")
    assert pipeline.loras.loaded == ["red", "green", "blue"], "one style may need more than the limit"
    assert difference(both, red) > 0.2
    assert np.array_equal(styled(operation), plain), "without adapters, the result is the original one"
    assert operation._pipeline.current is pipeline


def test_missing_or_damaged_lora_fails_only_its_images(weights: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(weights, tmp_path / "weights")
    operation = loaded(folder)
    plain, red = styled(operation), styled(operation, loras="red")
    with pytest.raises(OperationFailed, match="the LoRA none is not on this node"):
        styled(operation, loras="red;none")
    (folder / "diffusion" / "loras" / "bad.safetensors").write_bytes(b"\x80\x04pickle")
    with pytest.raises(OperationFailed, match="the LoRA bad can't be used"):
        styled(operation, loras="red;bad")
    assert np.array_equal(styled(operation), plain), "the previous style is not left active"
    assert np.array_equal(styled(operation, loras="red"), red)


def test_soft_time_limit_is_not_reported_as_a_lora_error(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def late(*_: Any, **__: Any) -> Any:
        raise SoftTimeLimitExceeded

    operation = loaded(weights)
    styled(operation)
    with monkeypatch.context() as patched:
        patched.setattr(operation._pipeline.current._text, "load_lora_weights", late)  # type: ignore[union-attr]
        with pytest.raises(SoftTimeLimitExceeded):
            styled(operation, loras="red")
    assert np.array_equal(styled(operation, loras="red"), styled(loaded(weights), loras="red"))


def test_changed_lora_file_is_reloaded_and_changes_the_fingerprint(weights: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(weights, tmp_path / "weights")
    operation = loaded(folder)
    options = parse_options("stylize", "diffusion", QUICK | {"loras": "red"})
    before, fingerprint = styled(operation, loras="red"), operation.fingerprint(options)
    assert operation.fingerprint(options) == fingerprint
    lora_file(folder / "diffusion" / "loras" / "red.safetensors", folder, seed=9)
    assert operation.fingerprint(options) != fingerprint
    assert difference(styled(operation, loras="red"), before) > 0.2


# --- errors -----------------------------------------------------------------------------------------------------------


def test_load_without_the_model_names_the_pull_command(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="imagemill models pull sd15-canny"):
        loaded(tmp_path)


@pytest.mark.parametrize("part", ["tokenizer", "scheduler", "text_encoder", "model_index.json"])
def test_load_with_an_incomplete_model_names_the_pull_command(part: str, weights: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(weights, tmp_path / "weights")
    path = folder_of(folder, repository("sd15")) / part
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(ConfigurationError, match="imagemill models pull sd15-canny"):
        loaded(folder)


def test_damaged_model_is_a_configuration_error(weights: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(weights, tmp_path / "weights")
    next((folder_of(folder, repository("sd15")) / "unet").glob("*.safetensors")).write_bytes(b"<html>")
    with pytest.raises(ConfigurationError, match="the model sd15-canny can't be loaded"):
        loaded(folder).run(prepared(loaded(folder)).samples)


def test_pickle_is_never_loaded(weights: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(weights, tmp_path / "weights")
    unet = folder_of(folder, repository("sd15")) / "unet" / "diffusion_pytorch_model.safetensors"
    unet.rename(unet.with_suffix(".bin"))
    with pytest.raises(ConfigurationError):
        loaded(folder).run([])


def test_gpu_that_torch_can_not_use_is_a_configuration_error(weights: Path) -> None:
    operation = Diffusion()
    operation.load(Device(gpu=0, weights=weights))
    assert operation.spec.max_batch == 16
    with pytest.raises(ConfigurationError, match=r"was to run on gpu0, but .* can't"):
        operation.run(prepared(operation).samples)


def test_non_finite_output_fails_only_its_image(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    operation = loaded(weights)
    styled(operation)
    decode = operation._pipeline.current._text.vae.decode  # type: ignore[union-attr]
    spoilt = iter([True, False])

    def broken(latents: torch.Tensor, **more: Any) -> Any:
        (images,) = decode(latents, **more)
        return (images * float("nan") if next(spoilt) else images,)

    monkeypatch.setattr(operation._pipeline.current._text.vae, "decode", broken)  # type: ignore[union-attr]
    bad, good = operation.run(prepared(operation).samples * 2)
    assert isinstance(bad, OperationFailed)
    assert np.array_equal(good.pixels, operation_pixels(loaded(operation._device.weights)))


def operation_pixels(operation: Diffusion) -> Pixels:
    result: Pixels = operation.run(prepared(operation).samples)[0].pixels
    return result


@pytest.mark.parametrize("error", [error for name, error in SHORT.items() if not name.startswith("onnxruntime")])
def test_memory_errors_of_torch_become_out_of_memory(
    error: Callable[[], Exception], weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    operation = loaded(weights)

    def short(*_: Any, **__: Any) -> Any:
        raise error()

    with monkeypatch.context() as patched:
        patched.setattr(module.ControlNetModel, "from_pretrained", short)
        with pytest.raises(OutOfMemory, match="does not fit"):
            operation.run(prepared(operation).samples)
    styled(operation)
    monkeypatch.setattr(operation._pipeline.current._text.unet, "forward", short)  # type: ignore[union-attr]
    with pytest.raises(OutOfMemory):
        operation.run(prepared(operation).samples)


def test_safety_checker_rejects_unsafe_images_and_must_be_installed(weights: Path, tmp_path: Path) -> None:
    operation = loaded(weights, safety_checker=True)
    outputs = operation.run(prepared(operation).samples)
    checker = operation._pipeline.current._text.safety_checker  # type: ignore[union-attr]
    checker.concept_embeds_weights.data.fill_(-2.0)
    (refused,) = operation.run(prepared(operation).samples)
    checker.concept_embeds_weights.data.fill_(2.0)
    (passed,) = operation.run(prepared(operation).samples)
    assert isinstance(refused, UnsafeContent)
    assert not isinstance(passed, Exception)
    assert len(outputs) == 1
    folder = shutil.copytree(weights, tmp_path / "weights")
    shutil.rmtree(folder_of(folder, repository("sd15-safety-checker")))
    with pytest.raises(ConfigurationError, match="imagemill models pull sd15-safety-checker"):
        loaded(folder, safety_checker=True)


# --- fingerprint and results ------------------------------------------------------------------------------------------


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
    return [pipe.unet, pipe.controlnet, pipe.vae, pipe.text_encoder]


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


def test_transparency_is_kept_and_hidden_colours_have_no_influence(operation: Diffusion) -> None:
    pixels = scene(90, 120, channels=4, seed=1)
    pixels[:, 60:, 3] = 0
    result = styled(operation, pixels)
    assert np.array_equal(result[..., 3], pixels[..., 3])
    hidden = pixels.copy()
    hidden[:, 60:, :3] = 0
    assert np.array_equal(styled(operation, hidden), result)


def test_result_keeps_profile_and_format(operation: Diffusion) -> None:
    work = prepared(operation)
    work.plan = replace(work.plan, picture=replace(work.plan.picture, icc=b"profile", format="jpeg"))
    picture = operation.finish(work, operation.run(work.samples))
    assert (picture.icc, picture.format) == (b"profile", "jpeg")
