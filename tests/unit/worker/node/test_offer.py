from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import signals

from imagemill.shared.errors import ConfigurationError
from imagemill.shared.settings import OnnxSettings, Settings
from imagemill.worker.main import Worker
from imagemill.worker.models import checksums
from imagemill.worker.models.catalogue import MODELS, repository
from imagemill.worker.models.files import record_variant, variant
from imagemill.worker.models.repositories import folder_of
from imagemill.worker.node import offer
from imagemill.worker.node.checks.models import check_engines, check_models
from imagemill.worker.node.offer import children_per_gpu, lanes, missing, nothing_to_do, shortcomings
from tests.unit.worker.models.test_added import record


@pytest.fixture(autouse=True)
def no_receivers_left_behind() -> Iterator[None]:
    """A Worker receives Celery's signals for as long as it exists, which may be long after its test."""
    heard = (
        *(signals.setup_logging, signals.worker_init, signals.worker_process_init),
        *(signals.worker_process_shutdown, signals.worker_shutting_down),
    )
    before = [list(signal.receivers or ()) for signal in heard]
    yield
    for signal, receivers in zip(heard, before, strict=True):
        signal.receivers = receivers
        signal.sender_receivers_cache.clear()


def settings(folder: Path, *engines: str, here: tuple[str, ...] = (), int8: bool = False, **worker: Any) -> Settings:
    """Settings of a node with these engines. The models in `here` get empty files: rembg's, or lama's if they have a suffix."""
    for name in here:
        path = folder / "lama" / name if "." in name else folder / "rembg" / f"{name}.onnx"
        path.parent.mkdir(exist_ok=True)
        path.touch()
    groups: dict[str, Any] = dict(weights={"folder": folder}, worker={"engines": engines, **worker}, onnx={"int8": int8})
    return Settings(_env_file=None, **groups)  # type: ignore[call-arg]


def test_engine_is_one_lane_or_one_lane_per_model_on_disk(tmp_path: Path) -> None:
    known = settings(tmp_path, "opencv", "rembg", here=("u2netp", "silueta"))
    assert lanes(known) == [
        *("remove-background.opencv", "inpaint.opencv", "stylize.opencv"),
        *("remove-background.rembg.u2netp", "remove-background.rembg.silueta"),
    ]
    assert "u2net" in missing(known)["rembg"]
    assert not {"u2netp", "silueta", "bria-rmbg"} & set(missing(known)["rembg"])
    assert shortcomings(known) == []


@pytest.mark.parametrize(
    ("engines", "here", "given", "children"),
    [
        (("opencv",), (), None, 1),
        (("opencv", "rembg"), ("u2netp",), None, 2),
        (("rembg",), (), None, 2),  # for models that may come
        (("opencv", "diffusion"), (), None, 1),
        (("rembg",), ("u2netp",), 1, 1),
        (("opencv",), (), 3, 3),
    ],
)
def test_as_many_children_share_a_gpu_as_suit_all_engines(
    engines: tuple[str, ...], here: tuple[str, ...], given: int | None, children: int, tmp_path: Path
) -> None:
    assert children_per_gpu(settings(tmp_path, *engines, here=here, children_per_gpu=given)) == children


def test_children_do_not_share_a_gpu_for_diffusion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offer, "models_here", lambda _, engine: offer.models_of(engine))
    assert children_per_gpu(settings(tmp_path, "rembg", "lama")) == 2
    assert children_per_gpu(settings(tmp_path, "rembg", "lama", "diffusion")) == 1


def test_model_from_several_repositories_is_a_lane_when_all_are_complete(tmp_path: Path) -> None:
    known = settings(tmp_path, "diffusion")
    assert lanes(known) == []
    ((_, fix),) = shortcomings(known)
    assert fix == "imagemill models pull sd15-canny"
    base, controlnet = (folder_of(tmp_path, repository(name)) for name in MODELS["sd15-canny"])
    for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler", "."):
        (base / part).mkdir(parents=True, exist_ok=True)
        (base / part / "config.json").touch()
    assert lanes(known) == [], "weights are missing"
    for part in ("unet", "vae", "text_encoder"):
        (base / part / "model.fp16.safetensors").touch()
    assert lanes(known) == ["stylize.diffusion.sd15"], "the ControlNet is missing"
    controlnet.mkdir()
    for name in ("config.json", "diffusion_pytorch_model.fp16.safetensors"):
        (controlnet / name).touch()
    assert lanes(known) == ["stylize.diffusion.sd15-canny", "stylize.diffusion.sd15"]
    assert missing(known) == {"diffusion": ["sdxl", "sdxl-turbo"]}


