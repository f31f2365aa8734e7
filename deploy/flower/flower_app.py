"""The Celery application that Flower watches: the broker and its options, without the worker's packages."""

from __future__ import annotations

from imagemill.shared.broker import make_app
from imagemill.shared.settings import load_settings

app = make_app(load_settings())
