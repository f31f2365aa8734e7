"""Results remembered: the same image asked for again, in any job, is copied inside the store and not computed.

All that decides a result's bytes is hashed into a key; under it Redis holds where the result lies and what it is, for
as long as it remembers jobs. Nothing here fails an image: what is in doubt is computed. Not remembered are images with
a mask by address and jobs with options that are addresses (`ADDRESSES`), since other bytes may lie there
tomorrow.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlsplit

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from imagemill.shared.connection import connect
from imagemill.shared.errors import ImageError, ImagemillError, sentence
from imagemill.shared.messages import Item, Job
from imagemill.shared.options.base import ADDRESSES
from imagemill.shared.quality import Measures
from imagemill.shared.seeds import item_seed
from imagemill.shared.settings import Settings
from imagemill.worker.checking.quality import REVISION as REPAIRS
from imagemill.worker.imaging.codec import EXTENSIONS, Encoded
from imagemill.worker.line.versions import versions
from imagemill.worker.operations.base import AnyOperation
from imagemill.worker.transfer.store import Store

log = logging.getLogger(__name__)

REVISION = 4
"""Raise it when decoding, scaling or encoding make other bytes of the same image."""

AROUND = ("imagemill", "isal", "numpy", "opencv-python-headless", "pillow", "simplejpeg")
"""Packages that decide a result whatever the engine; each engine names its own in its `fingerprint`."""

KEY_BYTES = 21  # 168 bits, 28 characters: with the prefix as much as Redis gives a key of this size anyway
QUIET = 600.0  # seconds between complaints


@dataclass(frozen=True)
class Remembered:
    """A result in a store: its address, MD5 in hex, format (png, jpeg or webp), bytes, (width, height) and notes.

    `measures` is None where it was not checked. What it is flagged as is not remembered: that is for each job to judge.
    """

    output: str
    md5: str
    format: str
    bytes: int
    size: tuple[int, int]
    notes: tuple[str, ...] = ()
    measures: Measures | None = None

    @classmethod
    def of(
        cls, encoded: Encoded, *, output: str, size: tuple[int, int], notes: tuple[str, ...], measures: Measures | None
    ) -> Remembered:
        """A file that was just stored at `output`."""
        md5 = hashlib.md5(encoded.data, usedforsecurity=False).hexdigest()
        return cls(output, md5, encoded.format, len(encoded.data), size, notes, measures)

    def copied(self, store: Store, key: str) -> Remembered | None:
        """The same result under a key of `store`; None if it is gone or can't be copied, whatever the reason."""
        try:
            return replace(self, output=store.copy(self.output, key, f"image/{self.format}", md5=self.md5))
        except ImageError as error:
            log.info("result not copied", extra={"action": "reuse", "reason": error.message})
            return None


class Cache:
    """Thread-safe; make one per process, after the fork. `ttl` is in seconds."""

    def __init__(self, url: str, ttl: float) -> None:
        self._redis = connect(url)
        self._redis.set_retry(Retry(NoBackoff(), 1))  # once more on a connection that went stale; no image waits longer
        self._ttl_ms = max(1, int(ttl * 1000))
        self._complained = -QUIET

    @classmethod
    def of(cls, settings: Settings) -> Cache | None:
        """The cache that `settings` name; None where the operator has turned it off."""
        if not settings.worker.reuse:
            return None
        return cls(settings.redis_url.get_secret_value(), settings.expire_days * 86_400)

    def close(self) -> None:
        """Give the connections back."""
        self._redis.close()

    def key(self, data: bytes, item: Item, spec: Job, operation: AnyOperation) -> str | None:
        """What stands for the result of this image file: equal keys, equal bytes. None if it can't be remembered."""
        options, wanted = spec.options.model_dump(mode="json"), spec.policy.quality
        if item.mask is not None or any(options.get(name) is not None for name in ADDRESSES):
            return None
        try:
            engine = operation.fingerprint(spec.options)
        except (ImagemillError, OSError) as error:
            self._complain(error)
            return None
        decides = {
            "source": hashlib.sha256(data).hexdigest(),
            "operation": spec.operation,
            "options": options,
            "boxes": [box.model_dump() for box in item.boxes],
            "seed": item_seed(spec.options, item.index, item.source),
            "output": {**spec.output.model_dump(include={"format", "quality"}), "icc": spec.icc},
            "engine": engine,
            "repair": [REPAIRS, wanted.model_dump()] if wanted.mode == "repair" else None,
            "around": [REVISION, *(versions().get(name) for name in AROUND)],
            "store": urlsplit(spec.output.url).scheme,  # copies are made within one, so each remembers its own
        }
        digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).digest()
        return base64.urlsafe_b64encode(digest[:KEY_BYTES]).decode()

    def get(self, key: str | None) -> Remembered | None:
        """What is remembered under a key, if Redis can be asked and knows; `copied` finds out whether it is still there."""
        raw: bytes | None = None
        if key is not None:
            with self._spared():
                raw = self._redis.get(_name(key))
        return _unpacked(raw) if raw is not None else None

    def put(self, key: str | None, result: Remembered) -> None:
        """Remember a result that is safely stored, instead of what was remembered before."""
        if key is not None:
            with self._spared():
                self._redis.set(_name(key), _packed(result), px=self._ttl_ms)

    @contextmanager
    def _spared(self) -> Iterator[None]:
        """Redis' troubles inside end here: away, or full."""
        try:
            yield
        except redis.RedisError as error:
            self._complain(error)

    def _complain(self, error: Exception) -> None:
        """Once, not for each image."""
        if time.monotonic() - self._complained >= QUIET:
            self._complained = time.monotonic()
            log.warning("results are not remembered", extra={"action": "reuse", "reason": sentence(error)})


def _name(key: str) -> str:
    return f"imagemill:cache:{key}"


def _packed(result: Remembered) -> bytes:
    md5 = base64.b64encode(bytes.fromhex(result.md5)).decode().rstrip("=")
    measures = result.measures.model_dump(exclude_defaults=True) if result.measures is not None else None
    fields = [result.output, md5, result.format, result.bytes, *result.size, measures, *result.notes]
    return json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()


def _unpacked(raw: bytes) -> Remembered | None:
    """None for what another version may have left there."""
    try:
        fields: list[Any] = json.loads(raw)
        output, md5, form, size, width, height, measures, *notes = fields
        digest = base64.b64decode(md5 + "==").hex()
        known = Measures.model_validate(measures) if measures is not None else None
        sides = int(width), int(height)
        found = Remembered(str(output), digest, str(form), int(size), sides, tuple(map(str, notes)), known)
    except (ValueError, TypeError):
        return None
    return found if found.format in EXTENSIONS else None
