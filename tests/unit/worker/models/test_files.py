from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from imagemill.worker.models.catalogue import WEIGHTS, Weights
from imagemill.worker.models.checksums import digest, hash_file
from imagemill.worker.models.files import (
    Kind,
    is_current,
    model_file,
    path_of,
    record_variant,
    remove_variants,
    required_file,
    state,
    variant,
    variant_record,
)

U2NET = WEIGHTS[0]


@pytest.fixture
def original(tmp_path: Path) -> Path:
    """A file where nodes look for u2net, with tmp_path as the weights folder."""
    path = path_of(tmp_path, U2NET)
    path.parent.mkdir()
    path.write_bytes(b"weights")
    return path


def make(original: Path, kind: Kind, content: bytes = b"made") -> Path:
    variant(original, kind).write_bytes(content)
    record_variant(original, kind, accepted=True, details={"reason": "a test"})
    return variant(original, kind)


def test_state_depends_on_the_remembered_checksum(tmp_path: Path, original: Path) -> None:
    right = Weights(**{**vars(U2NET), "checksum": f"md5:{hashlib.md5(b'weights', usedforsecurity=False).hexdigest()}"})
    assert state(tmp_path, right) == "unchecked"
    digest(original)  # does not compute the publisher's checksum
    assert state(tmp_path, right) == "unchecked"
    hash_file(original, right.checksum)
    assert state(tmp_path, right) == "there"
    assert state(tmp_path, U2NET) == "damaged"
    original.unlink()
    assert state(tmp_path, right) == "missing"


def test_model_file_prefers_current_variants_of_the_original(tmp_path: Path, original: Path) -> None:
    def chosen(*, int8: bool = False) -> Path:
        return model_file(tmp_path, "rembg", "u2net", int8=int8)

    assert chosen(int8=True) == original
    dynamic = make(original, "dynamic")
    assert (chosen(), chosen(int8=True)) == (dynamic, dynamic)
    int8 = make(original, "int8")
    assert (chosen(), chosen(int8=True)) == (dynamic, int8)
    original.write_bytes(b"other weights")
    assert chosen(int8=True) == original


def test_refused_variant_is_recorded_and_not_used(tmp_path: Path, original: Path) -> None:
    record_variant(original, "dynamic", accepted=False, details={"reason": "it differs"})
    variant(original, "dynamic").write_bytes(b"left behind")
    assert not is_current(original, "dynamic")
    assert variant_record(original, "dynamic")["reason"] == "it differs"


def test_remove_variants_leaves_only_the_original(original: Path) -> None:
    make(original, "dynamic")
    make(original, "int8")
    remove_variants(original)
    assert {path.name for path in original.parent.iterdir()} == {"u2net.onnx", "u2net.onnx.sums.json"}


def test_nodes_load_only_the_converted_file_of_a_converted_model(tmp_path: Path) -> None:
    (lama,) = [weights for weights in WEIGHTS if weights.engine == "lama"]
    original, loaded = path_of(tmp_path, lama), tmp_path / "lama" / "lama.safetensors"
    assert required_file(tmp_path, lama) == variant(original, "safetensors") == loaded
    assert model_file(tmp_path, "lama", "lama") == model_file(tmp_path, "lama", "lama", int8=True) == loaded
    assert required_file(tmp_path, U2NET) == path_of(tmp_path, U2NET)
    assert state(tmp_path, lama) == "missing"
    original.parent.mkdir()
    original.write_bytes(b"published")
    assert state(tmp_path, lama) == "unconverted"
    loaded.write_bytes(b"converted")
    assert state(tmp_path, lama) == "unchecked"
    hash_file(original, lama.checksum)
    assert state(tmp_path, lama) == "damaged"
    original.unlink()
    assert state(tmp_path, lama) == "unchecked"  # converted from the operator's own file
