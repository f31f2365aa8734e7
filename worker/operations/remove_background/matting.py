"""Alpha matting: recovers the transparency of hair and fur along a matte's edge from the image's colours.

Closed-form matting: Levin, Lischinski, Weiss, A Closed-Form Solution to Natural Image Matting, CVPR 2006. Unlike rembg's,
it keeps near the matte where colours don't tell subject from background, and only what the matte itself leaves open is
computed. Photos' mattes by ISNet's real weights, laid on other backgrounds and blurred to a third and a sixth of their size,
were the test: with rembg's trimap and without the matte's pull, results were farther from the truth than the blurred mattes
in most cases. pymatting provides the matrix and the solver. Its matrix takes 400 bytes per pixel, known or not, so it
is built in bands, and only the rows of unsure pixels are kept: on a portrait of 1.6 megapixels the peak is 240 MB, against
630 MB for the bounding box of the unsure pixels in one piece. A cap and a deadline bound the whole computation.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from imagemill.shared.errors import MissingExtra
from imagemill.worker.imaging.picture import Grey, Pixels

REVISION = 2
"""Raise this whenever the same image and matte give different pixels, so that cached results are not reused."""

TOO_LARGE = "matting_too_large"
TIMED_OUT = "matting_timed_out"
FAILED = "matting_failed"

LARGEST = 2_560_000  # most pixels of an image; each unsure one takes about 2 kB of memory
SECONDS = 20.0  # deadline per image
FRONT, BACK = 240, 10  # rembg's thresholds: alpha above is certainly the subject, alpha below certainly the background
MARGIN = 3  # if all in a square of this side are; rembg's 10 smears hair into a textured background
UNSURE = 4  # at most one pixel in this many may be unsure; each costs about 2 kB and 15 us
FILL = 100  # most entries per row of the preconditioner; photos need 35 to 65
SHIFTS = (1e-4, 1e-3, 1e-2, 1e-1)  # tried in turn on the diagonal until the preconditioner exists; larger means more rounds
PACE = 20e-6  # seconds per unsure pixel allowed for building the preconditioner, which can't be interrupted; 8e-6 is usual
PRIOR = 0.01  # weight of the matte's own alpha; neighbours of like colour have about 8 in total
BAND = 64  # image rows per band of the matrix
ROUNDS = 2000  # most iterations of the solver; 5 are usual


class _TimedOut(Exception):
    pass


def matted(
    pixels: Pixels,
    alpha: Grey,
    notes: list[str],
    sure: tuple[int, int, int | None] = (FRONT, BACK, None),
    *,
    most: int = LARGEST,
    seconds: float = SECONDS,
) -> Grey:
    """`alpha` [h, w] with its unsure parts recomputed from `pixels` [h, w, 3 or 4], and its sure parts set to 0 or 255.

    `sure` are the thresholds and the margin of `trimap`.
    Returns `alpha` itself and adds a note to `notes` if the image has more than `most` pixels or a quarter as many unsure
    ones (`matting_too_large`), after `seconds` (`matting_timed_out`), or if the solver fails (`matting_failed`).
    Unsure parts that don't touch both subject and background keep their alpha. Loading pymatting does not count towards
    the deadline; it happens once per process and takes half a second, or up to a minute before its compiled code is cached.

    Raises MissingExtra.
    """
    if alpha.size > most:
        notes.append(TOO_LARGE)
        return alpha
    front, back = trimap(alpha, *sure)
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
        solution = _solved(library, pixels[..., :3], fixed, unsure, _deadline(seconds))
    except _TimedOut:
        notes.append(TIMED_OUT)
        return alpha
    except (ArithmeticError, MemoryError, RuntimeError, ValueError):  # what numba, scipy and pymatting raise
        notes.append(FAILED)
        return alpha
    fixed[unsure] = np.rint(np.clip(solution, 0, 1) * 255).astype(np.uint8)
    return fixed


def trimap(
    alpha: Grey, front: int = FRONT, back: int = BACK, margin: int | None = None
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which pixels are certainly subject and which are certainly background, both [h, w], by rembg's rule.

    Alpha is above `front` or below `back` within a square of `margin` pixels, by default `MARGIN`; with a margin of 0, in the
    four neighbours.
    """
    margin = MARGIN if margin is None else margin
    near = np.ones((margin, margin), np.uint8) if margin else cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
    surely = cv2.erode((alpha > front).view(np.uint8), near, borderType=cv2.BORDER_CONSTANT, borderValue=(0,))
    never = cv2.erode((alpha < back).view(np.uint8), near, borderType=cv2.BORDER_CONSTANT, borderValue=(1,))
    return surely.view(np.bool_), never.view(np.bool_)


