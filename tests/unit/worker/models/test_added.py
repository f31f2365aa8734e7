"""Records of models that an operator has added."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from imagemill.shared.errors import ConfigurationError
from imagemill.worker.models import added
from imagemill.worker.models.added import Added, AddedFile

SHA256 = "0" * 64


def record(weights: Path, name: str = "shop", **changed: Any) -> Added:
    """Write the record of an added matting model, and a file of a few bytes unless there is one."""
    path = weights / "rembg" / f"{name}.onnx"
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        path.write_bytes(b"onnx")
    file = AddedFile(path=f"rembg/{name}.onnx", size=path.stat().st_size, sha256=SHA256)
    fields: dict[str, Any] = {"kind": "matting", "family": "u2net", "files": (file,), "source": "a.onnx", **changed}
    made = Added(name=name, added=datetime.now(UTC), **fields)
    added.write(weights, made)
    return made


def test_record_is_found_by_name_and_known_to_its_engine(tmp_path: Path) -> None:
    assert added.find(tmp_path, "shop") is None
    made = record(tmp_path, parameters={"size": 320})
    assert added.find(tmp_path, "shop") == made
    assert made.engine == "rembg"
    assert added.selectable(tmp_path, "rembg") == [made]
    assert added.selectable(tmp_path, "lama") == []
    changed = record(tmp_path, parameters={"size": 512})
    assert added.find(tmp_path, "shop") == changed, "a replaced record is read again"


def test_model_is_here_while_its_files_have_their_sizes(tmp_path: Path) -> None:
    made, file = record(tmp_path), tmp_path / "rembg" / "shop.onnx"
    assert made.is_here(tmp_path)
    file.write_bytes(b"more than that")
    assert not made.is_here(tmp_path)
    file.unlink()
    assert not made.is_here(tmp_path)


def replaced(weights: Path, **changed: Any) -> None:
    path = added.record_path(weights, "shop")
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"version": 2}, "version: "),
        ({"surprise": 1}, "surprise: "),
        ({"kind": "segmentation"}, "kind: "),
        ({"files": []}, "files: "),
        ({"files": [{"path": "../secret", "size": 1, "sha256": SHA256}]}, "must lie within the weights folder"),
        ({"files": [{"path": "/etc/passwd", "size": 1, "sha256": SHA256}]}, "must lie within the weights folder"),
        ({"files": [{"path": "a", "size": 1, "sha256": "md5"}]}, "sha256"),
        ({"name": "other"}, "is the record of another model, other"),
    ],
)
def test_damaged_record_is_reported_and_the_others_stay(tmp_path: Path, changed: dict[str, Any], reason: str) -> None:
    record(tmp_path)
    other = record(tmp_path, "other")
    replaced(tmp_path, **changed)
    with pytest.raises(ConfigurationError, match=reason):
        added.find(tmp_path, "shop")
    found, (fault,) = added.everything(tmp_path)
    assert found == [other]
    assert reason in fault
    assert "imagemill models add shop SOURCE --replace" in fault


@pytest.mark.parametrize("content", ["", "no JSON", "[]", '{"name": 1}', "\x00"])
def test_file_that_is_not_a_record_is_reported(tmp_path: Path, content: str) -> None:
    record(tmp_path)
    added.record_path(tmp_path, "shop").write_text(content)
    found, (fault,) = added.everything(tmp_path)
    assert (found, "shop.json is damaged" in fault) == ([], True)


def test_name_that_the_catalogue_now_has_is_reported(tmp_path: Path) -> None:
    record(tmp_path, "u2netp")
    found, (fault,) = added.everything(tmp_path)
    assert (found, "u2netp is now in imagemill's own catalogue" in fault) == ([], True)
