"""The Celery application under the name that Celery's own tools want: `celery -A worker.app worker`.

The one module that reads the environment at import, since those tools give it no other chance.
"""

from shared.settings import load_settings
from worker.main import Worker

worker = Worker(load_settings())
app = worker.app
