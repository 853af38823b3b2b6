"""Several commands at a time: where they run, what they say, how they are stopped."""

import os
import signal
import subprocess
import sys
import time

import pytest
from helpers import ROOT

from training.side_by_side import Command, run_side_by_side


def python(name, code, output=None):
    return Command(name, [sys.executable, "-c", code], output)


def test_commands_share_the_places_and_a_failed_one_stops_no_other(tmp_path, capfd):
    """Two wait for one another, so they are at work at once; the third takes the free place."""
    wait = (
        "import os, pathlib, time\n"
        "print(os.environ['PLACE'], flush=True)\n"
        "here, other = map(pathlib.Path, ({!r}, {!r}))\n"
        "here.touch()\n"
        "while not other.exists(): time.sleep(0.01)\n"
        "{}"
    )
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    commands = [
        python("first", wait.format(a, b, "raise SystemExit('error: mend it')"), tmp_path / "1"),
        python("second", wait.format(b, a, ""), tmp_path / "2"),
        python("third", wait.format(a, b, ""), tmp_path / "3"),
    ]
    places = [{"PLACE": "one"}, {"PLACE": "two"}]
    codes = {"first": 1, "second": 0, "third": 0}
    assert run_side_by_side(commands, places) == (codes, 0)
    out, err = capfd.readouterr()
    assert err == "first: error: mend it\n" and "first: failed (1)" in out and "third: done" in out
    assert (tmp_path / "1").read_text() == "one\nerror: mend it\n"
    assert (tmp_path / "2").read_text() == "two\n"
    # What an earlier attempt printed stays.
    run_side_by_side(commands[2:], places)
    assert len((tmp_path / "3").read_text().splitlines()) == 2


SAVES = """
import pathlib, signal, sys, time
def stop(n, _):
    # A second signal kills.
    signal.signal(n, signal.SIG_DFL)
    time.sleep(1)
    pathlib.Path(sys.argv[1]).touch()
    sys.exit(128 + n)
signal.signal(signal.SIGINT, stop)
signal.signal(signal.SIGTERM, stop)
sys.stdout.write('ready\\n')  # `print` would write the end of the line apart.
sys.stdout.flush()
time.sleep(30)
"""
MAIN = f"""
import signal, sys
from training.side_by_side import Command, run_side_by_side
# A shell's background job, as CI may be, ignores it.
signal.signal(signal.SIGINT, signal.default_int_handler)
commands = [Command(name, [sys.executable, "-c", {SAVES!r}, name]) for name in sys.argv[1:]]
codes, number = run_side_by_side(commands, [{{}}, {{}}])
sys.exit(number + 1 if sorted(codes) == sys.argv[1:3] else 1)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_all_are_told_to_stop_and_waited_for(number, tmp_path):
    """They take a second to save; that they did is seen after our own end. A third never begins."""
    names = [str(tmp_path / name) for name in "abc"]
    process = subprocess.Popen(
        [sys.executable, "-c", MAIN, *names],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    said = [process.stdout.readline() for _ in range(4)]
    assert said.count("ready\n") == 2
    # A terminal tells the whole group of an interrupt, a scheduler only the first process.
    (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
    assert process.wait(20) == number + 1
    assert [os.path.exists(name) for name in names] == [True, True, False]


def test_one_that_was_stopped_stops_the_others(tmp_path):
    killed = "import os, signal; os.kill(os.getpid(), signal.SIGTERM)"
    begun = time.monotonic()
    commands = [python("killed", killed), python("sleeps", "import time; time.sleep(30)")]
    codes, number = run_side_by_side([*commands, *commands], [{}, {}])
    assert codes == {"killed": -15, "sleeps": -15} and number == signal.SIGTERM
    assert time.monotonic() - begun < 20
