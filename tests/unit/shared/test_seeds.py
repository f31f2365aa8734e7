"""Seeds of images under each policy."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from imagemill.shared.options.stylize import DiffusionStylize, OpencvStylize
from imagemill.shared.seeds import SEEDS, item_seed, next_seed

SOURCE = "https://images.example/a.jpg"


def seed(policy: str, *, seed: int = 7, index: int = 0, source: str = SOURCE) -> int | None:
    return item_seed(DiffusionStylize.model_validate({"seed": seed, "seed_policy": policy}), index, source)


def test_seed_depends_on_nothing_position_or_url() -> None:
    assert {seed("fixed", index=index, source=f"{SOURCE}{index}") for index in range(5)} == {7}
    assert [seed("per-item", index=index) for index in range(3)] == [7, 8, 9]
    assert seed("url", index=3) == seed("url", index=9) != seed("url", source=f"{SOURCE}x")
    assert seed("url") != seed("url", seed=8)


def test_query_of_the_url_does_not_change_the_seed() -> None:
    assert (
        seed("url", source=f"{SOURCE}?X-Amz-Signature=1") == seed("url", source=f"{SOURCE}?X-Amz-Signature=2#x") == seed("url")
    )


def test_engine_without_randomness_has_no_seed() -> None:
    assert item_seed(OpencvStylize(), 0, SOURCE) is None


def test_seed_of_a_url_never_changes() -> None:
    assert seed("url", seed=42) == 3_649_458_495


def test_next_seed_differs_and_stays_in_range() -> None:
    assert [next_seed(seed) for seed in (0, 7, SEEDS - 1)] == [1, 8, 0]


@given(st.sampled_from(["fixed", "per-item", "url"]), st.integers(0, SEEDS - 1), st.integers(0, 10**9), st.text(max_size=30))
def test_seed_stays_in_range(policy: str, base: int, index: int, path: str) -> None:
    value = seed(policy, seed=base, index=index, source=f"https://images.example/{path}")
    assert value is not None
    assert 0 <= value < SEEDS
