"""The wall keeps the cost of a file within its limits, and a crash costs only the file."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from bench.hostile_samples import SAMPLES, profile, scans, with_profile
from imagemill.shared.errors import ImageError, InternalError, TooCostly, Truncated
from imagemill.worker.imaging import codec, costs, jpeg, seccomp
from imagemill.worker.imaging.headers import Header
from imagemill.worker.imaging.wall import Wall
from tests.unit.worker.imaging.samples import SRGB, save, scene
from tests.workers import ROOT, clean_environment

GIF, TIFF = save("gif", scene()), save("tiff", scene())
HEADER = Header("tiff", (64, 48))

BAD = """
import ctypes, mmap, os, signal, socket, sys, time
from imagemill.worker.imaging import helper
def crash(): ctypes.string_at(0)
def hang():
    while True: pass
def sleep(): time.sleep(3600)
def allocate():
    kept = []
    while True: kept.append(bytearray(10**7))
def leave(): os._exit(3)
def lie(): return {"pixels": 5}
def refused(what):
    try: what()
    except PermissionError: return
    raise AssertionError
def confined():
    refused(lambda: open("/etc/passwd"))
    refused(lambda: open("/tmp/imagemill-test", "w"))
    refused(lambda: socket.socket())
    refused(lambda: os.execv("/bin/true", ["true"]))
    refused(lambda: os.fork())
    refused(lambda: os.kill(os.getppid(), 0))
    assert not {name for name in os.environ if "KEY" in name or "IMAGEMILL" in name}, os.environ
real = helper.ACTIONS["decode"]
def decode(data, **more):
    if data[-4:] == b"evil":
        found = globals()[data[:-4].decode()]()
        if found is not None: return found
        from imagemill.shared.errors import NotAnImage
        raise NotAnImage("confined")
    return real(data, **more)