def test_added_model_is_a_lane_while_its_files_are_there(tmp_path: Path) -> None:
    known = settings(tmp_path, "rembg", here=("u2netp",))
    assert lanes(known) == ["remove-background.rembg.u2netp"]
    record(tmp_path, "shop-v1.2")
    assert lanes(known) == ["remove-background.rembg.u2netp", "remove-background.rembg.shop-v1.2"]
    assert "shop-v1.2" not in missing(known)["rembg"]
    (tmp_path / "rembg" / "shop-v1.2.onnx").unlink()
    assert lanes(known) == ["remove-background.rembg.u2netp"]
    (warned,) = (finding for finding in check_models(known) if "shop" in finding.found)
    assert warned.found == "files of shop-v1.2 are missing or have changed since it was added"
    assert warned.fix == "imagemill models add shop-v1.2 SOURCE --replace"


def test_node_with_nothing_but_an_added_model_has_work_and_a_damaged_record_stops_none(tmp_path: Path) -> None:
    known = settings(tmp_path, "rembg")
    record(tmp_path, "shop")
    assert nothing_to_do(known) is None
    assert shortcomings(known) == []
    assert next(finding.found for finding in check_models(known) if finding.state == "ok") == "rembg: shop"
    (tmp_path / "added" / "broken.json").write_text("no JSON")
    assert lanes(known) == ["remove-background.rembg.shop"]
    (warned,) = (finding for finding in check_models(known) if finding.state == "warning" and "broken" in finding.found)
    assert "broken.json is damaged" in warned.found


def test_model_that_no_option_selects_is_not_a_lane(tmp_path: Path) -> None:
    assert lanes(settings(tmp_path, "rembg", here=("bria-rmbg",))) == []


def test_engine_without_models_on_disk_is_reported_with_the_pull_command(tmp_path: Path) -> None:
    known = settings(tmp_path, "opencv", "rembg")
    ((why, fix),) = shortcomings(known)
    assert str(tmp_path) in why
    assert fix == "imagemill models pull u2net"
    assert nothing_to_do(known) is None  # opencv is there


