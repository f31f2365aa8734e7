from __future__ import annotations

import pytest

from imagemill.producer.units import counted, duration, size


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (0.44, "0.4 s"),
        (12.3, "12 s"),
        (60, "1 min 0 s"),
        (185, "3 min 5 s"),
        (3599.6, "1 h 0 min"),
        (7800, "2 h 10 min"),
    ],
)
def test_duration_is_written_in_the_two_largest_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (999, "999 B"), (48_000, "48 kB"), (3_140_000, "3.1 MB")])
def test_size_is_written_with_a_decimal_unit(count: int, text: str) -> None:
    assert size(count) == text


@pytest.mark.parametrize(("number", "text"), [(0, "0 images"), (1, "1 image"), (12_000, "12,000 images")])
def test_count_has_thousands_separators_and_a_plural(number: int, text: str) -> None:
    assert counted(number, "image") == text
