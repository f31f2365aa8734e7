"""Which seed an image's noise comes from: the same for the producer's records, the cache of results and the engine."""

from __future__ import annotations

import hashlib
from urllib.parse import urlsplit

from imagemill.shared.options.base import EngineOptions
from imagemill.shared.options.stylize import DiffusionStylize

SEEDS = 2**32


def item_seed(options: EngineOptions, index: int, source: str) -> int | None:
    """The seed, 0 to 2**32 - 1, of the image at place `index` of a job's list; None where nothing is random.

    By `url` it hangs on the address without its query, which may be a signature that is another one each day.
    """
    return diffusion_seed(options, index, source) if isinstance(options, DiffusionStylize) else None


def diffusion_seed(options: DiffusionStylize, index: int, source: str) -> int:
    """The same for options that always have one."""
    match options.seed_policy:
        case "fixed":
            return options.seed
        case "per-item":
            return (options.seed + index) % SEEDS
        case "url":
            address = urlsplit(source)._replace(query="", fragment="").geturl()
            return int.from_bytes(hashlib.sha256(f"{options.seed} {address}".encode()).digest()[:4], "big")


def next_seed(seed: int) -> int:
    """The seed of another try at the same image."""
    return (seed + 1) % SEEDS
