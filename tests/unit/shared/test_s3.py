"""S3 without a server: URLs, links, lifecycle rules, and botocore's errors translated."""

from __future__ import annotations

import re
import string
from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from botocore import exceptions as boto
from botocore.exceptions import BotoCoreError, ClientError
from botocore.stub import ANY, Stubber

from imagemill.shared import errors
from imagemill.shared.errors import (
    ConfigurationError,
    ImageError,
    InvalidOption,
    InvalidSource,
    ServiceUnavailable,
    StorageRefused,
)
from imagemill.shared.s3 import (
    LONGEST_LINK,
    ensure_bucket,
    expire_after,
    list_objects,
    make_client,
    make_signer,
    presign,
    split,
    storing,
    translate,
)
from imagemill.shared.settings import S3Settings

MINIO = S3Settings(endpoint_url="http://minio.internal:9000")


@pytest.fixture(autouse=True)
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "AWS_PROFILE",
        "AWS_DEFAULT_REGION",
        "AWS_REGION",
        "AWS_ENDPOINT_URL",
        "AWS_ENDPOINT_URL_S3",
        "AWS_SESSION_TOKEN",
    ):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, "/dev/null")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIDEXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush")


@pytest.fixture
def stub() -> Iterator[Stubber]:
    """A client with prepared answers; any other request fails."""
    with Stubber(make_client(MINIO)) as stubber:
        yield stubber
        stubber.assert_no_pending_responses()


# --- clients and links ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "parts"),
    [
        ("s3://bucket/a/b.png", ("bucket", "a/b.png")),
        ("S3://bucket", ("bucket", "")),
        ("s3://bucket/a?b#c%20d é.png", ("bucket", "a?b#c%20d é.png")),
        ("s3://bucket//a", ("bucket", "/a")),
    ],
)
def test_split(url: str, parts: tuple[str, str]) -> None:
    assert split(url) == parts


@pytest.mark.parametrize("url", ["", "bucket/key", "https://bucket/key", "s3:/bucket/key", "s3://", "s3:///key"])
def test_split_rejects_other_urls(url: str) -> None:
    with pytest.raises(errors.UnsupportedUrl):
        split(url)


def test_link_uses_the_public_url_and_contains_no_secret() -> None:
    signer = make_signer(S3Settings(endpoint_url="http://minio.internal:9000", public_url="https://photos.example"))
    link = urlsplit(presign(signer, "s3://results/a b/ü?.png", 600))
    assert (link.netloc, link.path) == ("photos.example", "/results/a%20b/%C3%BC%3F.png")
    query = parse_qs(link.query)
    assert (query["X-Amz-Algorithm"], query["X-Amz-Expires"]) == (["AWS4-HMAC-SHA256"], ["600"])
    assert "hush" not in link.geturl()
    assert urlsplit(presign(make_signer(MINIO), "s3://results/a.png", 1)).netloc == "minio.internal:9000"


@pytest.mark.parametrize("seconds", [-1, 0, LONGEST_LINK + 1])
def test_presign_rejects_invalid_durations(seconds: int) -> None:
    with pytest.raises(InvalidOption, match=f"1 to {LONGEST_LINK} seconds"):
        presign(make_signer(MINIO), "s3://results/a.png", seconds)


def test_error_names_the_variables_to_set_when_keys_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(StorageRefused, match="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"):
        presign(make_signer(MINIO), "s3://results/a.png", 60)


@pytest.mark.parametrize("settings", [{"endpoint_url": "minio:9000"}, {"region": "not a region"}])
def test_unusable_endpoint_or_region_is_a_configuration_error(settings: dict[str, str]) -> None:
    with pytest.raises(ConfigurationError, match=r"^S3 at "):
        make_client(S3Settings.model_validate(settings))


