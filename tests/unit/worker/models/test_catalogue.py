from __future__ import annotations

import hashlib
import re
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from imagemill.shared.engines import REMBG_MODELS
from imagemill.worker.models.catalogue import CONVERTED, MODELS, REPOSITORIES, WEIGHTS, Repository, Weights


@pytest.mark.parametrize("weights", WEIGHTS, ids=lambda weights: weights.name)
def test_every_file_is_pinned_has_a_checksum_and_comes_over_https(weights: Weights) -> None:
    kind, _, digits = weights.checksum.partition(":")
    assert re.fullmatch(r"[0-9a-f]+", digits)
    assert len(digits) == hashlib.new(kind).digest_size * 2
    parts = urlsplit(weights.url)
    assert parts.scheme == "https"
    assert f"/{weights.revision}/" in parts.path
    assert parts.path.endswith(f"/{weights.file}")
    assert Path(weights.file).suffix == ".onnx" or weights.engine in CONVERTED  # nodes load no format that can contain code
    assert weights.licence


@pytest.mark.parametrize("entry", REPOSITORIES, ids=lambda entry: entry.name)
def test_every_repository_is_pinned_to_a_commit(entry: Repository) -> None:
    assert re.fullmatch("[0-9a-f]{40}", entry.revision)


def test_names_are_unique() -> None:
    names = [entry.name for entry in WEIGHTS] + [entry.name for entry in REPOSITORIES]
    assert len(set(names)) == len(names)


def test_options_select_only_models_for_commercial_use() -> None:
    selectable = {weights.name for weights in WEIGHTS if weights.engine == "rembg" and weights.commercial}
    assert selectable == {file for model in REMBG_MODELS for file in MODELS[model]}
