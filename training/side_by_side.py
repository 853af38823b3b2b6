"""Several commands at a time, each in a place of its own: a GPU, or a share of the CPU."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from configs.command_line import UserError
from configs.ending import STOPPING
from training.device import gpus_by_free_memory

# Exit codes of a command that was told to stop: by itself, or before it could say so.
STOPPED = {code: n for n in (signal.SIGINT, *STOPPING) for code in (128 + n, -n)}
# From one look at the running commands to the next.
SECONDS_TO_LOOK = 0.2


@dataclass
class Command:
    """What is run: its name for the user, its words, and the file that takes what it prints.

    Without a file it prints here.
    """

    name: str
    argv: list[str]
    output: Path | None = None


class _Running:
    """A command at work in `place`, and the line that tells how far it is."""

    def __init__(self, command: Command, place: dict[str, str], row: int):
        self.command, self.place, self.row = command, place, row
        self._told: set[int] = set()
        self._file = open(command.output, "ab") if command.output else None
        self._start = self._file.tell() if self._file else 0
        self.process = subprocess.Popen(
            command.argv,
            env={**os.environ, **place},
            stdout=self._file,
            stderr=subprocess.STDOUT if self._file else None,
        )
        is_shown = self._file and sys.stderr.isatty()
        options = {"bar_format": "{desc}", "leave": False, "dynamic_ncols": True}
        self._bar = tqdm(total=0, position=row, disable=not is_shown, **options)

    def tell(self, number: int) -> None:
        # Of Ctrl-C the terminal has told it too, and a second one would kill it.
        if number != signal.SIGINT and number not in self._told:
            self._told.add(number)
            self.process.send_signal(number)

    def stop(self) -> None:
        self.tell(signal.SIGTERM)
        self.process.wait()

    def show(self) -> None:
        if not self._bar.disable:
            last = (self._printed() or ["..."])[-1]
            self._bar.set_description_str(f"{self.command.name}: {last}")

    def end(self, code: int) -> None:
        """Says how it ended, where it has not said so here itself."""
        self._bar.close()
        if self._file is None:
            return
        self._file.close()
        said = "stopped" if code in STOPPED else f"failed ({code})" if code else "done"
        print(f"{self.command.name}: {said}", flush=True)
        if code and code not in STOPPED:
            printed = self._printed()
            for line in [line for line in printed if line.startswith("error")] or printed[-1:]:
                print(f"{self.command.name}: {line}", file=sys.stderr)

    def _printed(self) -> list[str]:
        """The last lines that it printed."""
        with open(self.command.output, "rb") as file:
            file.seek(max(self._start, file.seek(0, os.SEEK_END) - 4096))
            text = file.read().decode(errors="replace")
        return [line for line in text.splitlines() if line.strip()]


@contextlib.contextmanager
def _received():
    """Within the block signals that ask to stop are put into the list that it yields."""
    received: list[int] = []
    before = {
        number: signal.signal(number, lambda number, _: received.append(number))
        for number in (signal.SIGINT, *STOPPING)
        # As by nohup.
        if signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def find_places(jobs: int, device: str) -> list[dict[str, str]]:
    """The environment of each of `jobs` commands at a time, which run with `--device device`.

    One alone is left to choose. Raises `UserError` where there are not as many GPUs.
    """
    if jobs == 1:
        return [{}]
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device {device}: with --jobs {jobs} give auto, cuda or cpu")
    has_gpu = device != "cpu" and torch.cuda.is_available()
    if not has_gpu and device != "cuda":
        # "4,2": two more for each of the four; we nest none.
        asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
        threads = int(asked) if asked.isdecimal() else torch.get_num_threads()
        return [{"OMP_NUM_THREADS": str(max(1, threads // jobs))}] * jobs
    gpus = gpus_by_free_memory() if has_gpu else []
    if len(gpus) < jobs:
        raise UserError(f"--jobs {jobs}: there are {len(gpus)} GPUs; give at most one job a GPU")
    return [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in gpus[:jobs]]


def run_side_by_side(commands: list[Command], places: list[dict[str, str]]):
    """Runs `commands` in this order, one in each of `places` at a time.

    Returns ({name: exit code} of those that ended, the signal that asked to stop or 0). A command
    that fails stops no other. Told to stop, or where a command was, the others are told too and
    waited for until they have saved, and none is begun.
    """
    waiting, free, running = deque(commands), list(enumerate(places)), []
    codes: dict[str, int] = {}
    with _received() as received, contextlib.ExitStack() as stack:
        # After a fault of ours too.
        stack.callback(lambda: [job.stop() for job in running])
        while running or (waiting and not received):
            while waiting and free and not received:
                command, (row, place) = waiting.popleft(), free.pop(0)
                print(f"{command.name}: starting", flush=True)
                running.append(_Running(command, place, row))
            time.sleep(SECONDS_TO_LOOK)
            for job in list(running):
                for number in set(received):
                    job.tell(number)
                code = job.process.poll()
                if code is None:
                    job.show()
                    continue
                job.end(code)
                codes[job.command.name] = code
                running.remove(job)
                free.append((job.row, job.place))
                if code in STOPPED and not received:
                    received.append(signal.SIGTERM if running else STOPPED[code])
        return codes, received[0] if received else 0
