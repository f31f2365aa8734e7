"""Sets of indexes as ranges."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from imagemill.shared.ledger.ranges import as_ranges, as_text, indexes_in

INDEXES = st.lists(st.integers(0, 60) | st.integers(0, 10**6))


def test_ranges_as_text() -> None:
    assert as_text(as_ranges([40, *range(32)])) == "0-32,40-41"
    assert as_text(as_ranges([])) == ""
    assert indexes_in("") == set()


@given(INDEXES)
def test_indexes_survive_as_text(indexes: list[int]) -> None:
    assert indexes_in(as_text(as_ranges(indexes))) == set(indexes)


@given(INDEXES)
def test_ranges_are_sorted_and_as_few_as_possible(indexes: list[int]) -> None:
    ranges = as_ranges(indexes)
    assert all(first < last for first, last in ranges)
    assert all(last < first for (_, last), (first, _) in itertools.pairwise(ranges))
