"""Repeatable results: the same image and options give the same pixels, alone, in any batch and on any worker."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from imagemill.worker.line.batch_sizes import kind_of
from imagemill.worker.operations.stylize.buckets import inside
from imagemill.worker.operations.stylize.diffusion import Diffusion
from imagemill.worker.operations.stylize.pipeline import Canvas, parts
from tests.styles import difference, loaded, prepared, styled
from tests.unit.worker.operations.conformance import scene

LONG = "a (red:1.3) shoe BREAK " + "in a shop, " * 10
TEXT = {"mode": "text-to-image"}
XL = {"model": "sdxl"}
STYLES: list[dict[str, Any]] = [
    *({"scheduler": scheduler} for scheduler in ("unipc", "ddim", "euler", "lcm")),
    *({"scheduler": scheduler, **TEXT} for scheduler in ("unipc", "ddim", "euler-trailing", "lcm")),
    {"control": "canny:0.9;tile:0.4", "prompt": LONG},
    {"control": "none", "prompt": LONG},
    {"control": "none", **TEXT},
    {**XL, "prompt": LONG},
    {**XL, **TEXT, "control": "scribble;canny:0.3", "loras": "xl"},
    {**XL, "control": "none", "cfg": 1, "scheduler": "euler-trailing"},
    {**XL, **TEXT, "control": "none"},
]


@pytest.fixture(scope="module")
def other(weights: Path) -> Diffusion:
    """Another worker, with more threads."""
    return loaded(weights, threads=3)


@pytest.mark.parametrize("chosen", STYLES, ids=str)
def test_result_is_identical_alone_in_any_batch_and_on_any_worker(
    chosen: dict[str, Any], operation: Diffusion, other: Diffusion
) -> None:
    works = [prepared(operation, scene(90, 120, seed=seed), index=seed, seed_policy="per-item", **chosen) for seed in range(3)]
    alone = [operation.run(work.samples)[0].pixels for work in works]
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
    assert np.array_equal(one.data.controls[0], two.data.controls[0])
    assert (two.options, two.footprint, operation.group_key(two)) == (one.options, one.footprint, operation.group_key(one))
    assert (other.plan, other.evidence) == (work.plan, work.evidence)
    result = operation.finish(other, operation.run(other.samples)).pixels
    assert np.array_equal(result, styled(operation, seed=0))


def test_evidence_holds_the_edges_given_to_the_controlnet(operation: Diffusion) -> None:
    for shape, size in (((90, 120), (56, 72)), ((50, 400), (32, 128))):  # the picture's; the bucket's
        work = prepared(operation, scene(*shape))
        assert work.evidence.comparable
        edges, whole = work.evidence.edges, work.samples[0].data.controls[0]
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
    chosen = (
        {},
        {"deterministic": True},
        {"cfg": 1},
        {"size": 128},
        {"prompt": "shoe " * 70},
        {"negative_prompt": "a BREAK " * 5},
        {"control": "none"},
        {"control": "canny;tile"},
        {"model": "sdxl", "size": 64},
    )
    samples = [sample for one in chosen for sample in prepared(operation, **one).samples]
    assert len({kind_of(operation, sample) for sample in samples}) == len(chosen)
    (styles,) = prepared(operation, loras="red", prompt="blue", steps=3, control="tile:0.3").samples
    assert kind_of(operation, styles) == kind_of(operation, samples[0])


def test_result_in_a_real_batch_is_close_to_the_result_alone(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    operation = loaded(weights)
    drawings = [
        None,
        scene(90, 120, seed=7),
        None,
        scene(45, 60, seed=8),
    ]  # some have control images of their own
    works = [prepared(operation, scene(90, 120, seed=seed), own=own) for seed, own in enumerate(drawings)]
    assert len({operation.group_key(work.samples[0]) for work in works}) == 1
    alone = [operation.run(work.samples)[0].pixels for work in works]
    monkeypatch.setattr(operation._pipeline.current, "_on_cpu", False)
    together = operation.run([work.samples[0] for work in works])
    assert max(np.abs(result.pixels.astype(int) - one).max() for result, one in zip(together, alone, strict=True)) <= 2


@pytest.mark.parametrize("count", range(1, 40))
def test_parts_are_powers_of_two_and_cover_all_images(count: int) -> None:
    found = list(parts(count, 16))
    assert [place for some in found for place in range(count)[some]] == list(range(count))
    assert all((some.stop - some.start) in (1, 2, 4, 8, 16) for some in found)
