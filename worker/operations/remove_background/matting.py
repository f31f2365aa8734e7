"""Alpha matting: the transparency of hair and fur at a matte's edge, found from the picture's colours.

Closed-form matting: Levin, Lischinski, Weiss, A Closed-Form Solution to Natural Image Matting, CVPR 2006, with the
trimap that rembg makes. pymatting has the matrix and the solver; here the matrix is built in bands and only where the
matte is unsure (so its 400 bytes for every pixel are never all there), and all of it stands under a cap and a deadline.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from imagemill.shared.errors import MissingExtra
from imagemill.worker.imaging.picture import Grey, Pixels

TOO_LARGE = "matting_too_large"
TIMED_OUT = "matting_timed_out"
FAILED = "matting_failed"

LARGEST = 2_560_000  # pixels of an image that is matted: about 2 kB of memory for each unsure one
SECONDS = 20.0  # that matting one image may take
FRONT, BACK = 240, 10  # rembg's: above is sure to be the subject, below is sure not to be
MARGIN = 10  # rembg's: and all within this many pixels
UNSURE = 4  # one part in this many may be unsure: it is these pixels that cost, about 2 kB and 15 us each
FILL = 100  # numbers that a row of the preconditioner may have; 35 to 65 on photos
SHIFTS = (1e-4, 1e-3, 1e-2, 1e-1)  # added to the diagonal until the preconditioner exists: more means more rounds
PACE = 20e-6  # seconds for an unsure pixel that one try at the preconditioner may take, which nothing can stop; 8e-6 is usual
BAND = 64  # rows of the matrix made at a time
ROUNDS = 2000  # of the solver; 5 are usual


class _TimedOut(Exception):
    pass


def matted(pixels: Pixels, alpha: Grey, notes: list[str], *, most: int = LARGEST, seconds: float = SECONDS) -> Grey:
    """`alpha` [h, w] with its unsure parts found anew from `pixels` [h, w, 3 or 4], and its sure ones made 0 or 255.

    With more than `most` pixels, or a quarter as many unsure ones, after `seconds`, or where the solver fails, it is
    `alpha` itself, and `notes` gets `matting_too_large`, `matting_timed_out` or `matting_failed`. Unsure parts
    that touch nothing sure on one side keep their alpha. Loading pymatting, once per process, is not counted:
    it takes half a second, and up to a minute where its compiled code has not been cached yet.

    Raises MissingExtra.
    """
    if alpha.size > most:
        notes.append(TOO_LARGE)
        return alpha
    front, back = trimap(alpha)
    if pixels.shape[2] == 4:
        back |= pixels[..., 3] == 0
        front &= ~back
    unsure = _between(front, back)
    fixed = np.where(front, np.uint8(255), np.where(back, np.uint8(0), alpha))
    count = int(unsure.sum())
    if not count:
        if not front.any():
            notes.append(FAILED)
            return alpha
        return fixed
    if count > most // UNSURE:
        notes.append(TOO_LARGE)
        return alpha
    library = _library()
    try:
        found = _solved(library, pixels[..., :3], fixed, unsure, _clock(seconds))
    except _TimedOut:
        notes.append(TIMED_OUT)
        return alpha
    except (ArithmeticError, MemoryError, RuntimeError, ValueError):  # what numba, scipy and pymatting raise
        notes.append(FAILED)
        return alpha
    fixed[unsure] = np.rint(np.clip(found, 0, 1) * 255).astype(np.uint8)
    return fixed


def trimap(alpha: Grey) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Where the subject surely is, and where it surely is not, as rembg has it with its defaults; both [h, w]."""
    square = np.ones((MARGIN, MARGIN), np.uint8)
    front = cv2.erode((alpha > FRONT).view(np.uint8), square, borderType=cv2.BORDER_CONSTANT, borderValue=(0,))
    back = cv2.erode((alpha < BACK).view(np.uint8), square, borderType=cv2.BORDER_CONSTANT, borderValue=(1,))
    return front.view(np.bool_), back.view(np.bool_)


