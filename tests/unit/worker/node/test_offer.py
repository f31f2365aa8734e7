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
from imagemill.worker.models.catalogue import MODELS, repository
from imagemill.worker.models.checksums import hash_file
from imagemill.worker.models.files import record_variant, variant
from imagemill.worker.models.repositories import folder_of
from imagemill.worker.node.doctor import check_engines, check_models
from imagemill.worker.node.offer import lanes, missing, nothing_to_do, shortcomings


@pytest.fixture(autouse=True)
def nobody_listens_afterwards() -> Iterator[None]:
    """A Worker hears Celery's signals while it lives, which may be until long after its test."""
    heard = (signals.setup_logging, signals.worker_init, signals.worker_process_init, signals.worker_shutting_down)
    before = [list(signal.receivers or ()) for signal in heard]
    yield
    for signal, receivers in zip(heard, before, strict=True):
        signal.receivers = receivers
        signal.sender_receivers_cache.clear()


def settings(folder: Path, *engines: str, here: tuple[str, ...] = (), int8: bool = False, **worker: Any) -> Settings:
    """Settings of a node with these engines; the models in `here` have (empty) files, rembg's but for those with a suffix."""
    for name in here:
        path = folder / "lama" / name if "." in name else folder / "rembg" / f"{name}.onnx"
        path.parent.mkdir(exist_ok=True)
        path.touch()
    groups: dict[str, Any] = dict(weights={"folder": folder}, worker={"engines": engines, **worker}, onnx={"int8": int8})
    return Settings(_env_file=None, **groups)  # type: ignore[call-arg]


def test_an_engine_without_models_is_one_lane_and_others_have_one_per_model_that_is_here(tmp_path: Path) -> None:
    known = settings(tmp_path, "opencv", "rembg", here=("u2netp", "silueta"))
    assert lanes(known) == ["opencv", "rembg.u2netp", "rembg.silueta"]
    assert "u2net" in missing(known)["rembg"]
    assert not {"u2netp", "silueta", "bria-rmbg"} & set(missing(known)["rembg"])
    assert shortcomings(known) == []


def test_a_model_of_several_folders_is_a_lane_where_all_of_them_are_here(tmp_path: Path) -> None:
    known = settings(tmp_path, "diffusion")
    assert lanes(known) == []
    ((_, mend),) = shortcomings(known)
    assert mend == "imagemill models pull sd15-canny"
    base, controlnet = (folder_of(tmp_path, repository(name)) for name in MODELS["sd15-canny"])
    for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler", "."):
        (base / part).mkdir(parents=True, exist_ok=True)
        (base / part / "config.json").touch()
    assert lanes(known) == [], "weights are missing"
    for part in ("unet", "vae", "text_encoder"):
        (base / part / "model.fp16.safetensors").touch()
    assert lanes(known) == [], "the ControlNet is missing"
    controlnet.mkdir()
    for name in ("config.json", "diffusion_pytorch_model.fp16.safetensors"):
        (controlnet / name).touch()
    assert lanes(known) == ["diffusion.sd15-canny"]
    assert missing(known) == {}


def test_a_model_that_no_option_can_select_is_no_lane(tmp_path: Path) -> None:
    assert lanes(settings(tmp_path, "rembg", here=("bria-rmbg",))) == []


def test_an_engine_that_has_no_model_here_is_told_with_the_command_that_helps(tmp_path: Path) -> None:
    known = settings(tmp_path, "opencv", "rembg")
    ((why, mend),) = shortcomings(known)
    assert str(tmp_path) in why
    assert mend == "imagemill models pull u2net"
    assert nothing_to_do(known) is None  # opencv is there


