"""Building a job's spec from the flags of `imagemill submit`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from imagemill.producer.spec import job_spec, local_address, option_values, quality_values
from imagemill.shared.errors import InvalidOption
from imagemill.shared.options.base import Box
from imagemill.shared.quality import Quality

OUT: dict[str, Any] = {"url": "s3://results/x"}


def test_missing_values_take_their_defaults() -> None:
    nothing = {"format": None, "quality": None, "icc": None, "metadata": None, "key": None}
    job = job_spec("stylize", "opencv", {}, {**OUT, **nothing}, {"priority": None, "attempts": None})
    assert job == job_spec("stylize", "opencv", {}, OUT, {})
    assert (job.operation, job.engine, job.output.format, job.output.quality) == ("stylize", "opencv", "same", 90)
    assert (job.policy.priority, job.policy.attempts) == ("normal", 3)


def test_given_values_are_kept() -> None:
    output = {**OUT, "format": "webp", "quality": 70, "icc": "keep", "metadata": "none", "key": "{item}"}
    options = {"mask_dilate": "3", "method": "navier-stokes", "boxes": "1,2,3,4;0.1,0.1,0.5,0.5", "mask": "none"}
    job = job_spec("inpaint", "opencv", options, output, {"priority": "high", "attempts": 5})
    assert job.output.model_dump() == output
    assert job.policy.model_dump() == {
        "priority": "high", "owner": None, "not_before": None, "until": None, "attempts": 5, "batch": "throughput",
        "reuse": True, "quality": Quality().model_dump(),
    }  # fmt: skip
    told = job.options.model_dump(include={"mask_dilate", "method", "mask"})
    assert told == {"mask_dilate": 3, "method": "navier-stokes", "mask": None}
    assert job.options.boxes == (  # type: ignore[union-attr]
        Box(x=1, y=2, width=3, height=4), Box(x=0.1, y=0.1, width=0.5, height=0.5, unit="fraction"),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"operation": "stylise"}, "operation 'stylise'; did you mean 'stylize'?"),
        ({"engine": "open-cv"}, "stylize has no engine 'open-cv'; did you mean 'opencv'?"),
        ({"options": {"strenght": "1"}}, "has no option 'strenght'; did you mean 'strength'?"),
        ({"options": {"engine": "other"}}, "has no option 'engine'"),
        ({"options": {"strength": "2"}}, "strength: input should be less than or equal to 1, not '2'"),
        ({"options": {"style": "colour-transfer"}}, "style=colour-transfer"),
        ({"output": {"url": "https://results/x"}}, "output: url: "),
        ({"output": {**OUT, "quality": 0}}, "output: quality: "),
        ({"output": {**OUT, "key": "{job}"}}, "output: key: "),
        ({"policy": {"attempts": 11}}, "policy: attempts: input should be less than or equal to 10, not 11"),
    ],
)
def test_invalid_values_are_refused_in_one_line(changes: dict[str, Any], sentence: str) -> None:
    asked: dict[str, Any] = {"operation": "stylize", "engine": "opencv", "options": {}, "output": OUT, "policy": {}}
    with pytest.raises(InvalidOption) as caught:
        job_spec(**(asked | changes))
    assert sentence in caught.value.message
    assert "\n" not in caught.value.message


# --- --set and --mask ---


def test_settings_accept_dashes_and_the_last_one_wins() -> None:
    given = ["mask-dilate=3", " radius =5", "radius=7", "method=a=b", "colour="]
    assert option_values(given, None) == {"mask_dilate": "3", "radius": "7", "method": "a=b", "colour": ""}


@pytest.mark.parametrize("setting", ["radius", "=5", " = 5", ""])
def test_setting_without_name_or_value_is_refused(setting: str) -> None:
    with pytest.raises(InvalidOption, match="--set takes KEY=VALUE, not"):
        option_values([setting], None)


def test_image_paths_become_file_urls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    values = option_values(["reference=a b.png", "style=colour-transfer"], "masks/m.png")
    assert values == {
        "reference": f"{tmp_path.as_uri()}/a%20b.png", "mask": f"{tmp_path.as_uri()}/masks/m.png", "style": "colour-transfer",
    }  # fmt: skip


@pytest.mark.parametrize("address", ["https://example.com/m.png?a=b", "s3://bucket/m.png", "file:///srv/m.png", "none", "None"])
def test_image_urls_are_unchanged(address: str) -> None:
    assert option_values([], address) == {"mask": address}
    assert option_values([f"mask={address}"], None) == {"mask": address}


def test_mask_flag_overrides_the_setting() -> None:
    assert option_values(["mask=https://a/1.png"], "https://a/2.png") == {"mask": "https://a/2.png"}


@pytest.mark.parametrize("address", ["ftp://example.com/m.png", "https:///m.png", "https://user:hunter2@example.com/m.png", ""])
def test_invalid_image_url_is_refused_without_its_credentials(address: str) -> None:
    with pytest.raises(InvalidOption, match=r"^mask: ") as caught:
        option_values([], address)
    assert "hunter2" not in caught.value.message


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("s3://b/p", "s3://b/p"),
        ("file:///srv/x", "file:///srv/x"),
        ("nonsense://x", "nonsense://x"),
        ("", ""),
        ("/srv/a b", "file:///srv/a%20b"),
        ("/srv/x/../y", "file:///srv/y"),
        ("~user", "file:///here/~user"),
        ("out/ü#1?", "file:///here/out/%C3%BC%231%3F"),
    ],
)
def test_path_becomes_a_file_url(text: str, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert local_address(text) == address.replace("/here", str(tmp_path))


def test_symbolic_links_in_a_path_are_kept(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("elsewhere")
    assert local_address(f"{tmp_path}/link/a") == f"{tmp_path.as_uri()}/link/a"


# --- the check ---


def test_check_and_limits_become_the_policy() -> None:
    assert quality_values(None, []) is None
    given = quality_values("repair", ["most-cast=2.5", " least_edges = 0.3 "])
    job = job_spec("stylize", "opencv", {}, OUT, {"quality": given})
    assert job.policy.quality == Quality(mode="repair", most_cast=2.5, least_edges=0.3)
    assert job_spec("stylize", "opencv", {}, OUT, {"quality": None}).policy.quality == Quality()


@pytest.mark.parametrize(
    ("limit", "sentence"),
    [
        ("most_cats=1", "the check has no limit 'most_cats'; did you mean 'most_cast'?"),
        ("mode=off", "the check has no limit 'mode'"),
        ("most_cast", "--limit takes NAME=VALUE, not 'most_cast'"),
        ("most_cast=red", "policy: quality.most_cast: input should be a valid number"),
        ("least_edges=2", "policy: quality.least_edges: input should be less than or equal to 1, not '2'"),
    ],
)
def test_invalid_limit_is_refused(limit: str, sentence: str) -> None:
    with pytest.raises(InvalidOption) as caught:
        job_spec("stylize", "opencv", {}, OUT, {"quality": quality_values(None, [limit])})
    assert sentence in caught.value.message


def test_limit_is_refused_when_the_check_is_off() -> None:
    with pytest.raises(InvalidOption, match="--check off"):
        quality_values("off", ["most_cast=2"])
