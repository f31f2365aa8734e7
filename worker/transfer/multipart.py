"""Upload an S3 object in parts. If it fails, none of them remain."""

from __future__ import annotations

import base64
import hashlib
import logging
from contextlib import suppress
from typing import Self

from imagemill.shared.errors import StorageRefused, StorageUnavailable
from imagemill.shared.s3 import S3Client, storing

log = logging.getLogger(__name__)

PART = 8 << 20
"""Bytes of a part. S3 wants at least 5 MiB, except for the last, and at most 10,000 parts."""
GONE = "NoSuchUpload"


class Upload:
    """An upload, completed when the block ends and aborted if it raises. Raises StorageUnavailable or StorageRefused."""

    def __init__(self, client: S3Client, bucket: str, key: str, url: str, content_type: str) -> None:
        self._client, self._url, self._content_type = client, url, content_type
        self._where = {"Bucket": bucket, "Key": key}
        self._parts: list[dict[str, object]] = []

    def __enter__(self) -> Self:
        self._abort_older()
        with storing(self._url):
            self._id = self._client.create_multipart_upload(**self._where, ContentType=self._content_type)["UploadId"]
        return self

    def add(self, part: bytes) -> None:
        """Upload the next part; the server verifies its MD5."""
        number = len(self._parts) + 1
        upload = {**self._where, "UploadId": self._id, "PartNumber": number, "Body": part, "ContentMD5": content_md5(part)}
        self._parts.append({"PartNumber": number, "ETag": self._call("upload_part", **upload)["ETag"]})

    def __exit__(self, failed: type[BaseException] | None, *_: object) -> None:
        try:
            if failed is None:
                self._call(
                    "complete_multipart_upload", UploadId=self._id, **self._where, MultipartUpload={"Parts": self._parts}
                )
        except BaseException:
            self._abort(self._id)
            raise
        if failed is not None:
            self._abort(self._id)

    def _call(self, name: str, **arguments: object) -> dict[str, str]:
        from botocore.exceptions import ClientError

        with storing(self._url):
            try:
                answer: dict[str, str] = getattr(self._client, name)(**arguments)
            except ClientError as error:
                if error.response["Error"]["Code"] == GONE:  # another worker, or a rule of the bucket, has aborted it
                    raise StorageUnavailable(f"{self._url}: the upload was aborted meanwhile") from error
                raise
        return answer

    def _abort(self, upload: str) -> None:
        try:
            with storing(self._url):
                self._client.abort_multipart_upload(**self._where, UploadId=upload)
        except (StorageUnavailable, StorageRefused) as error:
            log.info("upload not aborted", extra={"action": "abort", "url": self._url, "reason": error.message})

    def _abort_older(self) -> None:
        """Abort uploads that killed processes had begun. Not every S3 server or key allows the listing."""
        with suppress(StorageUnavailable, StorageRefused):
            with storing(self._url):
                found = self._client.list_multipart_uploads(Bucket=self._where["Bucket"], Prefix=self._where["Key"])
            for upload in found.get("Uploads", []):
                if upload["Key"] == self._where["Key"]:
                    self._abort(upload["UploadId"])


def content_md5(data: bytes) -> str:
    """The value of the header Content-MD5."""
    return base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()
