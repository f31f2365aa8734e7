from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from imagemill.shared.errors import ConfigurationError
from imagemill.worker.models import conversion as module
from imagemill.worker.models.conversion import convert, read
from imagemill.worker.models.torch_archive import MOST
from imagemill.worker.operations.inpaint.lama_generator import PREFIX
from tests.generators import lama_checkpoint, lama_file, lama_script, lama_weights

WEIGHTS = lama_weights()
FIRST = f"{PREFIX}1.ffc.convl2l.weight"
WRITERS: dict[str, Callable[[Path], Path]] = {
    "safetensors": lama_file,
    "a checkpoint": lama_checkpoint,
    "TorchScript": lama_script,
    "a zip file": lambda path: zipped(path, lama_checkpoint(path.with_suffix(".ckpt"))),
}


def zipped(path: Path, *members: Path) -> Path:
    """As big-lama.zip is: compressed, in a folder, with other files."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("big-lama/config.yaml", "generator:\n  kind: ffc_resnet\n")
        for member in members:
            archive.write(member, f"big-lama/models/{member.name}")
    return path


def same(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_read_returns_exact_weights_from_every_format(write: Callable[[Path], Path], tmp_path: Path) -> None:
    assert same(read(write(tmp_path / "weights")), WEIGHTS)


@pytest.mark.parametrize("prefix", ["", "generator.", "state_dict.generator.", "model.generator."])
def test_read_ignores_the_prefix_of_names(prefix: str, tmp_path: Path) -> None:
    renamed = {prefix + name.removeprefix("generator."): tensor for name, tensor in WEIGHTS.items()}
    torch.save(renamed, tmp_path / "a.pth")
    save_file(renamed, tmp_path / "b.safetensors")
    assert same(read(tmp_path / "a.pth"), WEIGHTS)
    assert same(read(tmp_path / "b.safetensors"), WEIGHTS)


def test_read_supports_views_and_other_dtypes(tmp_path: Path) -> None:
    whole = torch.randn(8, 14, 7, 7, dtype=torch.float64)
    changed = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in WEIGHTS.items()}
    changed |= {FIRST: whole.transpose(0, 1)[3:7, 2:6], f"{PREFIX}1.bn_l.bias": torch.ones(4).bfloat16()}
    torch.save({"state_dict": changed}, tmp_path / "best.ckpt")
    assert same(read(tmp_path / "best.ckpt"), changed)


# --- no code is run ---------------------------------------------------------------------------------------------


class Reduced:
    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def test_object_that_would_run_a_command_is_ignored(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    content = {"callbacks": Reduced(os.system, (f"touch {canary}",)), "state_dict": OrderedDict(WEIGHTS)}
    torch.save(content, tmp_path / "best.ckpt")
    assert same(read(tmp_path / "best.ckpt"), WEIGHTS)
    assert not canary.exists()


def test_command_in_place_of_weights_is_refused(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    for content in (Reduced(os.system, (f"touch {canary}",)), {**WEIGHTS, FIRST: Reduced(os.system, (f"touch {canary}",))}):
        torch.save(content, tmp_path / "best.ckpt")
        with pytest.raises(ConfigurationError):
            read(tmp_path / "best.ckpt")
    assert not canary.exists()


def test_code_in_a_torchscript_archive_is_not_read(tmp_path: Path) -> None:
    def spoil(name: str, data: bytes) -> bytes:
        return b"not code" if "/code/" in name else data

    assert same(read(rewritten(lama_script(tmp_path / "big-lama.pt"), spoil)), WEIGHTS)


def rewritten(path: Path, change: Callable[[str, bytes], bytes | None], **how: Any) -> Path:
    """Rewrite a zip file: `change(name, data)` returns a member's new content, or None to drop it."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", **how) as archive:
        for name, data in members.items():
            content = change(name, data)
            if content is not None:
                archive.writestr(name, content)
    return path


# --- damaged and other files ----------------------------------------------------------------------------


