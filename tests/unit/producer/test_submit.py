"""`imagemill submit` against a real Redis."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from imagemill.producer.times import written
from imagemill.shared.engines import ENGINES
from imagemill.shared.fleet import Fleet
from imagemill.shared.quality import RULES, Quality
from tests.ledgers import Ledger
from tests.unit.producer.jobs import GOOD, LANE, MIXED, STYLIZE, Invoke, Worked, node, submitted


def test_submit_prints_only_the_job_on_stdout_and_warns_without_workers(imagemill: Invoke, ledger: Ledger) -> None:
    result = imagemill(*STYLIZE, "--priority", "high", stdin=GOOD)
    job = result.stdout.removesuffix("\n")
    assert ledger.status(job).total == 3
    assert f"{job}: 3 images queued, including 1 duplicate" in result.stderr
    assert "no worker offers stylize.opencv; start one with `imagemill worker --cpu`" in result.stderr


def test_same_name_with_another_list_is_refused_in_one_line(imagemill: Invoke, ledger: Ledger) -> None:
    assert submitted(imagemill, GOOD, "--name", "spring") == "spring"
    result = imagemill(*STYLIZE, "--name", "spring", stdin=MIXED)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "error (name_taken): there is a job spring with another list; submit this one under another name\n"
    assert ledger.status("spring").total == 3


def test_submit_with_a_name_again_follows_the_job(imagemill: Invoke) -> None:
    submitted(imagemill, GOOD, "--name", "spring", "--until", "1d")
    result = imagemill(*STYLIZE, "--name", "spring", "--until", "1d", "--wait", "--json", stdin=GOOD, client=Worked)
    assert "job spring: 3 images queued already" in result.stderr
    assert json.loads(result.stdout)["done"] == 3


def test_submit_names_the_model_to_pull_when_no_worker_has_it(imagemill: Invoke) -> None:
    flags = ("--operation", "remove-background", "--engine", "rembg", "--set", "model=silueta", "--output", "s3://results/x")
    stderr = imagemill("submit", "-", *flags, stdin=GOOD).stderr
    assert "no worker offers remove-background.rembg.silueta" in stderr
    assert "`imagemill models pull silueta`" in stderr
    assert "IMAGEMILL_WORKER__ENGINES='[\"rembg\"]' imagemill worker" in " ".join(stderr.split())


def test_submit_and_dry_run_advise_on_a_model_that_no_worker_has(imagemill: Invoke, fleet: Fleet) -> None:
    fleet.report_node(node("remove-background.rembg.shop"))
    flags = ("--operation", "remove-background", "--engine", "rembg", "--set", "model=shpo", "--output", "s3://results/x")
    advice = "no worker offers remove-background.rembg.shpo, and the catalogue has no such model; did you mean 'shop'?"
    warned = imagemill("submit", "-", *flags, stdin=GOOD).stderr
    assert f"warning: {advice}" in " ".join(warned.split())
    tried = imagemill("submit", "-", *flags, "--json", "--dry-run", stdin=GOOD)
    assert json.loads(tried.stdout)["advice"] == f"{advice}; make one offer it with `imagemill models add shpo FILE`"
    shown = imagemill("submit", "-", *flags, "--dry-run", stdin=GOOD).stdout
    assert f"time: unknown, {advice}" in " ".join(shown.split())


def test_submit_does_not_warn_when_a_worker_offers_the_lane(imagemill: Invoke, fleet: Fleet) -> None:
    fleet.report_node(node(LANE))
    assert "no worker" not in imagemill(*STYLIZE, stdin=GOOD).stderr


def test_submit_warns_of_what_has_no_effect_once(imagemill: Invoke, ledger: Ledger, fleet: Fleet) -> None:
    fleet.report_node(node("inpaint.opencv"))
    Path("list.csv").write_text("source,masks,points\nhttps://example.com/a.jpg,s3://m/a.png,7\n")
    flags = ("submit", "list.csv", "--operation", "inpaint", "--output", "s3://results/x", "--set", "mask-from=luma")
    warnings = [
        "mask_from has no effect, because there is no mask",
        "'points' in the list has no effect on inpaint (opencv), only on remove-background with engine=rembg and model=sam: "
        "1 row, list.csv:2",
        "the column 'masks' of list.csv is not read; did you mean 'mask'?",
    ]
    told = [f"warning: {warning}" for warning in warnings]
    queued = imagemill(*flags, "--set", "boxes=1,2,3,4", "--json")
    assert queued.stderr.splitlines()[1:] == told
    assert json.loads(queued.stdout)["warnings"] == warnings
    tried = imagemill(*flags, "--set", "boxes=1,2,3,4", "--json", "--dry-run")
    assert (tried.stderr.splitlines(), json.loads(tried.stdout)["warnings"]) == (told, warnings)
    refused = imagemill(*flags)
    assert refused.stderr.splitlines() == [
        "invalid rows:",
        "  list.csv:2: needs a mask or boxes, from the row or the job: https://example.com/a.jpg",
        *told,
        "error (invalid_source): 1 invalid row, nothing was queued; fix them, or skip them with --skip-invalid",
    ]
    assert len(ledger.jobs()) == 1


def test_submit_without_redis_says_so_in_one_line(imagemill: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMAGEMILL_REDIS_URL", "redis://127.0.0.1:1/0")
    (line,) = imagemill(*STYLIZE, stdin=GOOD).stderr.splitlines()
    reason = "Redis: can't connect to 127.0.0.1:1: connection refused; nothing was queued"
    assert line == f"error (broker_unavailable): {reason}"


def test_dry_run_names_a_part_that_no_node_has(imagemill: Invoke, fleet: Fleet) -> None:
    fleet.report_node(node("stylize.diffusion.sd15").model_copy(update={"parts": ("controlnet-canny",)}))
    flags = ("--operation", "stylize", "--engine", "diffusion", "--set", "model=sd15", "--set", "loras=ink")
    for more in ([], ["--dry-run"]):
        stderr = imagemill("submit", "-", *flags, *more, "--output", "s3://results/x", stdin=GOOD).stderr
        (warning,) = (line for line in stderr.splitlines() if line.startswith("warning: "))
        assert "ink" in warning


@pytest.mark.parametrize(
    ("flags", "warning"),
    [
        ("--preset turbo --set negative_prompt=noise", "warning: negative_prompt has no effect, because cfg is 1"),
        ("--preset sketch --set strength=0.3", "warning: strength has no effect, because mode is text-to-image"),
        ("--preset turbo", None),  # which inherits a negative prompt
        ("--preset turbo --set negative_prompt=noise --set cfg=2", None),
        ("--operation stylize --set colour=true", "warning: colour has no effect, because style is stylization"),
        ("--operation stylize --set colour=true --set style=pencil-sketch", None),
        (
            "--operation remove-background --engine rembg --set margin=0.1",
            "warning: margin has no effect, because crop is false",
        ),
        ("--operation remove-background --engine rembg --set margin=0.1 --set crop=true", None),
    ],
)
def test_submit_warns_about_options_that_have_no_effect(imagemill: Invoke, flags: str, warning: str | None) -> None:
    result = imagemill("submit", "-", *flags.split(), "--output", "s3://results/x", "--dry-run=list", stdin=GOOD)
    assert result.exit_code == 0
    assert (warning in result.stderr.splitlines()) if warning else "no effect" not in result.stderr


@pytest.mark.parametrize(("flags", "reuse"), [([], True), (["--fresh"], False)], ids=["remembered", "fresh"])
def test_fresh_turns_off_reuse_of_results(imagemill: Invoke, ledger: Ledger, flags: list[str], reuse: bool) -> None:
    job = imagemill(*STYLIZE, *flags, stdin=GOOD).stdout.strip()
    policy = ledger.spec(job).policy
    assert (policy.reuse, policy.attempts) == (reuse, 3)


def test_owner_and_times_are_passed_on(imagemill: Invoke, ledger: Ledger) -> None:
    job = submitted(imagemill, GOOD, "--owner", "ann", "--not-before", "1h", "--until", "2h")
    status = ledger.status(job)
    assert (status.owner, status.waiting, status.running) == ("ann", 3, 0)
    assert status.not_before is not None
    assert status.until is not None
    assert status.until - status.not_before == pytest.approx(3600, abs=1)
    assert f"starts at {written(status.not_before)}" in imagemill("jobs").stdout


def test_submit_json_prints_the_counts(imagemill: Invoke) -> None:
    result = imagemill(*STYLIZE, "--json", "--skip-invalid", stdin=GOOD + "ftp://example.com/c.jpg\n")
    summary = json.loads(result.stdout)
    told = {"advice": "no worker offers stylize.opencv; start one with `imagemill worker --cpu`", "warnings": []}
    assert summary == {"job": summary["job"], "total": 3, "duplicates": 1, "invalid": 1, "skipped": 0, **told}
    assert "stdin:4" in result.stderr


@pytest.mark.parametrize(("rows", "code", "done", "failed"), [(GOOD, 0, 3, 0), (MIXED, 1, 3, 1)])
def test_submit_wait_prints_one_json_object_and_exits_with_1_on_failures(
    imagemill: Invoke, rows: str, code: int, done: int, failed: int
) -> None:
    result = imagemill(*STYLIZE, "--wait", "--json", stdin=rows, client=Worked)
    summary = json.loads(result.stdout)
    assert list(summary) == ["job", "state", "total", "done", "failed", "seconds", "advice", "warnings"]
    assert (summary["state"], summary["total"], summary["done"], summary["failed"]) == ("done", done + failed, done, failed)
    assert result.exit_code == code


def test_invalid_rows_are_listed_and_nothing_is_queued(imagemill: Invoke, ledger: Ledger) -> None:
    before = {status.job for status in ledger.jobs()}
    result = imagemill(*STYLIZE, stdin=GOOD + "".join(f"nonsense-{n}\n" for n in range(25)))
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "stdin:4: source: " in result.stderr
    assert "nonsense-19" in result.stderr
    assert "nonsense-20" not in result.stderr
    assert "and 5 more" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error (invalid_source): 25 invalid rows, nothing was queued")
    assert "--skip-invalid" in result.stderr
    assert {status.job for status in ledger.jobs()} == before


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (["--operation", "stilize"], "did you mean 'stylize'?"),
        (["--engine", "opencw"], "did you mean 'opencv'?"),
        (["--set", "colur=yes"], "did you mean 'colour'?"),
        (["--set", "long_edge=7"], "greater than or equal to 16, not '7'"),
        (["--set", "colour"], "KEY=VALUE, not 'colour'"),
        (["--mask", "mask.png"], "stylize (opencv) has no option 'mask'"),
        (["--set", "reference=ftp://x/y.png"], "reference: "),
        (["--engine", "diffusion", "--set", "prompt=a [cat|dog]"], "prompt: [a|b] would change the prompt between steps"),
        (["--engine", "diffusion", "--set", "prompt=" + "shoe " * 500], "prompt: string should have at most 2000 characters"),
        (["--quality", "101"], "output: quality: "),
        (["--key", "{job}"], "output: key: "),
        (["--key", "{name}", "--layout", "tree"], "--key and --layout can't be combined"),
        (["--output", "ftp://host/x"], "output: url: "),
        (["--owner", "two words"], "policy: owner: "),
        (["--name", "two words"], "a name has 1 to 64 letters, digits and ._- and starts with a letter or digit"),
        (["--name", "../up"], "unlike '../up'"),
        (["--until", "tomorrow"], "--until takes a time such as "),
        (["--until", "2020-01-01T08:00"], "the deadline (until) must be in the future, but 2020-01-01 08:00 has passed"),
        (["--until", "1h", "--not-before", "2h"], "must be later than the start (not before)"),
        (["--output", "./out", "--expire-days", "3"], "--expire-days needs an --output of s3://bucket/prefix"),
    ],
)
def test_invalid_options_are_refused_in_one_line(imagemill: Invoke, more: list[str], reason: str) -> None:
    result = imagemill(*STYLIZE, *more, stdin=GOOD)
    assert result.exit_code == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error (invalid_option): ")
    assert reason in line


def test_paths_become_file_urls(imagemill: Invoke, ledger: Ledger, tmp_path: Path) -> None:
    result = imagemill(
        *("submit", "-", "--operation", "inpaint", "--output", "./my out", "--mask", "m.png", "--set", "mask-dilate=2"),
        stdin=GOOD,
    )
    assert result.exit_code == 0, result.stderr
    spec = ledger.spec(result.stdout.strip())
    assert spec.output.url == (tmp_path / "my out").as_uri()
    assert spec.options.model_dump()["mask"] == (tmp_path / "m.png").as_uri()
    assert spec.options.model_dump()["mask_dilate"] == 2


def test_submit_passes_on_check_and_limits(imagemill: Invoke, ledger: Ledger) -> None:
    job = submitted(imagemill, GOOD, "--check", "repair", "--limit", "most_cast=2")
    assert ledger.spec(job).policy.quality == Quality(mode="repair", most_cast=2)
    assert ledger.spec(submitted(imagemill)).policy.quality == Quality()
    refused = imagemill(*STYLIZE, "--limit", "most_cats=2", stdin=GOOD)
    assert refused.exit_code == 2
    assert "did you mean 'most_cast'?" in refused.stderr


@pytest.mark.parametrize(
    ("flags", "shown", "hidden"),
    [
        ([], ["--help-options"], ["mask_feather", "strength", "most_step"]),
        (["--operation", "inpaint"], ["inpaint (opencv)", "inpaint (lama)", "mask_feather", "most_step"], ["stylize ("]),
        (["--operation", "inpaint", "--engine", "lama"], ["inpaint (lama)", "strategy"], ["inpaint (opencv)"]),
        (["--preset", "sketch"], ["stylize (diffusion)", "strength"], ["stylize (opencv)", "inpaint ("]),
        (["--operation", "unknown"], ["--help-options"], ["mask_feather"]),
    ],
)
@pytest.mark.parametrize("first", [True, False], ids=["help first", "help last"])
def test_submit_help_shows_the_options_of_the_named_operation(
    imagemill: Invoke, flags: list[str], shown: list[str], hidden: list[str], first: bool
) -> None:
    result = imagemill("submit", *(["--help", *flags] if first else [*flags, "--help"]))
    assert result.exit_code == 0
    assert "--output" in result.stdout
    assert [name for name in shown if name not in result.stdout] == []
    assert [name for name in hidden if name in result.stdout] == []


def test_help_options_lists_the_options_of_every_engine_and_every_limit(imagemill: Invoke) -> None:
    unwrapped = re.sub(r"(?<=\w-)\n\s+", "", imagemill("submit", "--help-options").stdout)  # lines also break after hyphens
    text = " ".join(unwrapped.split())
    for engine in ENGINES:
        assert f"{engine.operation} ({engine.name}), for --set:" in text
        fields = {name: field for name, field in engine.options.model_fields.items() if name != "engine"}
        assert [name for name, field in fields.items() if f" {name} {field.description} (" not in text] == []
    assert [name for name in RULES if f" {name} flag:{RULES[name].flag}: " not in text] == []
    assert "default )" not in text
