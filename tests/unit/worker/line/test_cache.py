"""Cached results: equal keys for equal bytes, different keys otherwise, and never an error."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple, get_args

import pytest
import redis
from botocore.stub import Stubber
from hypothesis import example, given, settings
from hypothesis import strategies as st

from imagemill.producer.embedded_redis import EmbeddedRedis
from imagemill.shared.engines import ENGINES, parse_options
from imagemill.shared.errors import ConfigurationError
from imagemill.shared.messages import Format, Item, Job, KeepMetadata
from imagemill.shared.options.base import ADDRESSES
from imagemill.shared.quality import Measures
from imagemill.shared.s3 import make_client
from imagemill.shared.settings import S3Settings, Settings
from imagemill.worker.imaging.codec import Encoded
from imagemill.worker.line import cache as module
from imagemill.worker.line.cache import Cache, Remembered
from imagemill.worker.operations.registry import create
from imagemill.worker.transfer.network import Network
from imagemill.worker.transfer.store import S3Store
from tests.fakes import Invert
from tests.stores import ClientOnly

RESULT = Remembered("s3://results/jobs/260730-1f0c9a3e/000012-photo.png", "0" * 31 + "f", "png", 1_834_221, (1600, 1067))


class Engine(Invert):
    """An engine with a fingerprint that the test sets."""

    def __init__(self, mark: str | Exception) -> None:
        self.mark = mark

    def fingerprint(self, options: Any) -> str:
        if isinstance(self.mark, Exception):
            raise self.mark
        return self.mark


class Wanted(NamedTuple):
    """Everything that decides a result's bytes."""

    data: bytes = b"image"
    options: tuple[str, dict[str, Any]] = ("stylize", {})
    form: str = "png"
    quality: int = 90
    icc: str = "srgb"
    metadata: str = "copyright"
    boxes: tuple[str, ...] = ()
    mark: str = "opencv 5"
    store: str = "s3://results/x"


def spec(wanted: Wanted, **others: Any) -> Job:
    operation, given = wanted.options
    options = parse_options(operation, given.get("engine", "opencv"), {k: v for k, v in given.items() if k != "engine"})
    output = {"url": wanted.store, "format": wanted.form, "quality": wanted.quality, "icc": wanted.icc}
    output |= {"metadata": wanted.metadata, "key": others.pop("key", "{index}")}
    return Job.model_validate({"operation": operation, "options": options, "output": output, **others})


@pytest.fixture(scope="module")
def cache(redis_server: EmbeddedRedis) -> Iterator[Cache]:
    made = Cache(redis_server.url, 60)
    yield made
    made.close()


@pytest.fixture
def raw(redis_server: EmbeddedRedis) -> Iterator[Any]:
    with redis.Redis.from_url(redis_server.url) as client:
        yield client


def key(wanted: Wanted, item: dict[str, Any] | None = None, **others: Any) -> str | None:
    """The key of one image; needs no Redis."""
    row = {"index": 0, "source": "https://a.example/1.jpg", "boxes": wanted.boxes, **(item or {})}
    with_nobody = Cache("redis://127.0.0.1:1/0", 60)
    return with_nobody.key(wanted.data, Item.model_validate(row), spec(wanted, **others), Engine(wanted.mark))


# --- keys -------------------------------------------------------------------------------------

OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("stylize", {}),
    ("stylize", {"style": "detail"}),
    ("stylize", {"strength": 0.5}),
    ("stylize", {"colour": True}),
    ("inpaint", {}),
    ("inpaint", {"radius": 5.5}),
    ("inpaint", {"boxes": ["1,2,3,4"]}),
    ("inpaint", {"boxes": ["1,2,3,5"]}),
    ("remove-background", {}),
    ("remove-background", {"long_edge": None}),
    ("remove-background", {"background": "#ffffff"}),
    ("remove-background", {"engine": "rembg"}),
    ("remove-background", {"engine": "rembg", "model": "u2netp"}),
    ("remove-background", {"engine": "rembg", "exact": True}),
    ("stylize", {"engine": "diffusion"}),
    ("stylize", {"engine": "diffusion", "seed": 1}),
    ("stylize", {"engine": "diffusion", "loras": "a:0.5"}),
]
WANTED = st.builds(
    Wanted,
    st.sampled_from([b"image", b"imagf", b"image\0", b""]),
    st.sampled_from(OPTIONS),
    st.sampled_from(get_args(Format)),
    st.sampled_from([90, 9, 91]),
    st.sampled_from(["srgb", "keep"]),
    st.sampled_from(get_args(KeepMetadata)),
    st.sampled_from([(), ("1,2,3,4",), ("1,2,3,5",), ("1,2,3,4", "1,2,3,4"), ("0.5,0.5,0.1,0.1",)]),
    st.sampled_from(["opencv 5", "opencv 5.1", ""]),
    st.sampled_from(["s3://results/x", "file:///out"]),
)


