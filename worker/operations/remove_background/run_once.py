"""Runs a model once for equal inputs, because an image's results come one after another."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from imagemill.worker.operations.remove_background.session import Opened

KEPT = 2
"""Outputs kept for the next batch. More than one, as batches may be cut in two when memory runs out."""


class RunOnce:
    """An opened model whose inputs are arrays, with the latest outputs, for use in one thread."""

    def __init__(self, model: Opened) -> None:
        self.batches = model.batches
        self._model = model
        self._latest: dict[bytes, Any] = {}

    def run(self, data: Sequence[Any], *, together: bool = True) -> list[Any]:
        """See `Opened`."""
        keys = [hashlib.blake2b(array.tobytes()).digest() for array in data]
        new = {key: array for key, array in zip(keys, data, strict=True) if key not in self._latest}
        known = self._latest | dict(zip(new, self._model.run([*new.values()], together=together), strict=True))
        self._latest = {key: known[key] for key in [*dict.fromkeys(keys)][-KEPT:]}
        return [known[key] for key in keys]