def _between(front: NDArray[np.bool_], back: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The unsure parts that touch both: with one neighbour only, its value is all that could come out."""
    count, labels = cv2.connectedComponents((~(front | back)).view(np.uint8), connectivity=8)
    both = np.ones(count, np.bool_)
    for sure in (front, back):
        wider = cv2.dilate(sure.view(np.uint8), np.ones((3, 3), np.uint8)).view(np.bool_)
        both &= np.bincount(labels[wider], minlength=count) > 0
    both[0] = False
    return np.asarray(both[labels], np.bool_)


def _library() -> Any:
    try:
        import pymatting  # type: ignore[import-untyped]
    except ImportError as error:
        raise MissingExtra(f"alpha matting needs {error.name}: pip install 'imagemill[rembg]'") from error
    return pymatting


def _clock(seconds: float) -> Callable[[float], None]:
    end = time.monotonic() + seconds

    def enough_for(more: float) -> None:
        if time.monotonic() + more > end:
            raise _TimedOut

    return enough_for


def _solved(
    library: Any, rgb: Pixels, fixed: Grey, unsure: NDArray[np.bool_], enough_for: Callable[[float], None]
) -> NDArray[np.float64]:
    """Alpha 0..1 of the unsure pixels, in the order of the rows."""
    from scipy.sparse import csr_matrix  # type: ignore[import-untyped]

    parts: list[tuple[NDArray[Any], ...]] = []
    for part in _rows(library, rgb, fixed, unsure):
        parts.append(part)
        enough_for(0)
    values, columns, counts, right = (np.concatenate(some) for some in zip(*parts, strict=True))
    parts.clear()
    count = len(right)
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32 if len(values) < 2**31 else np.int64)
    matrix = csr_matrix((values, columns, starts), (count, count))
    preconditioner = _preconditioner(library, matrix, enough_for)

    def watch(_matrix: Any, _x: Any, _b: Any, _norm_b: float, _r: Any, norm_r: float) -> None:
        enough_for(0)
        if not np.isfinite(norm_r):
            raise ArithmeticError("the solver left the numbers")

    guess = fixed[unsure] / 255
    return np.asarray(library.cg(matrix, right, x0=guess, M=preconditioner, maxiter=ROUNDS, callback=watch), np.float64)


def _preconditioner(library: Any, matrix: Any, enough_for: Callable[[float], None]) -> Any:
    count = matrix.shape[0]
    for shift in SHIFTS:  # one at a time: pymatting's own loop would not look at the clock
        enough_for(count * PACE)
        try:
            return library.ichol(matrix, shifts=[shift], max_nnz=FILL * count)
        except ValueError:
            continue
    raise ArithmeticError("no shift makes the matrix positive definite")


def _rows(
    library: Any, rgb: Pixels, fixed: Grey, unsure: NDArray[np.bool_]
) -> Iterator[tuple[NDArray[np.float64], NDArray[np.int32], NDArray[np.int64], NDArray[np.float64]]]:
    """The matrix's rows of the unsure pixels, band by band: values, columns, their number per row; and the right side.

    A pixel hangs together with those at most two away, so a band with two rows and columns more around it gives
    just what the whole picture would.
    """
    height, width = fixed.shape
    number = np.full(fixed.shape, -1, np.int32)
    number[unsure] = np.arange(np.count_nonzero(unsure), dtype=np.int32)
    for top in range(0, height, BAND):
        bottom = min(top + BAND, height)
        used = np.flatnonzero(unsure[top:bottom].any(axis=0))
        if not len(used):
            continue
        above = max(0, top - 2)
        around = slice(above, bottom + 2), slice(max(0, int(used[0]) - 2), min(width, int(used[-1]) + 3))
        own = unsure[around].copy()
        own[: top - above] = False
        own[bottom - above :] = False
        laplacian = library.cf_laplacian(rgb[around] / 255.0, is_known=~unsure[around])[own.ravel()]
        known = np.where(unsure[around], 0, fixed[around] / 255.0)
        columns = number[around].ravel()[laplacian.indices]
        kept = (columns >= 0) & (laplacian.data != 0)
        counts = np.add.reduceat(kept, laplacian.indptr[:-1], dtype=np.int64)
        yield laplacian.data[kept], columns[kept], counts, -laplacian.dot(known.ravel())
