"""Chunk sizes and job ids."""

from __future__ import annotations

import math
import re

from hypothesis import given
from hypothesis import strategies as st

from imagemill.producer.submission import chunk_size, new_job_id
from imagemill.shared.messages import Chunk

RATES = st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=8)


def test_chunk_has_32_images_when_no_rate_is_known() -> None:
    assert chunk_size(None, [], 0) == 32
    assert chunk_size(None, [], 4) == 32


def test_chunk_takes_one_worker_about_20_seconds() -> None:
    assert chunk_size(None, [2.0], 1) == 40
    assert chunk_size(None, [1.9, 2.0, 500.0], 3) == 40  # the median ignores one odd node


def test_small_job_is_shared_by_all_workers() -> None:
    assert chunk_size(10, [], 4) == 3
    assert chunk_size(3, [9.0], 8) == 1


@given(st.none() | st.integers(1, 10**7), RATES, st.integers(0, 64))
def test_chunk_has_1_to_256_images(images: int | None, rates: list[float], nodes: int) -> None:
    size = chunk_size(images, rates, nodes)
    assert 1 <= size <= 256
    if images is None or nodes == 0:
        assert size >= 8


@given(st.integers(1, 10**5), RATES, st.integers(1, 64))
def test_known_length_only_makes_chunks_smaller_and_reaches_every_worker(images: int, rates: list[float], nodes: int) -> None:
    size = chunk_size(images, rates, nodes)
    usual = chunk_size(None, rates, nodes)
    assert size <= usual
    if images >= nodes * usual:
        assert size == usual
    # Smaller chunks would not reach more workers.
    assert size == 1 or math.ceil(images / (size - 1)) > nodes or size == usual


@given(st.lists(st.floats(0.001, 1e4), min_size=1, max_size=8), st.floats(1.0, 10.0))
def test_faster_workers_get_larger_chunks(rates: list[float], times: float) -> None:
    assert chunk_size(None, [rate * times for rate in rates], 1) >= chunk_size(None, rates, 1)


def test_job_ids_are_unique_and_valid_in_messages() -> None:
    ids = {new_job_id() for _ in range(100)}
    assert len(ids) == 100
    for job in ids:
        assert re.fullmatch(r"\d{6}-[0-9a-f]{8}", job)
        assert Chunk(job=job, number=0, images=1).job == job
