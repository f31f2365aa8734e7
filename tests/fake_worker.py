"""`python tests/fake_worker.py FAKE ARGUMENT...`: `imagemill ARGUMENT...` with one of tests/fakes.py for stylize."""

import runpy
import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).parents[1]

if __name__ == "__main__":
    sys.path[:0] = [str(ROOT / "src"), str(ROOT)]
    from imagemill.shared.engines import ENGINES

    (place,) = (place for place, row in enumerate(ENGINES) if (row.operation, row.name) == ("stylize", "opencv"))
    ENGINES[place] = replace(ENGINES[place], module=f"tests.fakes:{sys.argv.pop(1)}")
    runpy.run_module("imagemill.producer.cli", run_name="__main__")