@pytest.mark.parametrize(
    "url", ["http://key:hu/sh@minio:9000", "key:hush@minio:9000", "http://key:hush@minio", "http://@minio:port"]
)
def test_malformed_endpoint_is_shown_without_its_credentials(url: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        make_client(S3Settings(endpoint_url=url))
    assert "@minio" in caught.value.message
    assert "hush" not in caught.value.message
    assert "hu/sh" not in caught.value.message


# --- buckets and rules ------------------------------------------------------------------------


def test_missing_bucket_is_refused_unless_it_may_be_created(stub: Stubber) -> None:
    stub.add_client_error("head_bucket", "404", http_status_code=404)
    with pytest.raises(StorageRefused, match=r"there is no bucket 'results'.*IMAGEMILL_S3__CREATE_BUCKET"):
        ensure_bucket(stub.client, "results", create=False, region="us-east-1")


@pytest.mark.parametrize(
    ("region", "location"),
    [("us-east-1", {}), ("eu-central-1", {"CreateBucketConfiguration": {"LocationConstraint": "eu-central-1"}})],
)
def test_bucket_is_created_in_its_region(stub: Stubber, region: str, location: dict[str, Any]) -> None:
    stub.add_client_error("head_bucket", "404", http_status_code=404)
    stub.add_response("create_bucket", {}, {"Bucket": "results", **location})
    ensure_bucket(stub.client, "results", create=True, region=region)


@pytest.mark.parametrize("code", ["BucketAlreadyOwnedByYou", "BucketAlreadyExists", "OperationAborted"])
def test_two_workers_may_create_the_same_bucket_at_once(stub: Stubber, code: str) -> None:
    stub.add_client_error("head_bucket", "404", http_status_code=404)
    stub.add_client_error("create_bucket", code, http_status_code=409)
    stub.add_response("head_bucket", {})
    ensure_bucket(stub.client, "results", create=True, region="us-east-1")


def test_bucket_of_another_account_is_refused(stub: Stubber) -> None:
    stub.add_client_error("head_bucket", "404", http_status_code=404)
    stub.add_client_error("create_bucket", "BucketAlreadyExists", http_status_code=409)
    stub.add_client_error("head_bucket", "403", http_status_code=403)
    with pytest.raises(StorageRefused, match="refuses access"):
        ensure_bucket(stub.client, "results", create=True, region="us-east-1")


def rule(prefix: str, days: int, name: Any = ANY) -> dict[str, Any]:
    return {"ID": name, "Status": "Enabled", "Filter": {"Prefix": prefix}, "Expiration": {"Days": days}}


def test_expiry_keeps_other_rules_and_replaces_its_own(stub: Stubber) -> None:
    foreign = rule("logs/", 3, "another tool's")
    ours = rule("jobs/a/", 7)
    requests: list[Any] = []
    stub.client.meta.events.register(
        "provide-client-params.s3.PutBucketLifecycleConfiguration", lambda params, **_: requests.append(params)
    )
    stub.add_client_error("get_bucket_lifecycle_configuration", "NoSuchLifecycleConfiguration", http_status_code=404)
    stub.add_response(
        "put_bucket_lifecycle_configuration", {}, {"Bucket": "results", "LifecycleConfiguration": {"Rules": [ours]}}
    )
    expire_after(stub.client, "results", "/jobs/a/", 7)
    (mine,) = requests[0]["LifecycleConfiguration"]["Rules"]
    stub.add_response("get_bucket_lifecycle_configuration", {"Rules": [mine, foreign]}, {"Bucket": "results"})
    stub.add_response(
        "put_bucket_lifecycle_configuration",
        {},
        {"Bucket": "results", "LifecycleConfiguration": {"Rules": [foreign, {**mine, "Expiration": {"Days": 30}}]}},
    )
    expire_after(stub.client, "results", "jobs/a", 30)
    stub.add_response("get_bucket_lifecycle_configuration", {"Rules": [mine]}, {"Bucket": "results"})
    rules = {"Rules": [mine, rule("jobs/b/", 7)]}
    stub.add_response("put_bucket_lifecycle_configuration", {}, {"Bucket": "results", "LifecycleConfiguration": rules})
    expire_after(stub.client, "results", "jobs/b", 7)


def test_unreadable_rules_are_not_overwritten(stub: Stubber) -> None:
    stub.add_client_error("get_bucket_lifecycle_configuration", "AccessDenied", http_status_code=403)
    with pytest.raises(StorageRefused, match="lifecycle rules of bucket 'results'"):
        expire_after(stub.client, "results", "jobs/a", 7)


@pytest.mark.parametrize("code", ["NotImplemented", "MethodNotAllowed", "MalformedXML"])
def test_error_when_the_server_does_not_offer_expiry(stub: Stubber, code: str) -> None:
    stub.add_response("get_bucket_lifecycle_configuration", {})
    stub.add_client_error("put_bucket_lifecycle_configuration", code, http_status_code=400)
    with pytest.raises(StorageRefused, match="does not offer expiry"):
        expire_after(stub.client, "results", "jobs/a", 7)


@pytest.mark.parametrize(("prefix", "days"), [("", 7), ("/", 7), ("jobs", 0), ("jobs", -1)])
def test_expiry_needs_a_prefix_and_a_day(stub: Stubber, prefix: str, days: int) -> None:
    with pytest.raises(InvalidOption, match="needs a prefix"):
        expire_after(stub.client, "results", prefix, days)


# --- listing ----------------------------------------------------------------------------------


def test_objects_are_listed_page_by_page_in_key_order(stub: Stubber) -> None:
    first = {
        "IsTruncated": True,
        "NextContinuationToken": "next",
        "Contents": [{"Key": "in/", "Size": 0}, {"Key": "in/a.JPG", "Size": 7}],
    }
    last = {"IsTruncated": False, "Contents": [{"Key": "in/ü ?.png", "Size": 9}]}
    stub.add_response("list_objects_v2", first, {"Bucket": "photos", "Prefix": "in"})
    found = list_objects(stub.client, "s3://photos/in")
    assert next(found) == ("photos", "in/", 0)  # before the second page is requested
    stub.add_response("list_objects_v2", last, {"Bucket": "photos", "Prefix": "in", "ContinuationToken": "next"})
    assert list(found) == [("photos", "in/a.JPG", 7), ("photos", "in/ü ?.png", 9)]


@pytest.mark.parametrize(
    ("code", "status", "kind"),
    [("NoSuchBucket", 404, InvalidSource), ("AccessDenied", 403, InvalidSource), ("SlowDown", 503, ServiceUnavailable)],
)
def test_listing_errors(stub: Stubber, code: str, status: int, kind: type[Exception]) -> None:
    stub.add_client_error("list_objects_v2", code, http_status_code=status)
    with pytest.raises(kind, match="s3://photos/in"):
        list(list_objects(stub.client, "s3://photos/in"))


# --- errors -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "status", "kind"),
    [
        ("NoSuchKey", 404, errors.NotFound),
        ("NoSuchBucket", 404, errors.NotFound),
        ("404", 404, errors.NotFound),
        ("MethodNotAllowed", 410, errors.NotFound),
        ("AccessDenied", 403, errors.AccessDenied),
        ("403", 403, errors.AccessDenied),
        ("SignatureDoesNotMatch", 403, errors.AccessDenied),
        ("InvalidAccessKeyId", 403, errors.AccessDenied),
        ("ExpiredToken", 400, errors.AccessDenied),
        ("RequestTimeTooSkewed", 403, errors.ServerError),
        ("RequestTimeout", 400, errors.Timeout),
        ("SlowDown", 503, errors.ServerError),
        ("InternalError", 500, errors.ServerError),
        ("InternalError", 200, errors.ServerError),  # S3 can report an error in the body of a 200
        ("BadDigest", 400, errors.ServerError),
        ("", 502, errors.ServerError),
        ("429", 429, errors.ServerError),
        ("NotImplemented", 501, errors.HttpError),
        ("InvalidRequest", 400, errors.HttpError),
        ("", 0, errors.HttpError),
    ],
)
def test_answers_are_translated(code: str, status: int, kind: type[ImageError]) -> None:
    answer = {"Error": {"Code": code, "Message": "AWSAccessKeyId=AKIDEXAMPLE Signature=hush"}}
    error = ClientError({**answer, "ResponseMetadata": {"HTTPStatusCode": status}}, "GetObject")  # type: ignore[arg-type]
    meaning = translate(error, "s3://photos/a.png")
    assert type(meaning) is kind
    assert meaning.message.startswith("s3://photos/a.png")
    assert "AKIDEXAMPLE" not in meaning.message
    assert "hush" not in meaning.message


