"""The tree of errors, whose codes and exit codes are public."""

from __future__ import annotations

import inspect
import pickle
import re

import pytest

from imagemill.shared import errors
from imagemill.shared.errors import ImageError, ImagemillError, InvalidSource, ServiceUnavailable, UsageError, leaves, sentence

ALL = [value for value in vars(errors).values() if inspect.isclass(value) and issubclass(value, ImagemillError)]
LEAVES = list(leaves(ImagemillError))
TREE = (errors.__doc__ or "").split("Each leaf")[0]


def names(kinds: list[type[ImagemillError]]) -> list[str]:
    return [kind.__name__ for kind in kinds]


@pytest.mark.parametrize("kind", ALL, ids=names(ALL))
def test_error_survives_pickling(kind: type[ImagemillError]) -> None:
    again = pickle.loads(pickle.dumps(kind("the mask of 'a.jpg' is missing")))  # noqa: S301  # our own bytes
    assert type(again) is kind
    assert again.message == str(again) == "the mask of 'a.jpg' is missing"


def test_invalid_source_keeps_its_rows_when_pickled() -> None:
    again = pickle.loads(pickle.dumps(InvalidSource("2 rows", ["stdin:1", "stdin:2"])))  # noqa: S301  # our own bytes
    assert (again.message, again.rows) == ("2 rows", ("stdin:1", "stdin:2"))


def test_every_class_has_its_own_code() -> None:
    codes = [kind.__dict__.get("code") for kind in ALL]
    assert None not in codes, "a class inherits its parent's code"
    assert len(set(codes)) == len(codes)
    assert all(re.fullmatch(r"[a-z]+(_[a-z]+)*", code) for code in codes)


def test_public_codes_exist() -> None:
    public = {
        "invalid_option", "invalid_source", "job_not_found", "missing_extra", "configuration", "broker_unavailable",
        "unsupported_url", "forbidden_address", "access_denied", "not_found", "too_large", "too_many_redirects",
        "timeout", "unreachable", "server_error", "http_error", "empty_file", "not_an_image", "truncated",
        "too_many_pixels", "too_costly", "bad_mask", "bad_reference", "operation_failed", "out_of_memory",
        "storage_unavailable", "storage_full", "storage_refused", "worker_lost", "internal_error", "model_unavailable",
        "unsupported_format",
    }  # fmt: skip
    assert public <= {kind.code for kind in LEAVES}


@pytest.mark.parametrize("kind", ALL, ids=names(ALL))
def test_docstring_shows_every_error_below_its_parent(kind: type[ImagemillError]) -> None:
    lines = TREE.splitlines()
    (row,) = [n for n, line in enumerate(lines) if re.search(rf"\b{kind.__name__}\b", line)]
    if kind is ImagemillError:
        return
    parent = kind.__mro__[1].__name__
    depth = re.search(r"\w", lines[row]).start()  # type: ignore[union-attr]  # the name itself is in the line
    above = next(line for line in reversed(lines[:row]) if (word := re.search(r"\w", line)) and word.start() < depth)
    assert re.search(rf"\b{parent}\b", above)


def test_docstring_shows_no_unknown_errors() -> None:
    drawn = re.findall(
        r"\b(?:[A-Z][a-z0-9]+)+\b", re.sub(r"^    .*?(exit \d).*$", lambda m: m.group().split("exit")[0], TREE, flags=re.M)
    )
    assert set(drawn) - {"All"} == set(names(ALL))


@pytest.mark.parametrize("kind", ALL, ids=names(ALL))
def test_docstring_starts_with_one_sentence_for_the_documentation(kind: type[ImagemillError]) -> None:
    first = (kind.__doc__ or "").splitlines()[0]
    assert first[0].isupper()
    assert first.endswith(".")


def test_exit_codes_and_retries() -> None:
    assert all(kind.exit_code == 2 for kind in ALL if issubclass(kind, UsageError))
    assert all(kind.exit_code == 3 and kind.retryable for kind in ALL if issubclass(kind, ServiceUnavailable))
    retried = {kind.code for kind in ALL if issubclass(kind, ImageError) and kind.retryable}
    assert retried == {
        "timeout",
        "unreachable",
        "server_error",
        "storage_unavailable",
        "storage_full",
        "model_unavailable",
        "expired",
    }


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("first\nsecond"), "first"),
        (ValueError(), "ValueError"),
        (ValueError("x" * 999), "x" * 300),
        (ValueError("\n \n"), "ValueError"),
    ],
)
def test_sentence_is_one_short_line(error: Exception, text: str) -> None:
    assert sentence(error) == text
