"""The Celery application for Celery's own tools: `celery -A imagemill.worker.app worker`.

The only module that reads the environment at import, because these tools offer no later opportunity.
"""

from imagemill.shared.settings import load_settings
from imagemill.worker.main import Worker

worker = Worker(load_settings())
app = worker.app
