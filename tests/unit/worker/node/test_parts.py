"""What a feeder does with jobs whose LoRA, ControlNet or VAE is missing on its node, or can't be used there."""

from __future__ import annotations

import logging
import time
from typing import Any

import pytest

from imagemill.shared.errors import ModelUnavailable
from imagemill.shared.messages import Node
from imagemill.worker.node import left_jobs
from imagemill.worker.node.offered import Offered
from imagemill.worker.node.parts import Lack, Parts
from tests.unit.worker.node.feeding import LANE, Feeding, Steady
from tests.workers import wait_until

SD15, SDXL = "stylize.diffusion.sd15", "stylize.diffusion.sdxl"
LACKS = "cpu@a lacks red: run `imagemill models add red SOURCE`"


def node(name: str, *lanes: str, parts: tuple[str, ...] | None = ()) -> Node:
    return Node(node=name, host="b", pid=1, device="cpu", children=1, ready=True, lanes=lanes, parts=parts)


# --- what is known of parts ---


def test_part_that_is_missing_is_lacking_until_it_is_offered() -> None:
    offered = Offered(["blue"])
    parts = Parts(offered)
    assert parts.lack(SD15, ["blue", "red"]) == Lack("lacks red", "run `imagemill models add red SOURCE`")
    assert parts.lack(SD15, ["lcm-lora-sdv1-5"]) == Lack("lacks lcm-lora-sdv1-5", "run `imagemill models pull lcm-lora-sdv1-5`")
    offered.offer("red")
    assert parts.lack(SD15, ["blue", "red"]) is None
    offered.withdraw("red")
    assert parts.lack(SD15, ["red"]) is not None


def test_damaged_part_is_out_of_service_for_all_models_until_its_files_change() -> None:
    offered = Offered(["red"])
    parts, other_child = Parts(offered), Parts(offered)
    error = ModelUnavailable.of_part("red", "the LoRA red is cut off")
    assert parts.close(SD15, error, time.monotonic())
    assert not other_child.close(SD15, error, time.monotonic()), "it is said once"
    for lane in (SD15, SDXL):
        assert other_child.lack(lane, ["red"]) == Lack("can't use red", "the LoRA red is cut off")
    assert offered.closed()["red"].reason == "the LoRA red is cut off"
    offered.offer("red")
    assert parts.lack(SD15, ["red"]) is None


def test_part_that_does_not_fit_one_model_is_used_with_others() -> None:
    offered = Offered(["red"])
    parts = Parts(offered)
    error = ModelUnavailable.of_part("red", "it is for SDXL", misfit=True)
    assert parts.close(SD15, error, time.monotonic())
    assert not parts.close(SD15, error, time.monotonic()), "it is said once"
    assert parts.lack(SD15, ["red"]) == Lack("can't use red with sd15", "it is for SDXL", here=True)
    assert parts.lack(SDXL, ["red"]) is None
    assert offered.open() == ["red"]
    offered.offer("red")
    assert parts.lack(SD15, ["red"]) is None, "its file was replaced"


@pytest.mark.parametrize("misfit", [True, False])
def test_fault_of_a_file_that_was_replaced_meanwhile_changes_nothing(misfit: bool) -> None:
    offered, since = Offered(["red"]), time.monotonic()
    offered.offer("red")
    parts = Parts(offered)
    assert not parts.close(SD15, ModelUnavailable.of_part("red", "the old file", misfit=misfit), since)
    assert parts.lack(SD15, ["red"]) is None


