"""What all users of OpenCV share: set-up and errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import cv2

from imagemill.shared.errors import OperationFailed, OutOfMemory, sentence
from imagemill.worker.hardware.device import Device


def set_up(device: Device) -> None:
    """Keep OpenCV to this child's share of the cores, and off OpenCL."""
    cv2.setNumThreads(device.threads)
    cv2.ocl.setUseOpenCL(False)


def fingerprint(revision: int) -> str:
    """What decides an OpenCV engine's results besides image and options; `revision` is of its own code."""
    return f"opencv {cv2.__version__}, revision {revision}"


@contextmanager
def translated(doing: str) -> Iterator[None]:
    """Turn what OpenCV and numpy raise into our errors; also a decorator. `doing` completes `failed at ...`.

    Raises OutOfMemory and OperationFailed.
    """
    try:
        yield
    except MemoryError as error:
        raise OutOfMemory(f"there was not enough memory for {doing}: {sentence(error)}") from error
    except cv2.error as error:
        if getattr(error, "code", None) == cv2.Error.StsNoMem:
            raise OutOfMemory(f"there was not enough memory for {doing}: {sentence(error)}") from error
        raise OperationFailed(f"failed at {doing}: {sentence(error)}") from error
