from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import get_args
from urllib.parse import urlsplit

import pytest

from imagemill.shared.options.remove_background import RembgModel
from imagemill.shared.settings import WeightsSettings
from imagemill.worker.models import files as module
from imagemill.worker.models.catalogue import CONVERTED, WEIGHTS
from imagemill.worker.models.checksums import check, digest
from imagemill.worker.models.files import (
    forget_variants,
    is_current,
    made_of,
    model_file,
    needed,
    path_of,
    put_on_record,
    state,
    variant,
)

U2NET = WEIGHTS[0]


@pytest.fixture
def original(tmp_path: Path) -> Path:
    """A file where nodes look for u2net, with tmp_path as the weights' folder."""
    path = path_of(U2NET, WeightsSettings(folder=tmp_path))
    path.parent.mkdir()
    path.write_bytes(b"weights")
    return path


def make(original: Path, kind: module.Kind, content: bytes = b"made") -> Path:
    variant(original, kind).write_bytes(content)
    put_on_record(original, kind, accepted=True, told={"why": "a test"})
    return variant(original, kind)


@pytest.mark.parametrize("weights", WEIGHTS, ids=lambda weights: weights.name)
def test_every_row_is_pinned_checked_and_from_a_safe_place(weights: module.Weights) -> None:
    kind, _, digits = weights.checksum.partition(":")
    assert re.fullmatch(r"[0-9a-f]+", digits)
    assert len(digits) == hashlib.new(kind).digest_size * 2
    parts = urlsplit(weights.url)
    assert parts.scheme == "https"
    assert f"/{weights.revision}/" in parts.path
    assert parts.path.endswith(f"/{weights.file}")
    assert Path(weights.file).suffix == ".onnx" or weights.engine in CONVERTED  # no node loads a format that holds code
    assert weights.licence


def test_names_are_unique_within_the_table() -> None:
    assert len({weights.name for weights in WEIGHTS}) == len(WEIGHTS)


def test_what_options_can_select_is_what_may_be_used_commercially() -> None:
    selectable = {weights.name for weights in WEIGHTS if weights.engine == "rembg" and weights.commercial}
    assert selectable == set(get_args(RembgModel))


def test_a_digest_is_computed_once_and_again_when_the_file_changes(original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert digest(original) == hashlib.sha256(b"weights").hexdigest()
    with monkeypatch.context() as patched:
        patched.setattr(module, "blocks", lambda _: pytest.fail("read again"))
        assert digest(original) == hashlib.sha256(b"weights").hexdigest()
    original.write_bytes(b"another")  # of the same length
    os.utime(original, ns=(1, 1))
    assert digest(original) == hashlib.sha256(b"another").hexdigest()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"size": 7}', '{"sha256": "0", "size": 1, "mtime_ns": 1, "checksum": ""}'])
def test_a_damaged_note_about_a_digest_is_not_believed(original: Path, content: str) -> None:
    digest(original)
    (note,) = original.parent.glob("*.sums.json")
    note.write_text(content)
    assert digest(original) == hashlib.sha256(b"weights").hexdigest()


def test_where_nothing_can_be_written_a_process_computes_a_digest_once(original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, content: object) -> None:
        raise OSError("read-only file system")

    monkeypatch.setattr(module, "write_json", refuse)
    assert digest(original) == hashlib.sha256(b"weights").hexdigest()
    assert not list(original.parent.glob("*.json"))
    with monkeypatch.context() as patched:
        patched.setattr(module, "blocks", lambda _: pytest.fail("read again"))
        assert digest(original) == hashlib.sha256(b"weights").hexdigest()
    original.write_bytes(b"another file")
    assert digest(original) == hashlib.sha256(b"another file").hexdigest()


def test_what_is_known_of_a_file_shows_in_its_state(tmp_path: Path, original: Path) -> None:
    settings = WeightsSettings(folder=tmp_path)
    right = module.Weights(**{**vars(U2NET), "checksum": f"md5:{hashlib.md5(b'weights', usedforsecurity=False).hexdigest()}"})
    assert state(right, settings) == "unchecked"
    digest(original)  # says nothing about the publisher's checksum
    assert state(right, settings) == "unchecked"
    check(original, right.checksum)
    assert state(right, settings) == "there"
    assert state(U2NET, settings) == "damaged"
    original.unlink()
    assert state(right, settings) == "missing"


def test_a_node_loads_the_best_file_that_was_made_of_the_one_that_is_there(tmp_path: Path, original: Path) -> None:
    def chosen(*, int8: bool = False) -> Path:
        return model_file(tmp_path, "rembg", "u2net", int8=int8)

    assert chosen(int8=True) == original
    dynamic = make(original, "dynamic")
    assert (chosen(), chosen(int8=True)) == (dynamic, dynamic)
    int8 = make(original, "int8")
    assert (chosen(), chosen(int8=True)) == (dynamic, int8)
    original.write_bytes(b"other weights")
    assert chosen(int8=True) == original


def test_what_was_refused_is_on_record_and_not_used(tmp_path: Path, original: Path) -> None:
    put_on_record(original, "dynamic", accepted=False, told={"told": "it differs"})
    variant(original, "dynamic").write_bytes(b"left behind")
    assert not is_current(original, "dynamic")
    assert made_of(original, "dynamic")["told"] == "it differs"


def test_forgetting_leaves_nothing_but_the_original(original: Path) -> None:
    make(original, "dynamic")
    make(original, "int8")
    forget_variants(original)
    assert {path.name for path in original.parent.iterdir()} == {"u2net.onnx", "u2net.onnx.sums.json"}


def test_of_a_model_that_is_converted_nodes_load_what_was_made_of_it_and_nothing_else(tmp_path: Path) -> None:
    settings, (lama,) = WeightsSettings(folder=tmp_path), [weights for weights in WEIGHTS if weights.engine == "lama"]
    original, loaded = path_of(lama, settings), tmp_path / "lama" / "lama.safetensors"
    assert needed(lama, settings) == variant(original, "safetensors") == loaded
    assert model_file(tmp_path, "lama", "lama") == model_file(tmp_path, "lama", "lama", int8=True) == loaded
    assert needed(U2NET, settings) == path_of(U2NET, settings)
    assert state(lama, settings) == "missing"
    original.parent.mkdir()
    original.write_bytes(b"published")
    assert state(lama, settings) == "unconverted"
    loaded.write_bytes(b"converted")
    assert state(lama, settings) == "unchecked"
    check(original, lama.checksum)
    assert state(lama, settings) == "damaged"
    original.unlink()
    assert state(lama, settings) == "unchecked", "somebody's own"