@given(WANTED, WANTED)
@example(Wanted(), Wanted())
@settings(max_examples=150, deadline=None)
def test_keys_are_equal_only_if_everything_that_decides_the_bytes_is(one: Wanted, other: Wanted) -> None:
    assert (key(one) == key(other)) == (one == other)


@given(WANTED, st.data())
@settings(max_examples=60, deadline=None)
def test_changing_one_thing_changes_the_key(wanted: Wanted, data: st.DataObject) -> None:
    other = data.draw(WANTED)
    for field in Wanted._fields:
        changed = wanted._replace(**{field: getattr(other, field)})
        assert (key(changed) == key(wanted)) == (changed == wanted), field


@pytest.mark.parametrize(
    ("item", "others"),
    [
        ({"source": "https://b.example/other-address.jpg"}, {}),
        ({"index": 7, "name": "cover"}, {}),
        ({}, {"key": "{job}/{item}"}),
        ({}, {"policy": {"priority": "high", "attempts": 1, "reuse": False}}),
        ({}, {"policy": {"quality": {"mode": "off", "most_cast": 1}}}),
    ],
    ids=["address", "place and name", "key template", "policy", "check without repair"],
)
def test_key_ignores_what_does_not_affect_the_bytes(item: dict[str, Any], others: dict[str, Any]) -> None:
    assert key(Wanted(), item, **others) == key(Wanted()) is not None


def test_key_depends_on_index_or_url_when_the_seed_does() -> None:
    def keys(policy: str) -> tuple[str | None, ...]:
        wanted = Wanted(options=("stylize", {"engine": "diffusion", "seed_policy": policy}))
        items = ({}, {"index": 7}, {"source": "https://b.example/2.jpg"})
        return tuple(key(wanted, item) for item in items)

    fixed, per_item, url = (keys(policy) for policy in ("fixed", "per-item", "url"))
    assert len(set(fixed)) == 1
    assert per_item[0] == per_item[2] != per_item[1]
    assert url[0] == url[1] != url[2]


def test_key_depends_on_points_and_on_the_part() -> None:
    items = [{}, {"points": "1,2"}, {"points": "1,2,0"}, {"part": "upper"}, {"part": "lower"}]
    assert len({key(Wanted(), item) for item in items}) == len(items)


def test_key_depends_on_repair_and_its_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    policies = [{}, {"mode": "repair"}, {"mode": "repair", "most_cast": 2}, {"mode": "repair", "most_cast": 3}]
    keys = {key(Wanted(), policy={"quality": quality}) for quality in policies}
    assert len(keys) == 4
    monkeypatch.setattr(module, "REPAIRS", module.REPAIRS + 1)
    assert key(Wanted(), policy={"quality": {"mode": "repair"}}) not in keys
    assert key(Wanted()) in keys


def test_equivalent_option_values_give_the_same_key() -> None:
    written = [{}, {"radius": 5}, {"radius": "5.0", "method": "telea"}]
    assert len({key(Wanted(options=("inpaint", options))) for options in written}) == 1
    assert key(Wanted(store="s3://results/x")) == key(Wanted(store="s3://elsewhere/y/z"))


def test_key_depends_on_library_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    before = key(Wanted())
    for package in module.AROUND:
        changed = {**module.versions(), package: "0.0.0"}
        with monkeypatch.context() as patch:
            patch.setattr(module, "versions", lambda changed=changed: changed)
            assert key(Wanted()) != before, package
    monkeypatch.setattr(module, "REVISION", module.REVISION + 1)
    assert key(Wanted()) != before


@pytest.mark.parametrize(
    ("options", "item"),
    [
        (("inpaint", {}), {"mask": "https://a.example/mask.png"}),
        (("inpaint", {"mask": "https://a.example/mask.png"}), {}),
        (("stylize", {"engine": "diffusion"}), {"control_image": "https://a.example/lines.png"}),
        (("stylize", {"engine": "diffusion", "control_image": "https://a.example/lines.png"}), {}),
        (("stylize", {"style": "colour-transfer", "reference": "https://a.example/sunset.jpg"}), {}),
        (("remove-background", {"engine": "rembg", "background_image": "https://a.example/beach.jpg"}), {}),
    ],
    ids=["own mask", "job's mask", "own control", "job's control", "reference", "background"],
)
def test_no_key_for_images_that_need_another_image(options: tuple[str, dict[str, Any]], item: dict[str, Any]) -> None:
    assert key(Wanted(options=options), item) is None


