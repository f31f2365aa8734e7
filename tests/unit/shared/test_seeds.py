from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from imagemill.shared.options.stylize import DiffusionStylize, OpencvStylize
from imagemill.shared.seeds import SEEDS, item_seed, next_seed

SOURCE = "https://images.example/a.jpg"


def seed(policy: str, *, seed: int = 7, index: int = 0, source: str = SOURCE) -> int | None:
    return item_seed(DiffusionStylize.model_validate({"seed": seed, "seed_policy": policy}), index, source)


def test_fixed_is_one_for_all_per_item_hangs_on_the_place_and_url_on_the_address() -> None:
    assert {seed("fixed", index=index, source=f"{SOURCE}{index}") for index in range(5)} == {7}
    assert [seed("per-item", index=index) for index in range(3)] == [7, 8, 9]
    assert seed("url", index=3) == seed("url", index=9) != seed("url", source=f"{SOURCE}x")
    assert seed("url") != seed("url", seed=8)


def test_a_signature_in_an_address_changes_nothing() -> None:
    assert (
        seed("url", source=f"{SOURCE}?X-Amz-Signature=1") == seed("url", source=f"{SOURCE}?X-Amz-Signature=2#x") == seed("url")
    )


def test_where_nothing_is_random_there_is_no_seed() -> None:
    assert item_seed(OpencvStylize(), 0, SOURCE) is None


def test_the_seed_of_an_address_is_the_same_in_every_release() -> None:
    assert seed("url", seed=42) == 3_649_458_495


def test_the_next_seed_is_another_one_that_generators_take() -> None:
    assert [next_seed(seed) for seed in (0, 7, SEEDS - 1)] == [1, 8, 0]


@given(st.sampled_from(["fixed", "per-item", "url"]), st.integers(0, SEEDS - 1), st.integers(0, 10**9), st.text(max_size=30))
def test_a_seed_is_one_that_generators_take(policy: str, base: int, index: int, path: str) -> None:
    found = seed(policy, seed=base, index=index, source=f"https://images.example/{path}")
    assert found is not None
    assert 0 <= found < SEEDS
