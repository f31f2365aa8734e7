"""`imagemill results` and `report` against a real Redis."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from imagemill.shared.messages import Item, ItemResult
from tests.ledgers import Ledger
from tests.unit.producer.jobs import NUMBERED, Invoke, checked, submitted, work


def test_results_prints_jsonl(imagemill: Invoke, ledger: Ledger) -> None:
    job = submitted(imagemill)
    assert [json.loads(line)["state"] for line in imagemill("results", job).stdout.splitlines()] == ["pending"] * 4
    work(ledger, job)
    rows = [json.loads(line) for line in imagemill("results", job).stdout.splitlines()]
    assert [row["state"] for row in rows] == ["done", "done", "done", "failed"]
    assert rows[2]["duplicate_of"] == 0
    assert rows[2]["output"] == rows[0]["output"] == "s3://results/out/0.png"
    assert rows[3] == {
        "item": rows[3]["item"],
        "index": 3,
        "source": "https://example.com/bad.jpg",
        "state": "failed",
        "output": None,
        "code": "not_found",
        "message": "there is \x1b[31mnothing",
        "attempts": 2,
        "duplicate_of": None,
        "notes": [],
    }


def test_results_prints_failures_as_csv(imagemill: Invoke, ledger: Ledger) -> None:
    job = submitted(imagemill)
    work(ledger, job)
    header, row = imagemill("results", job, "--format", "csv", "--failed").stdout.splitlines()
    assert header == "item,index,source,state,output,code,message,attempts,duplicate_of,notes"
    assert row.split(",")[1:6] == ["3", "https://example.com/bad.jpg", "failed", "", "not_found"]


def test_results_name_the_part_if_images_have_several_results(imagemill: Invoke, ledger: Ledger) -> None:
    rembg = ("--engine", "rembg", "--set", "model=u2net_cloth_seg", "--set", "garments=upper,lower")
    submission = ("submit", "-", "--operation", "remove-background", *rembg, "--output", "s3://results/out")
    result = imagemill(*submission, stdin="https://example.com/a.jpg\n")
    assert ": 2 results queued (upper, lower of each image)\n" in result.stderr
    job = result.stdout.strip()
    work(ledger, job)
    assert [json.loads(line)["part"] for line in imagemill("results", job).stdout.splitlines()] == ["upper", "lower"]
    header, *rows = imagemill("results", job, "--format", "csv").stdout.splitlines()
    assert header.endswith(",duplicate_of,part,notes")
    assert [row.split(",")[-2] for row in rows] == ["upper", "lower"]
    dry = imagemill(*submission, "--dry-run", stdin="https://example.com/a.jpg\n").stdout
    assert "dry run, nothing was queued: 2 results (upper, lower of each image)\n" in dry


def test_results_flagged_prints_flagged_images_and_outliers(imagemill: Invoke, ledger: Ledger) -> None:
    job = submitted(imagemill, NUMBERED)
    assert imagemill("results", job, "--flagged").stdout == ""
    work(ledger, job, checked)
    rows = [json.loads(line) for line in imagemill("results", job, "--flagged").stdout.splitlines()]
    noted = [json.loads(line)["notes"] for line in imagemill("results", job).stdout.splitlines()]
    assert noted[1:3] == [[], ["enlarged", "flag:cast"]]
    assert [(row["index"], row["flags"]) for row in rows] == [(2, ["cast"]), (4, ["drift:blue-yellow"])]
    header, *lines = imagemill("results", job, "--flagged", "--format", "csv").stdout.splitlines()
    assert header.endswith(",duplicate_of,notes,flags")
    assert [line.split(",")[-2:] for line in lines] == [["enlarged flag:cast", "cast"], ["", "drift:blue-yellow"]]
    assert imagemill("results", job, "--flagged", "--failed").exit_code == 2


def test_results_presign_adds_links(imagemill: Invoke, ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "do-not-show")
    monkeypatch.setenv("IMAGEMILL_S3__ENDPOINT_URL", "http://127.0.0.1:1")
    job = submitted(imagemill)
    work(ledger, job)
    result = imagemill("results", job, "--presign", "60")
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert parse_qs(urlsplit(rows[0]["link"]).query)["X-Amz-Expires"] == ["60"]
    assert rows[3]["link"] is None
    assert "do-not-show" not in result.output
    assert imagemill("results", job, "--presign", "0").exit_code == 2


def test_report_writes_a_page(imagemill: Invoke, ledger: Ledger, tmp_path: Path) -> None:
    job = submitted(imagemill)
    work(ledger, job)
    assert imagemill("report", job).stdout == f"{job}.html\n"
    assert "not_found" in (tmp_path / f"{job}.html").read_text()
    refused = imagemill("report", job, "--out", "no/such/folder/x.html")
    assert refused.exit_code == 2
    assert "can't write no/such/folder/x.html" in refused.stderr


def test_report_warns_once_when_images_in_s3_get_no_links(
    imagemill: Invoke, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IMAGEMILL_S3__ENDPOINT_URL", "minio:9000")
    job = submitted(imagemill, NUMBERED)
    work(ledger, job)
    result = imagemill("report", job)
    assert result.exit_code == 0
    assert result.stderr.count("the report has no pictures: ") == 1
    assert "minio:9000" in result.stderr


def test_csv_is_harmless_and_json_is_raw(imagemill: Invoke, ledger: Ledger) -> None:
    def evil(item: Item) -> ItemResult:
        return ItemResult(index=item.index, state="failed", code="not_found", message="=cmd|'/C calc'!A0\x1b[2J\u202e")

    job = submitted(imagemill, "https://example.com/a.jpg\n")
    work(ledger, job, evil)
    (row,) = csv.DictReader(io.StringIO(imagemill("results", job, "--format", "csv").stdout))
    assert row["message"] == "'=cmd|'/C calc'!A0\ufffd[2J\ufffd"
    assert json.loads(imagemill("results", job).stdout)["message"] == "=cmd|'/C calc'!A0\x1b[2J\u202e"


def test_report_without_links_names_no_picture(imagemill: Invoke, ledger: Ledger, tmp_path: Path) -> None:
    job = submitted(imagemill, "https://example.com/a.jpg?Signature=hush\n")
    work(ledger, job)
    assert imagemill("report", job, "--out", str(tmp_path / "page.html"), "--no-links").exit_code == 0
    page = (tmp_path / "page.html").read_text()
    assert "<img" not in page
    assert "hush" not in page