class View:
    """A tensor as torch pickles it, with arbitrary numbers, offset, size and stride."""

    def __init__(self, numbers: Any, offset: Any, size: Any, stride: Any, key: Any = "0") -> None:
        self.storage, self.view = Storage(numbers, key), (offset, size, stride)

    def __reduce__(self) -> tuple[Any, ...]:
        return torch._utils._rebuild_tensor_v2, (self.storage, *self.view, False, OrderedDict())


class Storage:
    def __init__(self, numbers: Any, key: Any) -> None:
        self.numbers, self.key = numbers, key


class Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        return ("storage", torch.FloatStorage, obj.key, "cpu", obj.numbers) if isinstance(obj, Storage) else None


def archive_of(path: Path, content: Any, data: bytes = bytes(64), **how: Any) -> Path:
    """A checkpoint with `content` pickled and `data` as its only storage."""
    file = io.BytesIO()
    Pickler(file, 2).dump(content)
    with zipfile.ZipFile(path, "w", **how) as archive:
        archive.writestr("archive/data.pkl", file.getvalue())
        archive.writestr("archive/data/0", data)
    return path


BAD_VIEWS = {
    "storage too short": View(17, 0, (16,), (1,)),
    "storage too long": View(15, 0, (15,), (1,)),
    "missing member": View(16, 0, (16,), (1,), key="1"),
    "path outside": View(16, 0, (16,), (1,), key="../../etc/passwd"),
    "past the end": View(16, 8, (9,), (1,)),
    "stride past the end": View(16, 0, (4,), (6,)),
    "negative offset": View(16, -1, (4,), (1,)),
    "negative stride": View(16, 15, (16,), (-1,)),
    "stride of zero": View(16, 0, (2**40,), (0,)),
    "enormous": View(2**40, 0, (2**20, 2**20), (2**20, 1)),
    "stride too short": View(16, 0, (4, 4), (1,)),
    "size not a number": View(16, 0, ("a",), (1,)),
    "size not a tuple": View(16, 0, 16, (1,)),
    "fractional offset": View(16, 0.5, (4,), (1,)),
}


@pytest.mark.parametrize("view", BAD_VIEWS.values(), ids=BAD_VIEWS)
def test_tensor_outside_its_storage_is_refused(view: View, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError):
        read(archive_of(tmp_path / "best.ckpt", {FIRST: view}))


def test_tensor_inside_its_storage_is_read(tmp_path: Path) -> None:
    data = struct.pack("<16f", *range(16))
    found = read(archive_of(tmp_path / "best.ckpt", {FIRST: View(16, 2, (2, 3), (1, 4))}, data))
    assert found[FIRST].tolist() == [[2, 6, 10], [3, 7, 11]]


def test_weights_over_the_size_limit_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LARGEST", 100)
    twice = {FIRST: View(16, 0, (16,), (1,)), f"{PREFIX}1.bn_l.weight": View(16, 0, (16,), (1,))}
    with pytest.raises(ConfigurationError, match="larger than any"):
        read(archive_of(tmp_path / "best.ckpt", twice))


