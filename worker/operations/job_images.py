"""Reads the images that a job's options refer to: references and backgrounds."""

from __future__ import annotations

from collections.abc import Callable

from imagemill.shared.errors import BadReference, ImageError
from imagemill.shared.urls import shown
from imagemill.worker.imaging.picture import Picture, Pixels


def job_image(kind: str, url: str, read: Callable[[str], Picture]) -> Pixels:
    """The pixels of the image at `url`; `kind` names it in errors. Raises BadReference, or a retryable error unchanged."""
    try:
        return read(url).pixels
    except ImageError as error:
        if error.retryable:
            raise
        raise BadReference(f"the {kind} {shown(url)} can't be used: {error.message}") from error
