"""remove-background without a model: GrabCut, seeded by a colour model of the border and a centre prior."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np
from numpy.typing import NDArray

from imagemill.shared.options.remove_background import OpencvRemoveBackground
from imagemill.worker.hardware.device import Device
from imagemill.worker.imaging.opencv import fingerprint, set_up, translated
from imagemill.worker.imaging.picture import Grey, Picture, Pixels
from imagemill.worker.imaging.scale import fit, resize
from imagemill.worker.operations.base import Evidence, Inputs, Operation, Sample, Spec, Work
from imagemill.worker.operations.remove_background.matte import EMPTY, SEEN, cut_out, is_cut_out, soft_alpha
from imagemill.worker.operations.remove_background.saliency import Map, content_box, saliency

WORK_EDGE = 320  # longest edge in pixels at which GrabCut runs
ROUNDS = 3  # iterations of GrabCut
FRAME = 5  # pixels at the frame that may have been taken for background because the subject touches it
PLAIN, LIKE = 2.0, 2.5  # noise of a plain backdrop, and the difference from it of what belongs to it; units of Lab
ENCLOSED = 0.02  # smallest area of the backdrop seen through the subject, as a share of the subject
BORDER = 0.04  # share of each side that is learnt as background
SMALLEST = 8  # pixels; smaller images have no usable border
REVISION = 4
"""Raise this whenever the same image and options give different pixels, so that cached results are not reused."""


@dataclass(frozen=True)
class Scene:
    """GrabCut's input: `rgb` [h, w, 3], and `opaque` [h, w] with 1 for opaque pixels; None if all are.

    If the subject is already `cut` out, `opaque` is 1 for all visible pixels.
    """

    rgb: Pixels
    opaque: Grey | None
    cut: bool = False


@dataclass(frozen=True)
class Plan:
    """What `finish` needs: the picture at the result's size."""

    picture: Picture


CutOut = Work[OpencvRemoveBackground, Scene, Plan]


class GrabCut(Operation[OpencvRemoveBackground, Scene, Grey, Plan]):
    """GrabCut (Rother, Kolmogorov, Blake, SIGGRAPH 2004) at `WORK_EDGE` pixels, with edges refined at the result's size."""

    spec = Spec("remove-background", "opencv", makes_alpha=True)

    def load(self, device: Device) -> None:
        set_up(device)

    def fingerprint(self, options: OpencvRemoveBackground) -> str:  # noqa: ARG002
        return fingerprint(REVISION)

    def work_edge(self, options: OpencvRemoveBackground) -> int | None:
        return options.long_edge

    @translated("scaling the image")
    def prepare(self, picture: Picture, inputs: Inputs[OpencvRemoveBackground]) -> CutOut:
        options = inputs.options
        pixels = resize(picture.pixels, fit(picture.size, options.long_edge))
        small = resize(pixels, fit((pixels.shape[1], pixels.shape[0]), WORK_EDGE))
        cut = is_cut_out(small)
        opaque = (small[..., 3] > (SEEN if cut else 127)).astype(np.uint8) if small.shape[2] == 4 else None
        scene = Scene(np.ascontiguousarray(small[..., :3]), opaque if opaque is not None and not opaque.all() else None, cut)
        return Work([Sample(scene, options)], plan=Plan(replace(picture, pixels=pixels)))

    @translated("cutting out the subject")
    def run(self, samples: Sequence[Sample[OpencvRemoveBackground, Scene]]) -> list[Grey]:
        return [find_subject(sample.data) for sample in samples]

    @translated("refining the edge")
    def finish(self, work: CutOut, outputs: Sequence[Grey]) -> Picture:
        (sample,), (mask,) = work.samples, outputs
        scene, options = sample.data, sample.options
        if not mask.any():
            work.notes.append(EMPTY)
        pixels = work.plan.picture.pixels
        if scene.cut:
            alpha = np.ones(pixels.shape[:2], np.float32)  # its own is multiplied in
        else:
            alpha = soft_alpha(pixels[..., :3], scene.rgb, mask.astype(np.float32), options.feather)
        if options.background is not None:
            work.evidence = Evidence(alpha=mask * np.uint8(255))
        result = cut_out(pixels, alpha, options.background, rough=True, clean_rim=not scene.cut)
        return replace(work.plan.picture, pixels=result)


def find_subject(scene: Scene) -> Grey:
    """Mask [h, w] with 1 for the subject and 0 for the background; all 0 if no subject is found."""
    mask = np.zeros(scene.rgb.shape[:2], np.uint8)
    cv2.setRNGSeed(0)  # k-means uses this thread's generator; unseeded, the result would depend on earlier images
    rgb = scene.rgb
    if scene.opaque is not None:
        if scene.cut or not scene.opaque.any():
            return scene.opaque
        rgb = np.where(scene.opaque[..., None] > 0, rgb, np.median(rgb[scene.opaque > 0], axis=0).astype(np.uint8))
    rows, columns = content_box(rgb)
    inside = np.ascontiguousarray(rgb[rows, columns])
    if min(inside.shape[:2]) >= SMALLEST:
        mask[rows, columns] = _cut(inside)
    return mask if scene.opaque is None else mask * scene.opaque