def test_addresses_lists_every_option_that_takes_a_url() -> None:
    """Any option of free text is a URL; colours, models and methods have a pattern or a list."""
    models = [engine.options for engine in ENGINES]
    free = {
        name
        for model in models
        for name, field in model.model_fields.items()
        if field.annotation in (str, str | None) and not field.metadata
    }
    assert free == set(ADDRESSES)


@pytest.mark.parametrize("error", [FileNotFoundError("u2net.onnx"), ConfigurationError("no such model")], ids=repr)
def test_no_key_when_the_fingerprint_is_unknown(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    nobody = Cache("redis://127.0.0.1:1/0", 60)
    item = Item(index=0, source="https://a.example/1.jpg")
    assert [nobody.key(b"image", item, spec(Wanted()), Engine(error)) for _ in range(3)] == [None] * 3
    assert [record.getMessage() for record in caplog.records] == ["results are not cached"]


@pytest.mark.parametrize("operation", ["remove-background", "inpaint", "stylize"])
def test_opencv_fingerprint_has_library_version_and_revision(operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = create(operation, "opencv")
    options = parse_options(operation, "opencv", {})
    before = engine.fingerprint(options)
    assert before == create(operation, "opencv").fingerprint(options)
    home = importlib.import_module(type(engine).__module__)
    with monkeypatch.context() as patch:
        patch.setattr(home, "REVISION", home.REVISION + 1)
        assert engine.fingerprint(options) != before
    monkeypatch.setattr("cv2.__version__", "4.0.0")
    assert engine.fingerprint(options) != before


# --- copies on S3 -----------------------------------------------------------------------------


Copied = Callable[[str], Remembered | None]


@pytest.fixture
def s3_answers(monkeypatch: pytest.MonkeyPatch, network: Network) -> Iterator[tuple[Copied, Stubber]]:
    """`copied` of an S3 store with stubbed server responses."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIDEXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    client = make_client(S3Settings(endpoint_url="http://minio.internal:9000"))
    with Stubber(client) as stubber:
        store = S3Store("s3://other/x", ClientOnly(client, network), S3Settings())
        yield lambda key: network.call(RESULT.copied(store, key)), stubber
        stubber.assert_no_pending_responses()


ASKED = {
    "Bucket": "other",
    "Key": "x/1.png",
    "CopySource": {"Bucket": "results", "Key": "jobs/260730-1f0c9a3e/000012-photo.png"},
    "CopySourceIfMatch": f'"{RESULT.md5}"',
    "MetadataDirective": "REPLACE",
    "ContentType": "image/png",
}


def test_copy_is_made_by_the_server_and_checked_by_md5(s3_answers: tuple[Copied, Stubber]) -> None:
    copied, server = s3_answers
    server.add_response("copy_object", {"CopyObjectResult": {"ETag": f'"{RESULT.md5}"'}}, ASKED)
    assert copied("1.png") == replace(RESULT, output="s3://other/x/1.png")


def test_copy_with_a_different_etag_is_rejected(s3_answers: tuple[Copied, Stubber]) -> None:
    """The source was replaced between the server's check and its copy."""
    copied, server = s3_answers
    server.add_response("copy_object", {"CopyObjectResult": {"ETag": '"5d41402abc4b2a76b9719d911017c592"'}}, ASKED)
    assert copied("1.png") is None


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("NoSuchKey", 404),
        ("NoSuchBucket", 404),
        ("PreconditionFailed", 412),
        ("AccessDenied", 403),
        ("NotImplemented", 501),
        ("SlowDown", 503),
    ],
)
def test_failed_copy_returns_none(s3_answers: tuple[Copied, Stubber], code: str, status: int) -> None:
    copied, server = s3_answers
    server.add_client_error("copy_object", code, http_status_code=status)
    assert copied("1.png") is None


# --- Redis ------------------------------------------------------------------------------------

REMEMBERED = st.builds(
    Remembered,
    st.text(min_size=1, max_size=80).map("s3://results/{}".format),
    st.binary(min_size=16, max_size=16).map(bytes.hex),
    st.sampled_from(["png", "jpeg", "webp"]),
    st.integers(1, 10**9),
    st.tuples(st.integers(1, 65_535), st.integers(1, 65_535)),
    st.lists(st.sampled_from(["empty_cutout", "repaired_seed"]), max_size=2).map(tuple),
    st.none() | st.builds(Measures, kept=st.floats(0, 9), look=st.none() | st.tuples(*[st.floats(-100, 100)] * 6)),
)


def save(cache: Cache, key: str | None, result: Remembered = RESULT) -> None:
    cache.put(key, result)
    cache.flush()


@given(REMEMBERED, REMEMBERED)
@settings(max_examples=60, deadline=None)
def test_latest_entry_is_read_back_unchanged(cache: Cache, one: Remembered, other: Remembered) -> None:
    for result in (one, other):
        save(cache, "key", result)
        assert cache.get(["key"]) == [result]
    assert cache.get(["another"]) == [None]


