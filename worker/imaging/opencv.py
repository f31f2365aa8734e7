"""Set-up and error handling shared by everything that uses OpenCV."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import cv2

from imagemill.shared.errors import OperationFailed, OutOfMemory, sentence

if TYPE_CHECKING:  # it loads the settings, which the helpers that decode must not wait for
    from imagemill.worker.hardware.device import Device


def set_up(device: Device) -> None:
    """Limit OpenCV to this child's share of the cores and disable OpenCL."""
    cv2.setNumThreads(device.threads)
    cv2.ocl.setUseOpenCL(False)


def fingerprint(revision: int) -> str:
    """Identify what determines an OpenCV engine's results besides image and options; `revision` is that of its code."""
    return f"opencv {cv2.__version__}, revision {revision}"


@contextmanager
def translated(doing: str) -> Iterator[None]:
    """Turn OpenCV's errors and MemoryError into OutOfMemory or OperationFailed; also usable as a decorator.

    `doing` names the activity in messages, such as `scaling the picture`.
    """
    try:
        yield
    except (MemoryError, cv2.error) as error:
        if isinstance(error, MemoryError) or getattr(error, "code", None) == cv2.Error.StsNoMem:
            raise OutOfMemory(f"not enough memory for {doing}: {sentence(error)}") from error
        raise OperationFailed(f"{doing} failed: {sentence(error)}") from error