def subclasses(kind: type[Exception]) -> set[type[Exception]]:
    here = {kind} if kind.__module__ == boto.__name__ else set()
    return here.union(*(subclasses(child) for child in kind.__subclasses__()))


ALL = sorted(subclasses(BotoCoreError), key=lambda kind: kind.__name__)
SIGNED = "https://s3.example/photos/a.png?X-Amz-Credential=AKIDEXAMPLE&X-Amz-Signature=hush"
LEAKING = {"endpoint_url", "error", "request", "response", "proxy_url"}
"""Fields of botocore's errors that may contain a signed URL."""
RETRYABLE = (
    boto.HTTPClientError,
    boto.ConnectionError,
    boto.IncompleteReadError,
    boto.ChecksumError,
    boto.FlexibleChecksumError,
)
ABOUT_KEYS = re.compile("Credential|AuthToken|TokenRetrieval|SSO|Login|MetadataRetrieval|ProfileNotFound")


def example(kind: type[Exception]) -> Exception:
    fields = {name for _, name, _, _ in string.Formatter().parse(kind.fmt) if name}  # type: ignore[attr-defined]
    if kind is boto.WaiterError:
        return kind(name="w", reason="r", last_response={"Error": {"Message": SIGNED}})  # type: ignore[call-arg]
    return kind(**{name: SIGNED if name in LEAKING else name for name in fields})


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
def test_botocore_errors_are_translated_without_keys(kind: type[Exception]) -> None:
    error = example(kind)
    meaning = translate(error, "s3://photos/a.png")
    assert meaning.message.startswith("s3://photos/a.png")
    assert "AKIDEXAMPLE" not in meaning.message
    assert "hush" not in meaning.message
    assert "\n" not in meaning.message
    assert meaning.retryable == issubclass(kind, RETRYABLE)
    assert isinstance(meaning, errors.Timeout) == issubclass(kind, boto.ConnectTimeoutError | boto.ReadTimeoutError)
    if ABOUT_KEYS.search(kind.__name__) and kind is not boto.UnknownCredentialError:
        assert isinstance(meaning, errors.AccessDenied)
    stored = errors.StorageUnavailable if meaning.retryable else errors.StorageRefused
    with pytest.raises(stored, match=r"^s3://photos/a\.png"), storing("s3://photos/a.png"):
        raise error


def test_other_errors_pass_through() -> None:
    with pytest.raises(KeyError), storing("s3://photos/a.png"):
        raise KeyError("not botocore's")
