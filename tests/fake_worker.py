"""`python tests/fake_worker.py FAKE ARGUMENT...`: `imagemill ARGUMENT...` with one of tests/fakes.py as stylize's engine."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1] / "src"), str(Path(__file__).parents[1])]

from imagemill.producer.cli import main
from imagemill.worker.operations import registry

if __name__ == "__main__":
    registry.ENGINES["stylize", "opencv"] = f"tests.fakes:{sys.argv.pop(1)}"
    main()
