"""A worker like those in tutorials, for comparison: one image per message, one after the other, a new S3 client per image.

It keeps its rembg session and scales images down to 1600 pixels, as people who run rembg in a queue soon learn to do.

    celery -A bench.tutorial worker --concurrency 1
"""

from __future__ import annotations

import io
import os
from typing import Any

import boto3
import requests
from celery import Celery
from PIL import Image

from imagemill.worker.node.parting import die_with_supervisor

die_with_supervisor()  # with the benchmark
app = Celery("tutorial", broker=os.environ["TUTORIAL_REDIS"], backend=os.environ["TUTORIAL_REDIS"], set_as_current=False)
_sessions: list[Any] = []


@app.task(name="tutorial.remove_background")  # type: ignore[untyped-decorator]
def remove_background(url: str, key: str, scaled_decode: bool = False) -> str:
    """Fetch, cut out and store. With `scaled_decode` Pillow decodes JPEGs at a reduced size, which few programs use."""
    from rembg import new_session, remove

    if not _sessions:
        _sessions.append(new_session("u2net"))
    response = requests.get(url, timeout=60)
    response.raise_for_status()
    with Image.open(io.BytesIO(response.content)) as opened:
        image = opened if scaled_decode else opened.convert("RGB")
        image.thumbnail((1600, 1600), Image.Resampling.LANCZOS)
        cut_out: Any = remove(image, session=_sessions[0])
    file = io.BytesIO()
    cut_out.save(file, "PNG")
    s3 = boto3.client("s3", endpoint_url=os.environ["TUTORIAL_S3"], region_name="us-east-1")
    s3.put_object(Bucket="results", Key=key, Body=file.getvalue(), ContentType="image/png")
    return key
