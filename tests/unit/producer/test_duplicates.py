"""The first row of its kind is found in memory and in the file alike."""

from __future__ import annotations

from hashlib import sha256

from hypothesis import given
from hypothesis import strategies as st

from imagemill.producer.duplicates import Firsts


@given(st.lists(st.integers(0, 12)), st.integers(0, 5))
def test_each_row_is_matched_with_the_first_of_its_kind(kinds: list[int], in_memory: int) -> None:
    firsts = Firsts(in_memory)
    found = [firsts.first(sha256(bytes([kind])).hexdigest(), index) for index, kind in enumerate(kinds)]
    assert found == [kinds.index(kind) for kind in kinds]