@pytest.mark.usefixtures("logging_as_before")
@pytest.mark.parametrize(
    ("engines", "worker", "told"),
    [
        (["rembg"], {}, "imagemill models pull u2net"),
        (["rmbg"], {}, "did you mean 'rembg'"),
        (["rembg"], {"operations": ["inpaint"]}, "no model of the engine rembg"),
        ([], {}, "can't do any work"),
    ],
)
def test_a_node_with_nothing_to_listen_to_does_not_start(
    tmp_path: Path, engines: list[str], worker: dict[str, Any], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    node = Worker(settings(tmp_path, *engines, **worker))
    with pytest.raises(ConfigurationError, match=told):
        node.run(name="cpu", concurrency=1)
    with pytest.raises(SystemExit) as exit_:  # started by Celery's own command
        node._prepare_parent(sender=None)
    assert exit_.value.code == 2
    assert "the node exits action=start reason=this node can't do any work" in capsys.readouterr().err


def test_an_engine_that_does_none_of_the_operations_is_told(tmp_path: Path) -> None:
    known = settings(tmp_path, "rembg", here=("u2net",), operations=["inpaint"])
    assert "can do none of: inpaint" in str(nothing_to_do(known))


def test_a_node_says_at_its_start_what_it_does_not_listen_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "imagemill.worker.main")
    Worker(settings(tmp_path, "opencv", "rembg"))._log_engines()
    Worker(settings(tmp_path, "rembg", here=("u2net",)))._log_engines()
    no_model, none_here, some_here = caplog.records
    assert (no_model.levelname, vars(no_model)["fix"]) == ("WARNING", "imagemill models pull u2net")
    assert "u2net" in vars(none_here)["models"]
    assert "u2net" not in vars(some_here)["models"]
    assert "silueta" in vars(some_here)["models"]


def test_the_doctor_speaks_of_models_only_where_an_engine_needs_them(tmp_path: Path) -> None:
    assert list(check_models(settings(tmp_path, "opencv"))) == []
    (finding,) = check_models(settings(tmp_path, "opencv", "rembg"))
    assert (finding.state, finding.fix) == ("failed", "imagemill models pull u2net")
    here, absent = check_models(settings(tmp_path, "rembg", here=("u2net",)))
    assert (here.state, here.found) == ("ok", "rembg: u2net")
    assert "silueta" in absent.found
    assert absent.fix == "imagemill models pull NAME"


def test_the_doctor_warns_where_8_bits_are_asked_for_and_not_here(tmp_path: Path) -> None:
    known = settings(tmp_path, "rembg", here=("u2net",), int8=True)
    assert [finding.found for finding in check_models(known) if finding.state == "warning"] == [
        "u2net has no 8-bit version, so it runs in 32 bits"
    ]
    original = tmp_path / "rembg" / "u2net.onnx"
    variant(original, "int8").touch()
    record_variant(original, "int8", accepted=True, details={})
    assert [finding for finding in check_models(known) if finding.state == "warning"] == []


def test_the_doctor_warns_of_a_file_that_verify_found_to_be_another(tmp_path: Path) -> None:
    known = settings(tmp_path, "rembg", here=("u2net",))
    assert [finding for finding in check_models(known) if finding.state == "warning"] == []
    hash_file(tmp_path / "rembg" / "u2net.onnx", "md5:")
    (warned,) = (finding for finding in check_models(known) if finding.state == "warning")
    assert (warned.found, warned.fix) == ("u2net is not the published file", "imagemill models pull u2net")


def test_the_doctor_says_where_models_can_not_run_on_what_they_are_to_run_on(tmp_path: Path) -> None:
    known = settings(tmp_path, "rembg", here=("u2net",)).model_copy(update={"onnx": OnnxSettings(provider="tensorrt")})
    (finding,) = check_engines(known)
    assert finding.state == "failed"
    assert "has no TensorrtExecutionProvider" in finding.found


def test_a_node_listens_for_lama_where_its_converted_file_is(tmp_path: Path) -> None:
    known = settings(tmp_path, "lama", here=("lama.pt",))
    assert lanes(known) == []
    assert missing(known) == {"lama": ["lama"]}
    assert shortcomings(known) == [(f"no model of the engine lama is in {tmp_path / 'lama'}", "imagemill models pull lama")]
    assert "imagemill models pull lama" in str(nothing_to_do(known))
    (finding,) = check_models(known)
    assert (finding.state, finding.fix) == ("failed", "imagemill models pull lama")
    known = settings(tmp_path, "lama", here=("lama.safetensors",), int8=True)
    assert lanes(known) == ["lama.lama"]
    assert Worker(known).queues == [f"imagemill.inpaint.lama.lama{priority}" for priority in (".high", "", ".low")]
    (finding,) = check_models(known)
    assert (finding.state, finding.found) == ("ok", "lama: lama")
