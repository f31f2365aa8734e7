"""Limits of the quality check: flags, how far results are outside, and limits set by a job."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from imagemill.shared.messages import ItemResult, Policy, compact
from imagemill.shared.options.base import OPERATIONS, Operation
from imagemill.shared.quality import LIMITS, RULES, Measures, Quality, beyond, flagged, flags_of

BAD = Measures(sharpness=1, kept=0.01, entropy=0.1, cast=40, opaque=0.001, half=0.4, step=30, edges=0.01)
SHARE = st.floats(0, 1)


@pytest.mark.parametrize(
    ("operation", "flags"),
    [
        ("remove-background", {"blurred", "cast", "empty", "faint"}),
        ("inpaint", {"seam"}),
        ("stylize", {"blank", "unlike"}),
    ],
)
def test_each_operation_has_its_own_limits(operation: Operation, flags: set[str]) -> None:
    assert set(beyond(BAD, Quality(), operation)) == flags


@pytest.mark.parametrize(
    ("limit", "flag"), [("least_sharpness", "blurred"), ("most_cast", "cast"), ("least_edges", "unlike"), ("most_step", "seam")]
)
def test_job_overrides_limits(limit: str, flag: str) -> None:
    assert flag in beyond(BAD, Quality.model_validate({limit: 0.5}), "stylize")


def test_excess_is_a_share_of_the_limit() -> None:
    strict = Quality(most_cast=4, least_sharpness=0.8)
    flags = beyond(Measures(cast=6, kept=0.6), strict, "stylize")
    assert flags == {"cast": pytest.approx(0.5), "blurred": pytest.approx(0.25)}
    assert beyond(Measures(cast=4, kept=0.8), strict, "stylize") == {}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_nothing_is_flagged_when_unmeasured_or_off(operation: Operation) -> None:
    assert beyond(Measures(), Quality(least_sharpness=10, most_cast=0), operation) == {}
    assert beyond(None, Quality(), operation) == {}
    assert beyond(BAD, Quality(mode="off"), operation) == {}


@given(
    measures=st.builds(
        Measures,
        kept=st.floats(0, 50),
        entropy=st.floats(0, 8),
        cast=st.floats(0, 100),
        opaque=SHARE,
        half=SHARE,
        step=st.floats(0, 256),
        edges=SHARE,
    ),
    operation=st.sampled_from(OPERATIONS),
)
def test_every_limit_has_a_value_that_never_flags(measures: Measures, operation: Operation) -> None:
    highest = dict(most_cast=100, most_step=256, most_opaque=1, most_faint=1)
    never = {name: highest.get(name, 0) for name in RULES}
    assert beyond(measures, Quality.model_validate(never), operation) == {}


def test_every_limit_has_a_rule_and_every_rule_a_limit() -> None:
    assert set(RULES) == set(Quality.model_fields) - {"mode"}
    assert {name for limits in LIMITS.values() for name in limits} <= set(RULES)


def test_flags_survive_in_notes() -> None:
    notes = ("empty_cutout", *flagged({"blurred": 0.1, "cast": 2.0}), "cached")
    assert notes == ("empty_cutout", "flag:blurred", "flag:cast", "cached")
    assert flags_of(notes) == ("blurred", "cast")


@pytest.mark.parametrize("wrong", [{"mode": "fix"}, {"most_cast": -1}, {"least_edges": 2}, {"sharpness": 1}])
def test_invalid_limits_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Quality.model_validate(wrong)


def test_default_mode_is_flag_and_results_store_only_present_measures() -> None:
    assert Policy().quality.mode == "flag"
    text = compact(ItemResult(index=0, state="done", quality=Measures(sharpness=12, kept=0.9)))
    assert text == '{"index":0,"state":"done","quality":{"sharpness":12.0,"kept":0.9}}'
    assert ItemResult.model_validate_json(text).quality == Measures(sharpness=12, kept=0.9)