def test_entries_are_saved_in_one_round_trip(own_redis: EmbeddedRedis) -> None:
    cache = Cache(own_redis.url, 60)
    for number in range(40):
        cache.put(f"key {number}", replace(RESULT, bytes=number))
    assert cache.get(["key 7"]) == [None]
    with redis.Redis.from_url(own_redis.url) as client:
        before = client.info("stats")["total_reads_processed"]
        cache.flush()
        assert client.info("stats")["total_reads_processed"] - before < 10
        assert client.info("commandstats")["cmdstat_set"]["calls"] == 40
    assert cache.get(["key 7"]) == [replace(RESULT, bytes=7)]
    cache.close()


def test_several_entries_are_read_in_one_round_trip(own_redis: EmbeddedRedis) -> None:
    cache = Cache(own_redis.url, 60)
    for number in range(3):
        save(cache, f"key {number}", replace(RESULT, bytes=number))
    found = cache.get(["key 2", "new", None, "key 0", "key 2"])
    assert [entry and entry.bytes for entry in found] == [2, None, None, 0, 2]
    with redis.Redis.from_url(own_redis.url) as client:
        calls = client.info("commandstats")
        assert calls["cmdstat_mget"]["calls"] == 1
        assert "cmdstat_get" not in calls
    cache.close()


def test_entry_holds_the_md5_of_the_file(cache: Cache) -> None:
    encoded = Encoded(b"hello", "jpeg", (3, 2))
    fields: dict[str, Any] = dict(notes=("empty_mask",), measures=Measures(cast=0.4), filled="M1,2 3,4 5,6Z")
    result = Remembered.of(encoded, output="file:///out/1.jpg", **fields)
    assert result == Remembered("file:///out/1.jpg", "5d41402abc4b2a76b9719d911017c592", "jpeg", 5, (3, 2), **fields)


def test_entry_expires_with_the_job_and_stays_small(redis_server: EmbeddedRedis, raw: Any) -> None:
    given = Settings(_env_file=None, redis_url=redis_server.url, expire_days=2)  # type: ignore[call-arg]
    cache = Cache.of(given)
    assert cache is not None
    name = key(Wanted())
    save(cache, name)
    stored = f"imagemill:cache:{name}"
    assert 2 * 86_400 - 60 < raw.ttl(stored) <= 2 * 86_400
    assert len(stored) + raw.strlen(stored) < 160
    cache.close()


def test_no_redis_call_without_a_key(cache: Cache, raw: Any) -> None:
    before = raw.dbsize()
    save(cache, None)
    assert cache.get([None]) == [None]
    assert raw.dbsize() == before


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"\xff\xfe",
        b"{}",
        b"12",
        b'["s3://results/a.png"]',
        b'["s3://results/a.png","not base64!","png",1,2,3]',
        b'["s3://results/a.png",12,"png",1,2,3]',
        b'["s3://results/a.png","AAAAAAAAAAAAAAAAAAAAAA","exe",1,2,3]',
        b'["s3://results/a.png","AAAAAAAAAAAAAAAAAAAAAA","png","many",2,3]',
    ],
    ids=repr,
)
def test_unreadable_entry_counts_as_missing(cache: Cache, raw: Any, value: bytes) -> None:
    raw.set("imagemill:cache:foreign", value)
    assert cache.get(["foreign"]) == [None]


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_unreachable_redis_is_tolerated_and_logged_once(own_redis: EmbeddedRedis, caplog: pytest.LogCaptureFixture) -> None:
    cache = Cache(own_redis.url, 60)
    save(cache, "key")
    own_redis.kill()
    for _ in range(3):
        assert cache.get(["key"]) == [None]
        save(cache, "key")
    assert warnings(caplog) == ["results are not cached"]
    own_redis.start()
    save(cache, "key")
    assert cache.get(["key"]) == [RESULT]
    cache.close()


def test_full_redis_is_tolerated_and_still_read(own_redis: EmbeddedRedis, caplog: pytest.LogCaptureFixture) -> None:
    cache = Cache(own_redis.url, 60)
    save(cache, "known")
    with redis.Redis.from_url(own_redis.url) as client:
        client.config_set("maxmemory", "1")
        client.config_set("maxmemory-policy", "noeviction")
    for _ in range(3):
        save(cache, "new")
        assert cache.get(["known"]) == [RESULT]
    assert cache.get(["new"]) == [None]
    assert warnings(caplog) == ["results are not cached"]
    cache.close()


def test_reuse_setting_turns_the_cache_off() -> None:
    assert Cache.of(Settings(_env_file=None, worker={"reuse": False})) is None  # type: ignore[call-arg, arg-type]
