"""Submit a folder of photos from Python, and print each result.

    python examples/submit.py PHOTOS RESULTS

Needs Redis and a worker that may read and write these folders (IMAGEMILL_FILES__READ_ROOTS and __WRITE_ROOTS).
"""

from __future__ import annotations

import sys
from pathlib import Path

from imagemill import Client, Job, Output, load_settings, read_sources


def main(photos: str, results: str) -> None:
    output = Output(url=Path(results).absolute().as_uri(), format="png")
    job = Job(operation="remove-background", options={"engine": "opencv", "background": "#ffffff"}, output=output)
    with Client(load_settings()) as client:
        submission = client.submit(read_sources([photos], s3=client.s3), job)
        print(f"job {submission.job}: {submission.total} images")
        status = client.wait(submission.job)
        for row in client.results(submission.job):
            print(row.source, row.output or f"{row.code}: {row.message}")
    sys.exit(1 if status.failed else 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
