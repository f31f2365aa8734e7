"""The seed of each image, as the producer, the cache of results and the engine all compute it."""

from __future__ import annotations

import hashlib
from urllib.parse import urlsplit

from imagemill.shared.options.base import EngineOptions
from imagemill.shared.options.stylize import DiffusionStylize

SEEDS = 2**32


def item_seed(options: EngineOptions, index: int, source: str) -> int | None:
    """The seed, 0 to 2**32 - 1, of the image at position `index` in a job; None for an engine without randomness.

    With `url` it depends on the URL without its query, which may be a signature that changes every day.
    """
    return diffusion_seed(options, index, source) if isinstance(options, DiffusionStylize) else None


def diffusion_seed(options: DiffusionStylize, index: int, source: str) -> int:
    """The seed for an engine that always has one."""
    match options.seed_policy:
        case "fixed":
            return options.seed
        case "per-item":
            return (options.seed + index) % SEEDS
        case "url":
            url = urlsplit(source)._replace(query="", fragment="").geturl()
            return int.from_bytes(hashlib.sha256(f"{options.seed} {url}".encode()).digest()[:4], "big")


def next_seed(seed: int) -> int:
    """The seed for another attempt at the same image."""
    return (seed + 1) % SEEDS
