from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from threading import Thread

import psutil
import pytest

from imagemill.worker.models.own_process import apart
from tests.workers import clean_environment, wait_until


def last(started: Path) -> None:
    """Write this process's ID, and stay for long."""
    started.with_suffix(".new").write_text(str(os.getpid()))
    started.with_suffix(".new").rename(started)
    time.sleep(600)


def test_ctrl_c_ends_the_trial_at_once(tmp_path: Path) -> None:
    started = tmp_path / "started"

    def interrupt() -> None:
        wait_until(started.exists, "the trial has begun")
        os.kill(os.getpid(), signal.SIGINT)

    thread = Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        apart(last, started)
    thread.join()
    assert not psutil.pid_exists(int(started.read_text()))


def test_trial_ends_with_the_process_that_wanted_it(tmp_path: Path) -> None:
    program = "import sys; from pathlib import Path; from imagemill.worker.models.own_process import apart\n"
    program += "from tests.unit.worker.models.test_own_process import last\n"
    program += "if __name__ == '__main__': apart(last, Path(sys.argv[1]))\n"
    (tmp_path / "program.py").write_text(program)
    started = tmp_path / "started"
    process = subprocess.Popen([sys.executable, str(tmp_path / "program.py"), str(started)], env=clean_environment())
    wait_until(started.exists, "the trial has begun")
    process.kill()
    process.wait()
    wait_until(lambda: not psutil.pid_exists(int(started.read_text())), "the trial has ended", 10)