def _between(front: NDArray[np.bool_], back: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The unsure parts that touch both subject and background: a part that touches one would only take on its value."""
    count, labels = cv2.connectedComponents((~(front | back)).view(np.uint8), connectivity=8)
    touches_both = np.ones(count, np.bool_)
    for sure in (front, back):
        wider = cv2.dilate(sure.view(np.uint8), np.ones((3, 3), np.uint8)).view(np.bool_)
        touches_both &= np.bincount(labels[wider], minlength=count) > 0
    touches_both[0] = False
    return np.asarray(touches_both[labels], np.bool_)


def _library() -> Any:
    try:
        import pymatting  # type: ignore[import-untyped]
    except ImportError as error:
        raise MissingExtra(f"alpha matting needs {error.name}: pip install 'imagemill[rembg]'") from error
    return pymatting


def _deadline(seconds: float) -> Callable[[float], None]:
    """A function that raises _TimedOut unless a step of so many seconds would still end in time."""
    end = time.monotonic() + seconds

    def check(step: float) -> None:
        if time.monotonic() + step > end:
            raise _TimedOut

    return check


def _solved(
    library: Any, rgb: Pixels, fixed: Grey, unsure: NDArray[np.bool_], check: Callable[[float], None]
) -> NDArray[np.float64]:
    """Alpha 0..1 of the unsure pixels, in row-major order."""
    from scipy.sparse import identity  # type: ignore[import-untyped]

    left, top, width, height = cv2.boundingRect(unsure.view(np.uint8))
    box = slice(max(0, top - 2), top + height + 2), slice(max(0, left - 2), left + width + 2)
    rgb, fixed, unsure = rgb[box], fixed[box], unsure[box]
    rows = _unsure_rows(library, rgb, unsure, check)
    right_side = -rows.dot(np.where(unsure, 0, fixed / 255.0).ravel())
    guess = fixed[unsure] / 255
    matrix = rows[:, unsure.ravel()] + PRIOR * identity(len(guess), format="csr")
    right_side += PRIOR * guess
    del rows  # as large as the matrix
    preconditioner = _preconditioner(library, matrix, check)

    def watch(_matrix: Any, _x: Any, _b: Any, _norm_b: float, _r: Any, norm_r: float) -> None:
        check(0)
        if not np.isfinite(norm_r):
            raise ArithmeticError("the solver diverged")

    return np.asarray(library.cg(matrix, right_side, x0=guess, M=preconditioner, maxiter=ROUNDS, callback=watch), np.float64)


def _unsure_rows(library: Any, rgb: Pixels, unsure: NDArray[np.bool_], check: Callable[[float], None]) -> Any:
    """The matting Laplacian's rows for the unsure pixels: a sparse matrix [unsure pixels, pixels], built band by band.

    A pixel's row only involves pixels up to two away, so a band with two more image rows on each side gives exactly what the
    whole image would.
    """
    from scipy.sparse import csr_matrix, vstack

    width, bands = unsure.shape[1], []
    for top in range(0, len(unsure), BAND):
        inside = unsure[top : top + BAND].ravel()
        if not inside.any():
            continue
        first = max(0, top - 2)
        around, skipped = slice(first, top + BAND + 2), (top - first) * width
        laplacian = library.cf_laplacian(rgb[around] / 255.0, is_known=~unsure[around])
        band = laplacian[skipped : skipped + inside.size][inside]
        del laplacian  # 400 bytes per pixel of the band
        band.eliminate_zeros()
        columns = (band.indices + first * width).astype(np.int32)  # positions in the whole image
        bands.append(csr_matrix((band.data, columns, band.indptr), (band.shape[0], unsure.size)))
        check(0)
    return vstack(bands, format="csr")


def _preconditioner(library: Any, matrix: Any, check: Callable[[float], None]) -> Any:
    count = matrix.shape[0]
    for shift in SHIFTS:  # one per call: pymatting's own loop over shifts would not check the deadline
        check(count * PACE)
        try:
            return library.ichol(matrix, shifts=[shift], max_nnz=FILL * count)
        except ValueError:
            continue
    raise ArithmeticError("no shift makes the matrix positive definite")
