from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from imagemill.worker.models.eight_bit_search import Reading, overlap


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [([1, 1, 0, 0], [1, 1, 0, 0], 1.0), ([1, 1, 0, 0], [0, 1, 1, 0], 1 / 3), ([1, 0], [0, 1], 0.0),
     ([0.6, 0.4], [0.9, 0.1], 1.0), ([1, 0], [0, 0], 0.0), ([0, 0], [1, 0], 0.0)],
)  # fmt: skip
def test_overlap_is_intersection_over_union_of_the_masks(one: list[float], other: list[float], expected: float) -> None:
    assert overlap(np.array(one, np.float32), np.array(other, np.float32)) == pytest.approx(expected)


def test_overlap_of_two_masks_of_hardly_anything_says_nothing() -> None:
    nothing, speck = np.zeros((100, 100), np.float32), np.zeros((100, 100), np.float32)
    speck[:7, :7] = 1
    assert overlap(nothing, nothing) is None
    assert overlap(speck, nothing) is None
    speck[:8, :8] = 1
    assert overlap(speck, nothing) == 0.0


def test_garments_are_read_as_a_mask_each(tmp_path: Path) -> None:
    output = np.zeros((4, 1, 5), np.float32)
    for place, garment in enumerate((0, 1, 1, 3, 2)):
        output[garment, 0, place] = 1
    masks = Reading.of(tmp_path, "u2net_cloth_seg").masks(output)
    assert masks.tolist() == [[[0, 1, 1, 0, 0]], [[0, 0, 0, 0, 1]], [[0, 0, 0, 1, 0]]]