helper.ACTIONS["decode"] = decode
helper.main()
"""


@pytest.fixture(scope="module")
def wall() -> Iterator[Wall]:
    """One whose decoder does what a file says that ends in `evil`."""
    wall = Wall(f"exec({BAD!r})", idle=0.5)
    yield wall
    wall.close()


def decode(wall: Wall, data: bytes) -> np.ndarray:
    return wall.decode(data, HEADER, edge=None, icc="srgb").pixels


@pytest.mark.parametrize(
    ("deed", "error", "message"),
    [
        ("crash", Truncated, r"made its decoder crash \(SIGSEGV\)"),
        ("hang", TooCostly, "takes more than 0.5 s of CPU time"),
        ("sleep", TooCostly, "takes more than 0.5 s of CPU time"),
        ("allocate", TooCostly, "takes more than 101 MB of memory"),
        ("leave", InternalError, "can't be right"),
        ("lie", InternalError, "can't be right"),
    ],
)
def test_bad_decoder_costs_its_image_and_nothing_else(wall: Wall, deed: str, error: type[ImageError], message: str) -> None:
    with pytest.raises(error, match=message):
        decode(wall, deed.encode() + b"evil")
    assert (decode(wall, TIFF) == scene()).all()


@pytest.mark.skipif(os.uname().machine not in ("x86_64", "aarch64"), reason="system calls are filtered on these machines only")
def test_helper_opens_nothing_starts_nothing_and_knows_nothing(wall: Wall, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    with pytest.raises(ImageError, match=r"^confined$"):
        decode(wall, b"confinedevil")


def test_helper_that_is_killed_from_outside_is_replaced(wall: Wall) -> None:
    decode(wall, TIFF)
    for helper in list(wall._all):
        os.kill(helper._process.pid, signal.SIGKILL)
    assert (decode(wall, TIFF) == scene()).all()


@pytest.mark.parametrize("kind", ["gif", "webp", "avif", "tiff", "bmp"])
@pytest.mark.parametrize("edge", [None, 32])
def test_pictures_are_the_same_on_both_sides_of_the_wall(kind: str, edge: int | None) -> None:
    data = save(kind, scene())
    header = codec.probe(data, max_pixels=10_000)
    assert header == codec.headers.probe(data, max_pixels=10_000)
    ours, theirs = codec.decode(data, header, edge=edge), codec.decode_here(data, header, edge=edge)
    assert (ours.pixels == theirs.pixels).all()
    assert ours.pixels.flags.writeable
    assert vars(ours) | {"pixels": None} == vars(theirs) | {"pixels": None}


def test_large_picture_stays_in_shared_memory() -> None:
    data = save("tiff", np.full((3000, 4000, 3), 7, np.uint8), compression="packbits")
    pixels = codec.decode(data, codec.probe(data, max_pixels=12_000_000)).pixels
    assert pixels.shape == (3000, 4000, 3)
    assert (pixels[::100] == 7).all()


def test_helpers_die_with_a_process_that_is_killed() -> None:
    code = (
        "import json, os, signal; from bench.hostile_samples import save; from imagemill.worker.imaging import codec, wall\n"
        "data = save('GIF'); codec.decode(data, codec.probe(data, max_pixels=10_000))\n"
        "print(json.dumps([helper._process.pid for helper in wall.shared_wall._all]), flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=clean_environment(), stdout=subprocess.PIPE, check=False, cwd=ROOT)
    (pid,) = json.loads(done.stdout)
    pidfd = Path(f"/proc/{pid}/cmdline")
    while pidfd.exists() and pidfd.read_bytes():  # it dies by a signal that the kernel has sent by now
        os.sched_yield()


def test_plain_jpeg_and_png_need_no_helper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "shared_wall", None)
    for data in (save("jpeg", scene()), save("jpeg", scene(), progressive=True), save("png", scene(), icc_profile=SRGB)):
        assert codec.decode(data, codec.probe(data, max_pixels=10_000)).size == (64, 48)


COSTLY = {
    "scans": lambda: scans(200, (64, 64)),
    "scans-after-comment": lambda: scans(200, (64, 64), comment=b"\xff\xfe\0\6\xff\xd9\0\0"),
    "pipeline": SAMPLES["pipeline.jpg"],
}


@pytest.mark.parametrize("make", COSTLY.values(), ids=COSTLY)
def test_costly_files_are_refused(make: object) -> None:
    data = make()  # type: ignore[operator]
    with pytest.raises(TooCostly):
        codec.decode(data, codec.probe(data, max_pixels=64_000_000))


def test_fill_bytes_are_skipped_at_once() -> None:
    data = save("jpeg", scene())
    filled = data[:2] + b"\xff" * 4_000_000 + data[2:]
    assert jpeg.read_header(filled) == jpeg.read_header(data)


def test_scans_are_counted_by_segments() -> None:
    data = scans(3, (64, 64), comment=b"\xff\xfe\0\6\xff\xda\0\0")
    assert jpeg.scans(data) == 4


CURVE = b"curv\0\0\0\0\0\0\0\1\2\0"


@pytest.mark.parametrize(
    ("icc", "simple"),
    [
        (SRGB, True),
        (profile((b"kTRC", CURVE), space=b"GRAY"), True),
        (profile((b"rTRC", b"curv\0\0\0\0\0\1\0\0")), False),
        (profile((b"rTRC", b"mpet\0\0\0\0")), False),
        (profile((b"A2B0", b"mft2")), False),
        (profile((b"D2B1", b"mpet")), False),
        (profile(space=b"CMYK"), False),
        (SRGB[:140], False),
        (SRGB + bytes(costs.SIMPLE_PROFILE), False),
    ],
)
def test_simple_profiles_have_a_matrix_and_short_curves(icc: bytes, simple: bool) -> None:
    assert costs.is_simple(icc) is simple
    data = with_profile(icc)
    assert costs.is_linear(data, "jpeg", icc, 4096) is simple


def test_filter_of_system_calls_fits_its_jumps() -> None:
    for machine in seccomp._MACHINES.values():
        assert len(seccomp.program(*machine)) // 8 < 255
