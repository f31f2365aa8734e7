"""Undo the compression that a server has applied to a file. Whatever its headers say, the bytes decide.

Servers label plain images as `gzip`, call `utf-8` or `aws-chunked` a content encoding, and send compressed files without
saying so. gzip and zstd are therefore recognised by their first bytes. Brotli and deflate have none, so they count only if a
header names them and they can be read to their end.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Callable, Iterator

import brotli
import zstandard

from imagemill.shared.errors import TooLarge, Truncated, sentence
from imagemill.worker.transfer.byte_budget import Claim, NoRoom

GZIP, ZSTD = b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd"
LAYERS = 3
"""Layers of compression that are removed; some servers compress files that are stored compressed."""
PARTS = 1000
"""Parts that a compressed file may be joined from; each costs time, however small it is."""
WINDOW = 8 * 2**20
"""Bytes of memory that zstd may ask for, as RFC 9659 says for the web."""
BLOCK = 1 << 18
"""Decompressed bytes at a time."""
SLICE = 256
"""Bytes given to zstd at a time, which makes up to 8 MB of them."""
DAMAGED = (zlib.error, brotli.error, zstandard.ZstdError, EOFError)

Reader = Callable[[bytes], Iterator[bytes]]


async def unpacked(data: bytes, stated: str, label: str, most: int, claim: Claim) -> bytes:
    """The file in the body of a response, whose Content-Encoding headers are `stated`; `label` names it in errors.

    Raises TooLarge if it has more than `most` bytes, Truncated if it is damaged, NoRoom if the claim can't cover it.
    """
    named = [reader for name in reversed(stated.lower().split(",")) if (reader := _NAMED.get(name.strip())) is not None]
    for _ in range(LAYERS):
        known = _recognised(data)
        if known is not None:
            try:
                data = await asyncio.to_thread(_read, known, data, label, most, claim)
            except DAMAGED as error:
                raise Truncated(f"{label}: the compressed response is damaged ({sentence(error)})") from error
        elif data and named:
            try:
                data = await asyncio.to_thread(_read, named.pop(0), data, label, most, claim)
            except DAMAGED:  # it is not what the header says
                continue
        else:
            break
    return data


def _recognised(data: bytes) -> Reader | None:
    return _gunzip if data.startswith(GZIP) else _unzstd if data.startswith(ZSTD) else None


def _read(reader: Reader, data: bytes, label: str, most: int, claim: Claim) -> bytes:
    blocks, size = list[bytes](), 0
    for block in reader(data):
        size += len(block)
        if size > most:
            raise TooLarge(f"{label} exceeds the limit of {most} bytes once it is decompressed")
        if not claim.covers(size):
            raise NoRoom
        blocks.append(block)
    return b"".join(blocks)


def _gunzip(data: bytes) -> Iterator[bytes]:
    for _ in range(PARTS):
        part = zlib.decompressobj(zlib.MAX_WBITS | 16)
        yield from _inflated(part, data)
        data = part.unused_data
        if not data.startswith(GZIP):  # the end, or padding after it
            return
    raise zlib.error("too many parts")


def _inflate(data: bytes) -> Iterator[bytes]:
    zlib_header = len(data) > 1 and data[0] & 0x0F == 8 and int.from_bytes(data[:2]) % 31 == 0
    yield from _inflated(zlib.decompressobj(zlib.MAX_WBITS if zlib_header else -zlib.MAX_WBITS), data)


def _inflated(stream: zlib._Decompress, data: bytes) -> Iterator[bytes]:
    while not stream.eof:
        block = stream.decompress(data, BLOCK)
        data = stream.unconsumed_tail
        if not block and not data and not stream.eof:
            raise EOFError("it ends early")
        yield block


def _unbrotli(data: bytes) -> Iterator[bytes]:
    stream = brotli.Decompressor()
    while not stream.is_finished():
        block = stream.process(data, output_buffer_limit=BLOCK)
        if not block and not data:
            raise EOFError("it ends early")
        data = b""
        yield block


def _unzstd(data: bytes) -> Iterator[bytes]:
    for _ in range(PARTS):
        part, start = zstandard.ZstdDecompressor(max_window_size=WINDOW).decompressobj(), 0
        while not part.eof:
            if start >= len(data):
                raise EOFError("it ends early")
            yield part.decompress(data[start : start + SLICE])
            start += SLICE
        data = part.unused_data + data[start:]
        if not data.startswith(ZSTD):
            return
    raise zstandard.ZstdError("too many parts")


_NAMED: dict[str, Reader] = {"br": _unbrotli, "deflate": _inflate}