def _cut(rgb: Pixels) -> Grey:
    salient = saliency(rgb, BORDER)
    if salient is None:
        return np.zeros(rgb.shape[:2], np.uint8)
    likely, rim = salient
    split = cv2.threshold(np.rint(likely * 255).astype(np.uint8), 0, 255, cv2.THRESH_OTSU)[0] / 255
    marks = np.where(likely > split, cv2.GC_PR_FGD, cv2.GC_PR_BGD).astype(np.uint8)
    marks[likely > split + 0.7 * (1 - split)] = cv2.GC_FGD
    marks[rim | (likely < 0.15 * split)] = cv2.GC_BGD
    front = (marks == cv2.GC_FGD) | (marks == cv2.GC_PR_FGD)
    if min(front.sum(), (~front).sum()) < 10:  # GrabCut fits five colours to each
        return np.zeros(rgb.shape[:2], np.uint8)
    back_model, front_model = np.zeros((1, 65)), np.zeros((1, 65))
    cv2.grabCut(_features(rgb), marks, (0, 0, 0, 0), back_model, front_model, ROUNDS, cv2.GC_INIT_WITH_MASK)
    touching = _at_the_frame(marks)
    if touching.any():  # taken for background so far, and learnt as such
        marks[touching] = cv2.GC_PR_FGD
        cv2.grabCut(_features(rgb), marks, (0, 0, 0, 0), back_model, front_model, 1, cv2.GC_EVAL)
    return _without_backdrop(_tidied(_in_front(marks), likely), rgb)


def _in_front(marks: Grey) -> Grey:
    return np.asarray((marks == cv2.GC_FGD) | (marks == cv2.GC_PR_FGD), np.uint8)


def _at_the_frame(marks: Grey) -> NDArray[np.bool_]:
    """The background at the frame, where the subject comes so close that it may touch it."""
    near, front = np.zeros(marks.shape, np.bool_), _in_front(marks)
    depth = min(FRAME, (min(marks.shape) - 1) // 2)
    for turn in range(4):
        side, inside = np.rot90(near, turn), np.rot90(front, turn)  # views
        side[:depth] |= inside[depth] > 0
    return np.asarray(near & (front == 0), np.bool_)


def _features(rgb: Pixels) -> Pixels:
    """Lab with a and b stretched threefold: hue separates subject and background better than brightness."""
    lab = cv2.cvtColor(rgb.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
    return np.asarray(np.clip(lab * (2.55, 3, 3) + (0, 128, 128), 0, 255), np.uint8)


def _tidied(mask: Grey, likely: Map) -> Grey:
    """The mask without small parts (total likelihood below 15 % of the largest part's) and without small holes."""
    opened = cv2.morphologyEx(mask, cv2.MORPH_OPEN, np.ones((3, 3), np.uint8))
    count, labels = cv2.connectedComponents(opened, connectivity=4)
    weight = np.bincount(labels.ravel(), weights=likely.ravel(), minlength=count)
    weight[0] = 0
    mask = (weight >= max(0.15 * weight.max(), 1e-6)).astype(np.uint8)[labels]
    count, labels, stats, _ = cv2.connectedComponentsWithStats(1 - mask, connectivity=4)
    at_edge = np.unique(np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]]))
    hole = stats[:, cv2.CC_STAT_AREA] < 0.02 * mask.sum()
    hole[at_edge] = False
    hole[0] = False  # label 0 is the subject
    return np.asarray(mask | hole.astype(np.uint8)[labels], np.uint8)


def _without_backdrop(mask: Grey, rgb: Pixels) -> Grey:
    """The mask without larger areas in which a plain backdrop is seen through the subject, as in a ring."""
    lab = cv2.cvtColor(rgb.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
    height, width = mask.shape
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    terms = np.stack([np.ones_like(x), x, y, x * y], axis=2)
    around = cv2.dilate(mask, np.ones((7, 7), np.uint8)) == 0
    if np.count_nonzero(around) < 0.05 * mask.size:
        return mask
    rest = abs(lab - terms @ np.linalg.lstsq(terms[around], lab[around], rcond=None)[0])
    noise = 1.4826 * np.median(rest[around], axis=0)
    if noise.max() > PLAIN:
        return mask
    seen = ((rest <= np.maximum(3 * noise, LIKE)).all(axis=2) & (mask > 0)).astype(np.uint8)
    square = np.ones((3, 3), np.uint8)
    _, labels, stats, _ = cv2.connectedComponentsWithStats(cv2.morphologyEx(seen, cv2.MORPH_OPEN, square), connectivity=4)
    large = stats[:, cv2.CC_STAT_AREA] >= ENCLOSED * np.count_nonzero(mask)
    large[0] = False  # label 0 is everything else
    return np.asarray(mask * (cv2.dilate(large.astype(np.uint8)[labels], square) == 0), np.uint8)
