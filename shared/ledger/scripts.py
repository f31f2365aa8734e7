"""What all parts of the ledger share: the connection, keys, Lua scripts and the format of a pack's items."""

from __future__ import annotations

import json
import zlib
from collections.abc import Container, Sequence
from importlib.resources import files
from typing import Any, ClassVar, Self

from imagemill.shared.connection import Connected
from imagemill.shared.dead import DEAD, VERSION
from imagemill.shared.errors import sentence
from imagemill.shared.messages import Item, compact
from imagemill.shared.settings import Settings


class Scripts(Connected):
    """A connection to the ledger with its Lua scripts."""

    scripts: ClassVar[tuple[str, ...]] = ()
    """Names of the files in `lua/` that a subclass runs."""

    def __init__(self, url: str, *, expire_days: float = 7.0, lease_seconds: float = 20.0, rise_hours: float = 1.0) -> None:
        super().__init__(url)
        self._ttl = int(expire_days * 86_400)
        self._lease_ms = int(lease_seconds * 1000)
        self._rise_ms = int(rise_hours * 3_600_000)
        folder = files("imagemill.shared.ledger") / "lua"
        dead = f"local DEAD, DEAD_SECONDS = '{DEAD}', {self._ttl}\n"
        common = dead + (folder / "common.lua").read_text()
        self._lua = {name: self._redis.register_script(common + (folder / f"{name}.lua").read_text()) for name in self.scripts}

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """The ledger at the settings' Redis."""
        return cls(
            settings.redis_url.get_secret_value(),
            expire_days=settings.expire_days,
            lease_seconds=settings.worker.lease_seconds,
            rise_hours=settings.low_priority_hours,
        )

    def _script(self, name: str, *args: Any) -> Any:
        return self._lua[name](args=args)


PACK = 32
"""Items stored together."""
MOST_PACK = 4 * 1024 * 1024
"""Bytes of a pack: 32 rows with the longest URLs have less."""


class NewerVersion(ValueError):
    """Not damaged: a newer imagemill has written it."""


def key(job: str, part: str | None = None) -> str:
    """The Redis key of a job or one of its parts."""
    return f"imagemill:job:{job}" + (f":{part}" if part else "")


def pack(items: Sequence[Item]) -> bytes:
    """Items as zlib-compressed JSON: 32 URLs of 124 bytes take about 1.1 kB."""
    return zlib.compress(("[" + ",".join(compact(item) for item in items) + "]").encode(), 9)


def unpack(data: bytes, wanted: Container[int] | None = None) -> list[Item]:
    """The inverse of `pack`, or only the items with `wanted` indexes. Raises ValueError if it can't be read."""
    inflating = zlib.decompressobj()
    try:
        text = inflating.decompress(data, MOST_PACK)
        if not inflating.eof or inflating.unused_data:
            raise ValueError("a pack is incomplete or larger than 4 MiB")
        rows = json.loads(text)
        newest = max((row.get("version", 0) for row in rows), default=0)
        if newest > VERSION:
            raise NewerVersion(f"a row's version is {newest}")
        return [Item.model_validate(fields) for fields in rows if wanted is None or fields["index"] in wanted]
    except (zlib.error, AttributeError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"not a pack: {sentence(error)}") from error