def test_member_larger_than_its_tensor_is_not_unpacked(tmp_path: Path) -> None:
    bomb = archive_of(tmp_path / "a", {FIRST: View(16, 0, (16,), (1,))}, bytes(2**24), compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(ConfigurationError, match=r"data/0 has 16777216 bytes, expected at most 64"):
        read(bomb)


def test_too_many_parts_are_refused_and_shared_parts_visited_once(tmp_path: Path) -> None:
    parts: dict[str, Any] = {FIRST: View(16, 0, (16,), (1,))}
    broad = {**parts, **{str(number): {"inside": {}} for number in range(MOST)}}
    with pytest.raises(ConfigurationError, match="more parts"):
        read(archive_of(tmp_path / "broad", broad))
    for _ in range(60):  # two paths to each next part: 2**60 paths to the last
        parts = {"a": parts, "b": parts}
    assert len(read(archive_of(tmp_path / "double", parts))) == 1


OTHERS: dict[str, Callable[[Path], Any]] = {
    "empty": lambda path: path.write_bytes(b""),
    "HTML": lambda path: path.write_bytes(b"<html>not found</html>"),
    "old checkpoint": lambda path: torch.save(WEIGHTS, path, _use_new_zipfile_serialization=False),
    "other network": lambda path: torch.save({"state_dict": {"conv.weight": torch.ones(3)}}, path),
    "list": lambda path: torch.save([1, 2], path),
    "other safetensors": lambda path: save_file({"conv.weight": torch.ones(3)}, path),
    "zip without checkpoint": zipped,
    "zip of a damaged checkpoint": lambda path: (
        path.with_suffix(".ckpt").write_text("no"),
        zipped(path, path.with_suffix(".ckpt")),
    ),
    "big-endian": lambda path: rewritten(lama_checkpoint(path), lambda n, d: b"big" if n.endswith("byteorder") else d),
    "missing storage": lambda path: rewritten(lama_checkpoint(path), lambda n, d: None if n.endswith("data/30") else d),
    "bzip2": lambda path: rewritten(lama_checkpoint(path), lambda _, d: d, compression=zipfile.ZIP_BZIP2),
    "truncated safetensors": lambda path: path.write_bytes(lama_file(path).read_bytes()[:-100]),
    "wrong safetensors header": lambda path: path.write_bytes(oversized_header()),
    "truncated checkpoint": lambda path: path.write_bytes(lama_checkpoint(path).read_bytes()[:-3000]),
}


def oversized_header() -> bytes:
    header = json.dumps({FIRST: {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(64)


@pytest.mark.parametrize("write", OTHERS.values(), ids=OTHERS)
def test_damaged_or_other_file_is_an_error_with_its_path(write: Callable[[Path], Any], tmp_path: Path) -> None:
    path = tmp_path / "weights"
    write(path)
    with pytest.raises(ConfigurationError, match="no LaMa weights or is damaged") as caught:
        read(path)
    assert str(path) in caught.value.message
    assert "\n" not in caught.value.message


def test_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"weights.* No such file"):
        read(tmp_path / "weights")


@settings(max_examples=60)
@given(data=st.data(), kind=st.sampled_from([lama_checkpoint, lama_script, lama_file]))
def test_damaged_file_is_read_or_refused(
    data: st.DataObject, kind: Callable[[Path], Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / f"{kind.__name__}.weights"
    original = path.with_suffix(".whole")
    content = bytearray((original if original.is_file() else kind(original)).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.sampled_from([len(content), len(content) // 2]))])
    with suppress(ConfigurationError):
        read(path)


# --- conversion ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_convert_writes_safetensors_from_every_format(write: Callable[[Path], Path], tmp_path: Path) -> None:
    target = tmp_path / "lama" / "lama.safetensors"
    assert convert(write(tmp_path / "weights"), target) == sum(tensor.numel() for tensor in WEIGHTS.values())
    assert same(load_file(target), WEIGHTS)
    assert [path.name for path in target.parent.iterdir()] == ["lama.safetensors"]


def test_convert_refuses_unusable_weights_and_keeps_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "lama.safetensors"
    target.write_bytes(b"old")
    torch.save({name: tensor for name, tensor in WEIGHTS.items() if ".8." not in name}, tmp_path / "less")
    torch.save(WEIGHTS | {f"{PREFIX}1.bn_l.bias": torch.full((4,), float("nan"))}, tmp_path / "nan")
    torch.save(WEIGHTS | {f"{PREFIX}3.ffc.convl2l.weight": torch.ones(16, 9, 3, 3)}, tmp_path / "apart")
    for name, message in (("less", "not the weights"), ("nan", "not finite"), ("apart", "LaMa generator")):
        with pytest.raises(ConfigurationError, match=message):
            convert(tmp_path / name, target)
    assert target.read_bytes() == b"old"


def test_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match="can't be written"):
        convert(lama_file(tmp_path / "weights"), tmp_path / "file" / "lama.safetensors")


def test_archives_are_opened_one_level_deep(tmp_path: Path) -> None:
    inner = zipped(tmp_path / "inner.ckpt", lama_checkpoint(tmp_path / "best.ckpt"))
    with pytest.raises(ConfigurationError, match="the archive inside it is none of torch's"):
        read(zipped(tmp_path / "outer.zip", inner))
