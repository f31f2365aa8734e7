"""What the demo works on: real photos, addresses that must fail, and the loopback server of both."""

from __future__ import annotations

import importlib.util
import json
import random
import shutil
import struct
import threading
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote, urlsplit

from imagemill.shared.errors import MissingExtra, UsageError
from imagemill.shared.s3 import IMAGE_EXTENSIONS

if TYPE_CHECKING:
    from PIL.Image import Image as PillowImage

SHIPPED = {  # our name -> scikit-image's
    "astronaut.png": "astronaut.png",
    "cat.png": "chelsea.png",
    "coffee.png": "coffee.png",
    "motorcycle.png": "motorcycle_left.png",
    "rocket.jpg": "rocket.jpg",
    "galaxies.jpg": "hubble_deep_field.jpg",
    "retina.jpg": "retina.jpg",
    "moon.png": "moon.png",
}
NO_SUBJECT = ("galaxies.jpg", "moon.png")
"""Shipped photos without a subject to cut out."""
OWN_PHOTOS = 24
"""Photos taken from the user's folder unless a count is given."""
PRIVATE = "http://10.255.255.1/private.jpg"
"""In a private network, where workers may not go; nothing is ever sent there."""


@dataclass(frozen=True)
class Retouch:
    """A photo with something to remove: `path` and `mask` are relative to the demo's folder, `box` is in fractions."""

    path: str
    mask: str | None = None
    box: tuple[float, float, float, float] | None = None


@dataclass
class Material:
    """All that the server serves, by path below the demo's folder."""

    folder: Path
    photos: list[str] = field(default_factory=list)
    no_subject: list[str] = field(default_factory=list)
    retouches: list[Retouch] = field(default_factory=list)


@dataclass(frozen=True)
class Bad:
    """What the server answers for an address that must fail."""

    status: int
    kind: str
    body: bytes


def gather(folder: Path, images: Path | None, count: int | None) -> Material:
    """Copy the photos into `folder`, and make the dated and the scratched ones.

    Raises MissingExtra without the demo's packages, UsageError where `images` has no photo.
    """
    found = _own(images)[: count or OWN_PHOTOS] if images else _shipped()[:count]
    material = Material(folder)
    (folder / "photos").mkdir()
    for name, path in found:
        shutil.copyfile(path, folder / "photos" / name)
        material.photos.append(f"photos/{name}")
        if images is None and name in NO_SUBJECT:
            material.no_subject.append(f"photos/{name}")
    material.retouches = _retouches(material)
    return material


def _shipped() -> list[tuple[str, Path]]:
    # Found without being imported: scikit-image brings SciPy along and takes a second.
    spec = importlib.util.find_spec("skimage")
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtra(
            "the demo's photos ship with scikit-image: pip install 'imagemill[demo]', or name yours with --images"
        )
    data = Path(spec.submodule_search_locations[0]) / "data"
    return [(ours, data / theirs) for ours, theirs in SHIPPED.items() if (data / theirs).exists()]


def _own(images: Path) -> list[tuple[str, Path]]:
    found = sorted(p for p in images.iterdir() if p.suffix.lower() in IMAGE_EXTENSIONS and p.is_file() and p.name.isprintable())
    if not found:
        raise UsageError(f"{images}: there are no images in this folder")
    return [(path.name, path) for path in found]


def _retouches(material: Material) -> list[Retouch]:
    """Every photo with a date stamped on, as old cameras did, and one more with scratches and their mask."""
    try:
        from PIL import Image, ImageOps
    except ModuleNotFoundError as error:
        raise MissingExtra("the demo draws with Pillow: pip install 'imagemill[demo]'") from error
    made: list[Retouch] = []
    scratched = 0
    for photo in material.photos:
        try:
            with Image.open(material.folder / photo) as file:
                picture = ImageOps.exif_transpose(file).convert("RGB")
        except (OSError, ValueError, Image.DecompressionBombError):
            continue  # a photo that Pillow can't read: the worker will say what is wrong with it
        made.append(_stamp(material.folder, photo, picture.copy()))
        if not scratched:
            made.append(_scratch(material.folder, photo, picture))
            scratched += 1
    if not made:
        raise UsageError("none of the photos can be read")
    return made


