"""The demo's photos, and the date stamps and scratches on them."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from imagemill.producer.demo_photos import OWN_PHOTOS, SHIPPED, USES, Material, gather
from imagemill.shared import errors
from tests.conftest import photo


def pixels(material: Material, path: str) -> NDArray[np.int16]:
    with Image.open(material.folder / path) as picture:
        return np.asarray(picture.convert("RGB"), np.int16)


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A folder with photos of the user's and other files."""
    folder = tmp_path / "own"
    (folder / "older").mkdir(parents=True)
    for n, name in enumerate(["a.png", "a.jpg", "B ü#1.PNG", "honeymoon.png"]):
        (folder / name).write_bytes(photo(n, kind="JPEG" if name.endswith("jpg") else "PNG"))
    (folder / "notes.txt").write_text("not a photo")
    (folder / "older" / "c.png").write_bytes(photo(9))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "demo").mkdir()
    return tmp_path / "demo"


def test_shipped_photos_can_be_opened_and_are_used_where_they_look_good(folder: Path) -> None:
    material = gather(folder, None, None)
    assert material.photos == {use: [f"photos/{photo.name}" for photo in SHIPPED if use in photo.uses] for use in USES}
    assert [retouch.path for retouch in material.retouches if retouch.mask] == ["photos/scratched/flower.png"]
    for path in {path for paths in material.photos.values() for path in paths}:
        assert pixels(material, path).size > 0
    assert pixels(material, "photos/pagoda.png").shape == (350, 320, 3), "cropped"


def test_count_limits_the_shipped_photos_of_each_job(folder: Path) -> None:
    material = gather(folder, None, 1)
    assert material.photos == {use: ["photos/flower.jpg"] for use in USES}
    assert [path.name for path in (folder / "photos").glob("*.*")] == ["flower.jpg"]


@pytest.mark.parametrize(("count", "photos"), [(None, 4), (2, 2), (99, 4)])
def test_own_photos_are_copied_and_used_in_every_job(own: Path, folder: Path, count: int | None, photos: int) -> None:
    before = {path: path.read_bytes() for path in own.rglob("*.*")}
    material = gather(folder, own, count)
    paths = ["photos/B ü#1.PNG", "photos/a.jpg", "photos/a.png", "photos/honeymoon.png"][:photos]
    assert material.photos == dict.fromkeys(USES, paths)
    assert {path: path.read_bytes() for path in own.rglob("*.*")} == before
    assert len({retouch.path for retouch in material.retouches}) == photos + 1, "a.jpg and a.png don't overwrite each other"


def test_own_photos_are_limited_without_count(own: Path, folder: Path) -> None:
    for n in range(OWN_PHOTOS + 3):
        (own / f"more-{n:02}.png").write_bytes(photo(n))
    assert len(gather(folder, own, None).photos["stylize"]) == OWN_PHOTOS


def test_retouches_change_only_the_listed_area(own: Path, folder: Path) -> None:
    material = gather(folder, own, None)
    photos = material.photos["inpaint"]
    dated = [retouch for retouch in material.retouches if retouch.boxes]
    (scratched,) = [retouch for retouch in material.retouches if retouch.mask]
    for retouch, name in zip(dated, photos, strict=True):
        x, y, width, height = map(float, retouch.boxes.split(","))
        changed = np.abs(pixels(material, retouch.path) - pixels(material, name)).max(2) > 90  # more than JPEG does
        inside = np.zeros_like(changed)
        inside[int(y * 72) : int((y + height) * 72) + 1, int(x * 96) : int((x + width) * 96) + 1] = True
        assert changed[inside].any()
        assert not changed[~inside].any()
    before, after = pixels(material, photos[0]), pixels(material, scratched.path)
    unmasked = pixels(material, scratched.mask or "")[..., 0] == 0
    assert (before != after).any()
    assert np.array_equal(before[unmasked], after[unmasked])


def test_folder_without_photos_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(errors.UsageError, match="no images"):
        gather(folder, tmp_path / "empty", None)


def test_unreadable_photo_is_kept_for_the_worker_to_report(folder: Path, own: Path) -> None:
    (own / "a.png").write_bytes(b"not a photo")
    material = gather(folder, own, None)
    assert "photos/a.png" in material.photos["inpaint"]
    assert len([retouch for retouch in material.retouches if retouch.boxes]) == 3


def test_folder_is_refused_when_no_photo_is_readable(folder: Path, own: Path) -> None:
    for path in own.glob("*.*"):
        path.write_bytes(b"not a photo")
    with pytest.raises(errors.UsageError, match="none of the photos can be read"):
        gather(folder, own, None)


@pytest.mark.parametrize("package", ["skimage", "sklearn"])
def test_missing_package_is_reported_with_the_extra_to_install(
    package: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(errors.MissingExtra, match=r"pip install 'imagemill\[demo\]', or .* --images"):
        gather(folder, None, None)