def test_part_without_room_is_tried_again_later(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = Parts(Offered(["red"]))
    parts.close(SD15, ModelUnavailable.of_part("red", "no memory", misfit=True, passing=True), time.monotonic())
    assert parts.lack(SD15, ["red"]) is not None
    later = time.monotonic() + 301
    monkeypatch.setattr(time, "monotonic", lambda: later)
    assert parts.lack(SD15, ["red"]) is None


@pytest.mark.parametrize(
    ("others", "here", "shown"),
    [
        ([], False, "cpu@a lacks red: add it"),
        ([node("cpu@b", SDXL, parts=("red",))], False, "cpu@a lacks red: add it"),
        ([node("cpu@b", SD15)], False, "cpu@a lacks red, and no other node can work on this job: add it"),
        ([node("cpu@b", SD15, parts=("red",))], False, None),
        ([node("cpu@b", SD15, parts=None)], False, None),  # an older version, which does not say
        ([node("cpu@b", SD15, parts=("red",))], True, "cpu@a lacks red: add it"),
    ],
)
def test_reason_is_shown_if_no_other_node_can_help(others: list[Node], here: bool, shown: str | None) -> None:
    nodes = [node("cpu@a", SD15, parts=("red",)), *others]
    assert Lack("lacks red", "add it", here=here).shown("cpu@a", SD15, ["red"], nodes) == shown


# --- what the feeder makes of it ---


@pytest.fixture
def feeding(feeding: Feeding) -> Feeding:
    feeding.line.speed = Steady(4.0)  # 12 images ahead
    feeding.operation.let(10_000)
    feeding.offered = [SD15, LANE]
    feeding.has_room = True
    return feeding


@pytest.mark.integration
def test_job_waits_for_a_missing_part_and_goes_on_when_it_comes(feeding: Feeding, caplog: pytest.LogCaptureFixture) -> None:
    """The job behind it is done meanwhile, and nobody takes the job again and again."""
    caplog.set_level(logging.WARNING, "imagemill.worker.node.left_jobs")
    job, other = feeding.submit(20, model="sd15", loras="red;blue"), feeding.submit(20)
    with feeding.shift():
        feeding.check_done(other, 20)
        status = feeding.ledger.status(job)
        assert (status.done, status.failed, status.running, status.why) == (0, 0, 0, LACKS)
        shares = len(feeding.ledger.sizes)
        wait_until(lambda: feeding.raw.pttl(f"imagemill:job:{job}:wait") < 29_400, "some time has passed")
        assert len(feeding.ledger.sizes) == shares
        assert caplog.messages == ["job left to other nodes"]
        feeding.node_parts.offer("red")
        wait_until(lambda: feeding.ledger.status(job).why == LACKS.replace("red", "blue"), "it still lacks another")
        feeding.node_parts.offer("blue")
        wait_until(lambda: feeding.ledger.status(job).why is None, "it does not wait any more")
        feeding.check_done(job, 20)


@pytest.mark.integration
def test_it_is_said_again_until_the_job_is_over(feeding: Feeding, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(left_jobs, "REPEAT_SECONDS", 0.0)
    job = feeding.submit(20, model="sd15", loras="red")
    with feeding.shift():
        for _ in range(2):
            wait_until(lambda: feeding.ledger.status(job).why == LACKS, "it is said")
            feeding.raw.delete(f"imagemill:job:{job}:wait")
        assert len(feeding.ledger.sizes) == 1, "the job is not taken again for that"
        feeding.ledger.cancel(job)
        wait_until(lambda: not feeding.feeder._unable, "the job is forgotten")
    assert [due.job for due in feeding.manifests] == [job]


@pytest.mark.integration
def test_job_is_left_to_the_node_that_has_the_part(feeding: Feeding) -> None:
    feeding.nodes = [node("cpu@b", SD15, parts=("red",))]
    job = feeding.submit(20, model="sd15", loras="red")
    with feeding.shift():
        wait_until(lambda: job in feeding.feeder._unable.current(), "the job is left to others")
        status = feeding.ledger.status(job)
        assert (status.failed, status.waiting, status.why) == (0, 20, None)
        feeding.stopping.set()


@pytest.mark.integration
@pytest.mark.parametrize("where", ["run", "prepare"])
@pytest.mark.parametrize("misfit", [False, True])
def test_part_that_can_not_be_used_fails_no_image_and_leaves_the_lane_open(
    misfit: bool, where: str, feeding: Feeding, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also images that are in the line by then. Other jobs on the same model are done."""
    step, tried, repaired = getattr(feeding.operation, where), list[str](), False

    def use(*inputs: Any) -> Any:
        options = inputs[0][0].options if where == "run" else inputs[1].options
        if options.engine == "diffusion" and options.loras[0].name == "red" and not repaired:
            tried.append("red")
            raise ModelUnavailable.of_part("red", "the LoRA red is cut off", misfit=misfit)
        return step(*inputs)

    monkeypatch.setattr(feeding.operation, where, use)
    for name in ("red", "blue"):
        feeding.node_parts.offer(name)
    job, other = feeding.submit(40, model="sd15", loras="red"), feeding.submit(20, model="sd15", loras="blue")
    with feeding.shift():
        feeding.check_done(other, 20)
        status = feeding.ledger.status(job)
        assert (status.done, status.failed, status.running) == (0, 0, 0)
        with_it = " with sd15" if misfit else ""
        assert status.why == f"cpu@a can't use red{with_it}: the LoRA red is cut off"
        assert feeding.offered == [SD15, LANE]
        assert len(tried) <= 12, "once, or with images that were on their way"
        repaired = True
        feeding.node_parts.offer("red")  # its file was replaced
        feeding.check_done(job, 40)
    assert {row.attempts for row in feeding.rows(job)} == {1}
