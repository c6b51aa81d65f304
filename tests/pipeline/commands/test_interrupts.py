"""Ctrl-C at any moment of a command: the sentence once, exit code 130, no traceback."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
# Ctrl-C at the n-th call of a Python function after main() was called, wherever that is.
AT_CALL = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from grappa.__main__ import main
left = int(sys.argv.pop(1))

def count(frame, event, argument):
    global left
    if event == "call":
        left -= 1
        if left == 0:
            sys.setprofile(None)
            os.kill(os.getpid(), signal.SIGINT)

sys.setprofile(count)
sys.argv[0] = "grappa"
main()
"""
MOMENTS = [100, 300, 1_000, 3_000, 10_000, 30_000, 60_000, 100_000]


@pytest.mark.parametrize("moment", MOMENTS)
def test_an_interrupt_at_any_call_is_one_sentence(moment: int, tmp_path: Path) -> None:
    command = [sys.executable, "-c", AT_CALL, str(moment), "init", str(tmp_path / "run"), "--images", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "grappa: stopped; the same command resumes\n")


def start(code: str) -> subprocess.Popen[str]:
    """Run the command `status`, in which ``code`` takes the place of the work."""
    program = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "import grappa.pipeline.store.artifacts as artifacts\n"
        "def pause():\n    print('at work', flush=True)\n    time.sleep(60)\n"  # Said inside of the code's own try.
        f"def work(*arguments, **options):\n{code}\n"
        "artifacts.RunFolder.open = work\n"
        "from grappa.__main__ import main\n"
        "sys.argv = ['grappa', 'status', 'RUN']\n"
        "main()"
    )
    command = [sys.executable, "-c", program]
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "at work\n"
    return child


@pytest.mark.parametrize(
    "work",
    [
        "    pause()",
        "    try:\n        pause()\n    except KeyboardInterrupt:\n        raise ImportError('numpy is broken')",
        "    try:\n        pause()\n    except KeyboardInterrupt:\n        raise ValueError('another sentence')",
    ],
    ids=["plain", "an import made an error of it", "a library made an error of it"],
)
def test_an_interrupt_of_the_work_is_one_sentence(work: str) -> None:
    child = start(work)
    child.send_signal(signal.SIGINT)
    _, stderr = child.communicate(timeout=30)
    assert (child.returncode, stderr) == (130, "grappa: stopped; the same command resumes\n")


def test_a_second_interrupt_ends_the_process_at_once() -> None:
    child = start("    try:\n        pause()\n    finally:\n        time.sleep(60)")
    child.send_signal(signal.SIGINT)
    assert child.stderr is not None and child.stderr.readline() == "grappa: stopped; the same command resumes\n"
    time.sleep(0.1)
    child.send_signal(signal.SIGINT)
    _, stderr = child.communicate(timeout=30)
    assert (child.returncode, stderr) == (-signal.SIGINT, "")


def test_a_command_that_ignores_interrupts_goes_on_ignoring_them() -> None:
    """As one that a shell has started in the background."""
    program = "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nfrom grappa.__main__ import main\nmain()"
    program += "\nassert signal.getsignal(signal.SIGINT) is signal.SIG_IGN"
    code = (
        f"import sys\nsys.argv = ['grappa', '--version']\ntry:\n    exec({program!r})\nexcept SystemExit:\n    pass\n"
    )
    code += "import signal\nassert signal.getsignal(signal.SIGINT) is signal.SIG_IGN"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
