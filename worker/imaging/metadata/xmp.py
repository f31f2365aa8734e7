"""XMP: RDF in XML, filtered as a stream, so that neither its depth nor its size costs memory, and extended with fields.

https://developer.adobe.com/xmp/docs/XMPSpecifications/
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, NoReturn
from xml.parsers import expat
from xml.sax.saxutils import escape, quoteattr

MAX_PACKET = 2**20
MAX_DEPTH = 64

_XML = "http://www.w3.org/XML/1998/namespace"
_RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
DC, PHOTOSHOP = "http://purl.org/dc/elements/1.1/", "http://ns.adobe.com/photoshop/1.0/"
_TIFF, _EXIF = "http://ns.adobe.com/tiff/1.0/", "http://ns.adobe.com/exif/1.0/"
_XMP, _NOTE = "http://ns.adobe.com/xap/1.0/", "http://ns.adobe.com/xmp/note/"
IPTC_CORE = "http://iptc.org/std/Iptc4xmpCore/1.0/xmlns/"

# Whole namespaces about creators, rights and licences: XMP rights, Creative Commons, PLUS.
_CREDIT_SPACES = frozenset(
    {"http://ns.adobe.com/xap/1.0/rights/", "http://creativecommons.org/ns#", "http://ns.useplus.org/ldf/xmp/1.0/"}
)
_CREDITS = frozenset(
    {(DC, name) for name in ("creator", "rights")}
    | {(PHOTOSHOP, name) for name in ("AuthorsPosition", "Credit", "Source")}
    | {(_TIFF, name) for name in ("Artist", "Copyright")}
    | {(IPTC_CORE, "CreatorContactInfo")}
)
# What describes the former file or holds other pictures: previews, depth maps, gain maps, originals, videos.
_STALE_SPACES = frozenset(
    {
        "http://ns.adobe.com/xap/1.0/g/img/",
        "http://ns.adobe.com/hdr-gain-map/1.0/",
        *(f"http://ns.google.com/photos/1.0/{name}/" for name in ("camera", "container", "depthmap", "image", "audio")),
        *(f"http://ns.google.com/photos/dd/1.0/{name}/" for name in ("camera", "device", "image")),
    }
)
_STALE = frozenset(
    {(_XMP, "Thumbnails"), (_NOTE, "HasExtendedXMP"), (_EXIF, "ColorSpace"), (_EXIF, "NativeDigest"), (_TIFF, "NativeDigest")}
    | {(_EXIF, name) for name in ("PixelXDimension", "PixelYDimension", "CompressedBitsPerPixel", "ComponentsConfiguration")}
    | {(PHOTOSHOP, name) for name in ("ICCProfile", "ColorMode")}
    | {
        (_TIFF, name)
        for name in (
            *("Orientation", "ImageWidth", "ImageLength", "BitsPerSample", "Compression", "PhotometricInterpretation"),
            *("SamplesPerPixel", "PlanarConfiguration", "XResolution", "YResolution", "ResolutionUnit"),
        )
    }
)
# Regions and panoramas are given in coordinates of the former picture.
_PLACES = frozenset(
    {
        "http://www.metadataworkinggroup.com/schemas/regions/",
        "http://ns.microsoft.com/photo/1.2/",
        "http://ns.google.com/photos/1.0/panorama/",
    }
)

_INVALID = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_DESCRIPTION, _PROPERTY = 2, 3  # levels; rdf:RDF has 1

Name = tuple[str, str]
"""Namespace and local name of a property."""
Form = Literal["text", "seq", "bag", "alt"]


@dataclass(frozen=True)
class Xmp:
    """The properties of a packet as the XML inside its rdf:RDF element, and their names."""

    body: str = ""
    names: frozenset[Name] = frozenset()

    def __bool__(self) -> bool:
        return bool(self.names)


@dataclass(frozen=True)
class Field:
    """A property made of text: one `text`, a list of names (`seq`), a set of words (`bag`), or text with languages (`alt`)."""

    name: Name
    form: Form
    values: tuple[str, ...]


def read(packet: bytes, *, all_of_it: bool, moved: bool) -> Xmp:
    """The properties that still hold; empty if the packet is too large or broken.

    Without `all_of_it`, only those about creators, rights and licences. `moved` says that the picture was rotated or scaled.
    """
    if not packet or len(packet) > MAX_PACKET:
        return Xmp()
    try:
        return _Filter(lambda name: all_of_it or name in _CREDITS or name[0] in _CREDIT_SPACES, moved).read(packet)
    except (expat.ExpatError, UnicodeError, LookupError, ValueError):
        return Xmp()


def write(xmp: Xmp, fields: Iterable[Field] = ()) -> bytes:
    """The packet with the properties of `xmp`, and those of `fields` that it does not have yet; empty if there are none."""
    body = xmp.body + "".join(_described(field) for field in fields if field.name not in xmp.names and field.values)
    if not body:
        return b""
    text = (
        '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/">'
        f'<rdf:RDF xmlns:rdf="{_RDF}">{body}</rdf:RDF></x:xmpmeta><?xpacket end="w"?>'
    )
    return text.encode(errors="ignore")


def _described(field: Field) -> str:
    space, name = field.name
    words = [escape(_INVALID.sub("", value)) for value in field.values]
    if field.form == "text":
        content = words[0]
    else:
        language = ' xml:lang="x-default"' if field.form == "alt" else ""
        words = words[:1] if field.form == "alt" else words
        kind = field.form.capitalize()
        content = f"<rdf:{kind}>" + "".join(f"<rdf:li{language}>{word}</rdf:li>" for word in words) + f"</rdf:{kind}>"
    return f'<rdf:Description rdf:about="" xmlns:p={quoteattr(space)}><p:{name}>{content}</p:{name}></rdf:Description>'


class _Filter:
    """Copies the wanted properties of a packet while it is parsed, with the namespaces that each of them uses."""

    def __init__(self, wanted: Callable[[Name], bool], moved: bool) -> None:
        self._wanted, self._moved = wanted, moved
        self._out: list[str] = []
        self._names: set[Name] = set()
        self._length = 0
        self._level = 0  # of the current element; 0 outside rdf:RDF
        self._skipped = 0  # how many elements are open of a branch that is left out
        self._open: list[tuple[str, dict[str, str]]] = []  # copied elements: their tag and the namespaces known inside

    def read(self, packet: bytes) -> Xmp:
        parser = expat.ParserCreate(namespace_separator=" ")
        parser.namespace_prefixes = True
        parser.buffer_text = True
        parser.StartDoctypeDeclHandler = _refuse  # entities could expand without limit
        parser.StartElementHandler, parser.EndElementHandler = self._start, self._end
        parser.CharacterDataHandler = self._text
        parser.Parse(packet.strip(b"\0 \t\r\n"), True)
        return Xmp("".join(self._out), frozenset(self._names)) if self._names else Xmp()

    def _start(self, tag: str, attributes: dict[str, str]) -> None:
        name, _ = _split(tag)
        if not self._level and name != (_RDF, "RDF"):
            return
        self._level += 1
        if self._level > MAX_DEPTH:
            raise ValueError("XMP is nested too deeply")
        if self._skipped or (self._level >= _PROPERTY and not self._stays(name, self._level == _PROPERTY)):
            self._skipped += 1
        elif self._level >= _DESCRIPTION:
            if self._level == _PROPERTY:
                self._names.add(name)
            self._copy(tag, attributes)

    def _stays(self, name: Name, is_property: bool) -> bool:
        """Whether a property, or a part of one that stays, is kept."""
        if name in _STALE or name[0] in _STALE_SPACES or (self._moved and name[0] in _PLACES):
            return False
        return self._wanted(name) if is_property or name[0] == _EXIF else True  # positions also stand inside other properties

    def _copy(self, tag: str, attributes: dict[str, str]) -> None:
        kept = {}
        for attribute, value in attributes.items():
            name, _ = _split(attribute)
            is_property = self._level == _DESCRIPTION and name[0] not in ("", _RDF, _XML)
            if self._stays(name, is_property):
                kept[attribute] = value
                self._names |= {name} if is_property else set()
        known = self._open[-1][1] if self._open else {"": "", "xml": _XML, "rdf": _RDF}
        prefixed = [tag, *(attribute for attribute in kept if " " in attribute)]
        used = {prefix: space for (space, _), prefix in map(_split, prefixed)}
        new = {prefix: space for prefix, space in used.items() if known.get(prefix) != space}
        spaces = "".join(f" xmlns{prefix and ':'}{prefix}={quoteattr(space)}" for prefix, space in new.items())
        written = "".join(f" {_spelled(attribute)}={quoteattr(value)}" for attribute, value in kept.items())
        self._write(f"<{_spelled(tag)}{spaces}{written}>")
        self._open.append((_spelled(tag), known | new))

    def _end(self, _: str) -> None:
        if not self._level:
            return
        if self._skipped:
            self._skipped -= 1
        elif self._level >= _DESCRIPTION:
            self._write(f"</{self._open.pop()[0]}>")
        self._level -= 1

    def _text(self, text: str) -> None:
        if self._open and not self._skipped:
            self._write(escape(text))

    def _write(self, text: str) -> None:
        self._length += len(text)
        if self._length > MAX_PACKET:  # one long namespace may be declared again and again
            raise ValueError("XMP is too large")
        self._out.append(text)


def _refuse(*_: Any) -> NoReturn:
    raise ValueError("XMP has no document type")


def _split(tag: str) -> tuple[Name, str]:
    """Namespace and local name, and the prefix, of `namespace name prefix` as expat reports it; the first and last may lack."""
    parts = tag.split(" ")
    if len(parts) == 1:
        return ("", parts[0]), ""
    return (parts[0], parts[1]), parts[2] if len(parts) > 2 else ""


def _spelled(tag: str) -> str:
    (_, name), prefix = _split(tag)
    return f"{prefix}:{name}" if prefix else name
