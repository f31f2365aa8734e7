"""The Celery application under the name that Celery's own tools want: `celery -A imagemill.worker.app worker`.

The one module that reads the environment at import, since those tools give it no other chance.
"""

from imagemill.shared.settings import load_settings
from imagemill.worker.main import Worker

worker = Worker(load_settings())
app = worker.app