@pytest.mark.usefixtures("logging_as_before")
@pytest.mark.parametrize(
    ("engines", "worker", "message"),
    [
        (["rmbg"], {}, "did you mean 'rembg'"),
        (["rembg"], {"operations": ["inpaint"]}, "the engine rembg can do none of: inpaint"),
        ([], {}, "can't do any work"),
    ],
)
def test_node_that_could_never_work_does_not_start(
    tmp_path: Path, engines: list[str], worker: dict[str, Any], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    node = Worker(settings(tmp_path, *engines, **worker))
    with pytest.raises(ConfigurationError, match=message):
        node.run(name="cpu", concurrency=1)
    with pytest.raises(SystemExit) as exit_:  # started by Celery's own command
        node._prepare_parent(sender=None)
    assert exit_.value.code == 2
    (logged,) = caplog.records
    assert logged.message == "nothing to do; the node exits"
    assert vars(logged)["reason"].startswith("this node can't do any work")


def test_engine_that_does_none_of_the_operations_is_reported(tmp_path: Path) -> None:
    known = settings(tmp_path, "rembg", here=("u2net",), operations=["inpaint"])
    assert "can do none of: inpaint" in str(nothing_to_do(known))


def test_node_logs_missing_engines_and_models_at_start(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "imagemill.worker.main")
    Worker(settings(tmp_path, "opencv", "rembg"))._log_engines()
    Worker(settings(tmp_path, "rembg", here=("u2net",)))._log_engines()
    no_model, none_here, some_here = caplog.records
    assert (no_model.levelname, vars(no_model)["fix"]) == ("WARNING", "imagemill models pull u2net")
    assert "u2net" in vars(none_here)["models"]
    assert "u2net" not in vars(some_here)["models"]
    assert "silueta" in vars(some_here)["models"]


def test_doctor_checks_models_only_for_engines_that_need_them(tmp_path: Path) -> None:
    assert list(check_models(settings(tmp_path, "opencv"))) == []
    (finding,) = check_models(settings(tmp_path, "opencv", "rembg"))
    assert (finding.state, finding.fix) == ("failed", "imagemill models pull u2net")
    here, absent, _ = check_models(settings(tmp_path, "rembg", here=("u2net",)))
    assert (here.state, here.found) == ("ok", "rembg: u2net")
    assert "silueta" in absent.found
    assert absent.fix == "imagemill models pull NAME"


def test_doctor_warns_when_an_8_bit_model_is_missing(tmp_path: Path) -> None:
    known = settings(tmp_path, "rembg", here=("u2net",), int8=True)
    missing_version = "u2net has no 8-bit version, so it runs in 32 bits"
    assert missing_version in [finding.found for finding in check_models(known) if finding.state == "warning"]
    original = tmp_path / "rembg" / "u2net.onnx"
    variant(original, "int8").touch()
    record_variant(original, "int8", accepted=True, details={})
    assert missing_version not in [finding.found for finding in check_models(known)]
    for part in ("encoder", "decoder"):
        (tmp_path / "rembg" / f"sam.{part}.onnx").touch()
    assert not [finding.found for finding in check_models(known) if "8-bit" in finding.found], "sam can't be quantised"


def test_doctor_reads_a_file_that_is_new_or_has_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = settings(tmp_path, "rembg", here=("u2net",))
    for _ in range(2):
        (warned,) = (finding for finding in check_models(known) if finding.state == "warning")
        assert (warned.found, warned.fix) == ("u2net is damaged, or not the published file", "imagemill models pull u2net")
        monkeypatch.setattr(checksums, "read_blocks", lambda _: pytest.fail("read again"))


def test_doctor_warns_about_a_converted_file_that_has_changed(tmp_path: Path) -> None:
    known = settings(tmp_path, "lama", here=("lama.safetensors",))
    record_variant(tmp_path / "lama" / "lama.pt", "safetensors", accepted=True, details={})
    assert [finding for finding in check_models(known) if finding.state == "warning"] == []
    (tmp_path / "lama" / "lama.safetensors").write_bytes(b"damaged")
    (warned,) = (finding for finding in check_models(known) if finding.state == "warning")
    assert (warned.found, warned.fix) == ("lama is damaged, or not the published file", "imagemill models pull lama")


def test_doctor_reports_an_unavailable_onnx_provider(tmp_path: Path) -> None:
    known = settings(tmp_path, "rembg", here=("u2net",)).model_copy(update={"onnx": OnnxSettings(provider="tensorrt")})
    (finding,) = check_engines(known)
    assert finding.state == "failed"
    assert "has no TensorrtExecutionProvider" in finding.found


def test_node_offers_lama_when_its_converted_file_is_on_disk(tmp_path: Path) -> None:
    known = settings(tmp_path, "lama", here=("lama.pt",))
    assert lanes(known) == []
    assert missing(known) == {"lama": ["lama"]}
    assert shortcomings(known) == [(f"no model of the engine lama is in {tmp_path / 'lama'}", "imagemill models pull lama")]
    assert nothing_to_do(known) is None, "it waits for the model"
    (finding,) = check_models(known)
    assert (finding.state, finding.fix) == ("failed", "imagemill models pull lama")
    known = settings(tmp_path, "lama", here=("lama.safetensors",), int8=True)
    assert lanes(known) == ["inpaint.lama.lama"]
    assert [queue.name for queue in Worker(known).app.conf.task_queues] == ["imagemill.inpaint.lama.lama"]
    (finding,) = check_models(known)
    assert (finding.state, finding.found) == ("ok", "lama: lama")
