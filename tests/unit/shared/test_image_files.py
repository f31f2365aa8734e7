"""The kinds of image files: what their first bytes tell."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from imagemill.shared.image_files import EXTENSIONS, HEAD, IMAGE_EXTENSIONS, looks_like_image


@pytest.mark.parametrize("form", ["jpeg", "png", "webp", "gif", "bmp", "tiff", "avif"])
def test_every_format_is_known_by_its_content(form: str) -> None:
    file = io.BytesIO()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(file, form)
    assert looks_like_image(file.getvalue()[:HEAD])
    assert set(EXTENSIONS[form]) <= IMAGE_EXTENSIONS


@pytest.mark.parametrize("head", [b"\0\0\0\x18ftypheic", b"\0\0\0\x1cftypmif1", b"\xff\x0a\0", b"\0\0\0\x0cJXL \r\n\x87\n"])
def test_images_of_phones_and_cameras_are_known_by_their_content(head: bytes) -> None:
    assert looks_like_image(head)


@pytest.mark.parametrize("head", [b"", b"BM", b"BMW is a car", b"RIFF....WAVE", b"\0\0\0\x18ftypisom", b"%PDF", b"GIF"])
def test_other_files_are_not_images(head: bytes) -> None:
    assert not looks_like_image(head)
