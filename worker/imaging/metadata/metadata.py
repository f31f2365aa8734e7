"""What came with a picture and isn't its pixels: EXIF, XMP, IPTC, resolution and texts, as far as a job keeps them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from imagemill.shared.messages import KeepMetadata
from imagemill.worker.imaging.metadata import exif, iptc, xmp
from imagemill.worker.imaging.metadata.blocks import EXIF_START, XMP_START, Blocks, find
from imagemill.worker.imaging.metadata.exif import Exif
from imagemill.worker.imaging.metadata.files import fits_segment
from imagemill.worker.imaging.metadata.xmp import Xmp

_TEXT_CREDITS = ("Author", "Copyright")
_TEXTS_AS_XMP: Mapping[str, tuple[xmp.Name, xmp.Form]] = {
    "Author": ((xmp.DC, "creator"), "seq"),
    "Copyright": ((xmp.DC, "rights"), "alt"),
    "Title": ((xmp.DC, "title"), "alt"),
    "Description": ((xmp.DC, "description"), "alt"),
}
_SANE_DPI = (1, 65_535)


@dataclass(frozen=True)
class Metadata:
    """The metadata that a result gets. `dpi` is horizontal and vertical; `resources` are Photoshop's, by number."""

    tags: Exif = field(default_factory=Exif)
    properties: Xmp = field(default_factory=Xmp)
    resources: Mapping[int, bytes] = field(default_factory=dict)
    dpi: tuple[float, float] | None = None
    texts: Mapping[str, str] = field(default_factory=dict)

    def blocks(self, form: str, size: tuple[int, int], *, srgb: bool) -> Blocks:
        """The blocks for a result of `size` (width, height) in the format `form`: jpeg, png, webp or avif.

        JPEG files have a place for everything but hold at most 64 kB of each; in the others, what IPTC says is added to XMP,
        and so is in JPEG, WebP and AVIF what PNG texts say.
        """
        jpeg = form == "jpeg"
        native = form in ("jpeg", "png")  # has a place for the resolution
        tags = self.tags
        dpi = self.dpi if tags or not native else None
        block = exif.write(tags, size=size, srgb=srgb, dpi=dpi)
        if jpeg and not fits_segment(len(EXIF_START) + len(block)):
            block = exif.write(exif.without_maker_note(tags), size=size, srgb=srgb, dpi=dpi)
        packet = xmp.write(self.properties, self._more_xmp(form))
        if jpeg:
            block = block if fits_segment(len(EXIF_START) + len(block)) else b""
            packet = packet if fits_segment(len(XMP_START) + len(packet)) else b""
        return Blocks(block, packet, self.resources if jpeg else {}, self.dpi, self.texts)

    def _more_xmp(self, form: str) -> Iterator[xmp.Field]:
        if form != "jpeg":
            yield from iptc.as_xmp(self.resources.get(iptc.IPTC, b""))
        if form != "png":
            for keyword, (name, kind) in _TEXTS_AS_XMP.items():
                if self.texts.get(keyword):
                    yield xmp.Field(name, kind, (self.texts[keyword],))


NOTHING = Metadata()


def read(data: bytes, kind: str, keep: KeepMetadata, *, moved: bool = False) -> Metadata:
    """The metadata of a file of format `kind` that `keep` asks for.

    `moved` says that the picture is rotated or scaled, so that regions no longer fit. Never raises: what is damaged or too
    large is left out.
    """
    if keep == "none":
        return NOTHING
    everything = keep == "keep"
    blocks = find(data, kind)
    tags, first = exif.read(blocks.exif)
    records = iptc.cleaned(blocks.resources.get(iptc.IPTC, b""), all_of_it=everything)
    resources = {number: value for number, value in blocks.resources.items() if number != iptc.IPTC}
    found = Metadata(
        tags if everything else exif.credits(tags),
        xmp.read(blocks.xmp, all_of_it=everything, moved=moved),
        resources | ({iptc.IPTC: records} if records else {}),
        _sane(blocks.dpi) or _sane(exif.resolution(first, tags.order)),
        {name: text for name, text in blocks.texts.items() if text and (everything or name in _TEXT_CREDITS)},
    )
    return found if found != NOTHING else NOTHING


def _sane(dpi: tuple[float, float] | None) -> tuple[float, float] | None:
    low, high = _SANE_DPI
    return (round(dpi[0], 2), round(dpi[1], 2)) if dpi and all(low <= side <= high for side in dpi) else None
