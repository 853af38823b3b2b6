"""How a script ends."""

import os
import signal
import time

from configs.ending import command_line


def test_a_signal_in_a_destructor_stops_the_script_and_prints_no_traceback(capsys):
    class Stopping:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0)

    @command_line
    def main(argv=None):
        thing = Stopping()
        del thing
        time.sleep(10)

    started = time.monotonic()
    assert main([]) == 143
    assert time.monotonic() - started < 5
    assert "Traceback" not in capsys.readouterr().err
