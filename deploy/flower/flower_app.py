"""The Celery application that Flower watches: the broker and its settings, without the worker's dependencies."""

from __future__ import annotations

from imagemill.shared.broker import make_app
from imagemill.shared.settings import load_settings

app = make_app(load_settings())
