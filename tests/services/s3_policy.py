"""What an S3 policy allows, for a proxy that refuses everything else."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

OF_BUCKETS = {
    ("HEAD", ""): "s3:ListBucket",
    ("GET", "list-type"): "s3:ListBucket",
    ("GET", "uploads"): "s3:ListBucketMultipartUploads",
    ("GET", "lifecycle"): "s3:GetLifecycleConfiguration",
    ("PUT", "lifecycle"): "s3:PutLifecycleConfiguration",
    ("PUT", ""): "s3:CreateBucket",
}
OF_OBJECTS = {
    ("GET", ""): "s3:GetObject",
    ("HEAD", ""): "s3:GetObject",
    ("PUT", ""): "s3:PutObject",
    ("DELETE", ""): "s3:DeleteObject",
    ("POST", "uploads"): "s3:PutObject",
    ("PUT", "uploadId"): "s3:PutObject",
    ("POST", "uploadId"): "s3:PutObject",
    ("DELETE", "uploadId"): "s3:AbortMultipartUpload",
}


class Policy:
    """The file's policy for one bucket. `used` and `refused` collect the actions that were asked for."""

    def __init__(self, file: Path, bucket: str) -> None:
        statements = json.loads(file.read_text(encoding="utf-8").replace("BUCKET", bucket))["Statement"]
        assert {statement["Effect"] for statement in statements} == {"Allow"}
        self._rights = {(action, place) for each in statements for action in each["Action"] for place in each["Resource"]}
        self.actions = {action for action, _ in self._rights}
        self.used: set[str] = set()
        self.refused: set[str] = set()

    def allows(self, method: str, target: str, headers: Mapping[str, str]) -> bool:
        """Whether all that this request needs is allowed."""
        allowed = True
        for action, place in needed(method, target, headers):
            granted = any(action == right and fnmatchcase(place, pattern) for right, pattern in self._rights)
            (self.used if granted else self.refused).add(action)
            allowed = allowed and granted
        return allowed


def needed(method: str, target: str, headers: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """The actions that AWS and MinIO demand for a path-style request, each with its resource."""
    parts = urlsplit(target)
    bucket, _, key = unquote(parts.path).lstrip("/").partition("/")
    known = OF_OBJECTS if key else OF_BUCKETS
    kind = next((word for word in parse_qs(parts.query, keep_blank_values=True) if (method, word) in known), "")
    action = known.get((method, kind), f"unknown: {method} {target}") if bucket else "s3:ListAllMyBuckets"
    yield action, f"arn:aws:s3:::{bucket}/{key}" if key else f"arn:aws:s3:::{bucket}"
    if source := headers.get("x-amz-copy-source"):
        yield "s3:GetObject", f"arn:aws:s3:::{unquote(source).lstrip('/')}"