def _stamp(folder: Path, photo: str, picture: PillowImage) -> Retouch:
    from PIL import ImageDraw, ImageFont

    width, height = picture.size
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(max(8, min(width, height) // 16))
    right, bottom = round(width * 0.95), round(height * 0.95)
    draw.text((right, bottom), "'98 7 14", fill=(255, 140, 20), font=font, anchor="rb")
    left, top, far_right, far_bottom = draw.textbbox((right, bottom), "'98 7 14", font=font, anchor="rb")
    margin = max(3, min(width, height) // 100)  # JPEG blurs the stamp's edge into its neighbours
    x, y = max(0, left - margin) / width, max(0, top - margin) / height
    far_x, far_y = min(width, far_right + margin) / width, min(height, far_bottom + margin) / height
    path = f"photos/dated/{Path(photo).stem}.jpg"
    if (folder / path).exists():  # a.jpg and a.png in the same folder
        path = f"photos/dated/{Path(photo).name}.jpg"
    (folder / path).parent.mkdir(exist_ok=True)
    picture.save(folder / path, quality=92)
    return Retouch(path, box=(round(x, 4), round(y, 4), round(far_x - x, 4), round(far_y - y, 4)))


def _scratch(folder: Path, photo: str, picture: PillowImage) -> Retouch:
    from PIL import Image, ImageDraw

    width, height = picture.size
    mask = Image.new("L", picture.size, 0)
    scratches, holes = ImageDraw.Draw(picture), ImageDraw.Draw(mask)
    thick = max(1, min(width, height) // 200)
    chance = random.Random(7)  # noqa: S311  # the same scratches in every demo
    for _ in range(7):
        x, lean = chance.uniform(0.05, 0.95), chance.uniform(-0.12, 0.12)
        line = [((x + lean * t / 8 + chance.uniform(-0.008, 0.008)) * width, height * t / 8) for t in range(9)]
        scratches.line(line, fill=(245, 242, 235), width=thick)
        holes.line(line, fill=255, width=thick + 4)
    path, mask_path = f"photos/scratched/{Path(photo).stem}.png", f"photos/masks/{Path(photo).stem}.png"
    for made, target in ((picture, path), (mask, mask_path)):
        (folder / target).parent.mkdir(exist_ok=True)
        made.save(folder / target)
    return Retouch(path, mask=mask_path)


def bad_answers(material: Material) -> dict[str, Bad]:
    """The server's addresses that must fail, by path."""
    stamped = next(retouch.path for retouch in material.retouches if retouch.box)
    jpeg = (material.folder / stamped).read_bytes()
    page = b"<!doctype html><title>Sign in</title><p>Please sign in to see this photo."
    return {
        "bad/missing.jpg": Bad(404, "text/plain", b"there is no such photo"),
        "bad/broken-server.jpg": Bad(500, "text/plain", b"the server is broken"),
        "bad/page.jpg": Bad(200, "text/html", page),
        "bad/half.jpg": Bad(200, "image/jpeg", jpeg[: len(jpeg) // 2]),
        "bad/empty.png": Bad(200, "image/png", b""),
        "bad/bomb.png": Bad(200, "image/png", bomb(30_000)),
    }


def bomb(side: int) -> bytes:
    """A PNG of `side` x `side` black pixels, 1 bit each: for 30,000 about 110 kB that decode to 900 million pixels."""
    packer = zlib.compressobj(9)
    row = bytes(1 + (side + 7) // 8)  # filter 0, then zeros
    body = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)), (b"IDAT", body), (b"IEND", b""))
    packed = (struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


class Site:
    """The loopback server: `base` is its address, `bad` all addresses that must fail."""

    def __init__(self, material: Material) -> None:
        self.material = material
        answers = bad_answers(material)
        files = set(material.photos)
        for retouch in material.retouches:
            files.update(path for path in (retouch.path, retouch.mask) if path)
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(material.folder, files, answers))
        self.host = f"127.0.0.1:{self._server.server_port}"
        self.base = f"http://{self.host}/"
        self.bad = [*(self.base + path for path in answers), PRIVATE]

    def __enter__(self) -> Site:
        threading.Thread(target=self._server.serve_forever, name="photos", daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def url(self, path: str) -> str:
        """The address of a file of the demo's folder."""
        return self.base + quote(path)

    def lists(self, count: int | None) -> dict[str, Path]:
        """Write each operation's list as JSONL into `lists/`: photos, one duplicate, and what must fail."""
        photos = [{"source": self.url(path)} for path in self.material.photos]
        subjects = [row for row in photos if row["source"] not in map(self.url, self.material.no_subject)] or photos
        removals = [self._removal(retouch) for retouch in self.material.retouches]
        bad = [{"source": url} for url in self.bad]
        rows = {
            "remove-background": [*_repeated(subjects, count), subjects[0], *bad],
            "inpaint": [*_repeated(removals, count), *({**row, "boxes": "0.4,0.4,0.2,0.2"} for row in bad)],
            "stylize": [*_repeated(photos, count), *bad],
        }
        (self.material.folder / "lists").mkdir()
        paths = {name: self.material.folder / "lists" / f"{name}.jsonl" for name in rows}
        for name, path in paths.items():
            path.write_text("".join(json.dumps(row) + "\n" for row in rows[name]), encoding="utf-8")
        return paths

    def _removal(self, retouch: Retouch) -> dict[str, str]:
        row = {"source": self.url(retouch.path)}
        return row | ({"mask": self.url(retouch.mask)} if retouch.mask else {"boxes": _text(retouch.box)})


def _text(box: Sequence[float] | None) -> str:
    return ",".join(f"{number:.4f}" for number in box or ())


def _repeated(rows: list[dict[str, str]], count: int | None) -> list[dict[str, str]]:
    """At least `count` rows: where there are fewer, they come again under another address."""
    again = ((rows[i % len(rows)], i // len(rows) + 1) for i in range(len(rows), count or 0))
    return rows + [{**row, "source": f"{row['source']}?copy={number}"} for row, number in again]


def _handler(folder: Path, files: set[str], bad: dict[str, Bad]) -> type[BaseHTTPRequestHandler]:
    """Serves these files and answers, and nothing else of the folder."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path).removeprefix("/")
            if path in files:
                self._answer(Bad(200, "application/octet-stream", (folder / path).read_bytes()))
            else:
                self._answer(bad.get(path, Bad(404, "text/plain", b"not found")))

        def _answer(self, answer: Bad) -> None:
            self.send_response(answer.status)
            self.send_header("Content-Type", answer.kind)
            self.send_header("Content-Length", str(len(answer.body)))
            self.end_headers()
            self.wfile.write(answer.body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # the base class's name
            """Say nothing: the worker's log has every download."""

    return Handler
