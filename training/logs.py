"""Logs of a run: one JSON object a line, which a resumed run goes on with."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

from configs.command_line import UserError
from training.saving import is_same_file


class JsonlLog:
    """Appends one JSON object a line and flushes it; numbers must be finite or null.

    Args:
        written: {"size", "sha256"} of what a saved state knows to be there. Lines beyond it are
            cut: they come from after that state.
        also: called with each line that is written.
    """

    def __init__(
        self,
        path: str | Path,
        written: dict | None = None,
        also: Callable[[dict], None] = lambda row: None,
    ):
        path, size, self._also = Path(path), (written or {}).get("size", 0), also
        path.parent.mkdir(parents=True, exist_ok=True)
        found = path.stat().st_size if path.exists() else 0
        if found < size:
            raise UserError(
                f"{path} has {found} bytes and the saved state counts on {size}: put the log back, "
                "or give --overwrite true to start afresh"
            )
        self._digest = hashlib.sha256()
        if size:
            with open(path, "rb") as file:
                self._digest.update(file.read(size))
        if written and self._digest.hexdigest() != written["sha256"]:
            raise UserError(
                f"{path} is not what this run has written: put the log back, or give --overwrite "
                "true to start afresh"
            )
        self._file = open(path, "a", encoding="utf-8", newline="\n")
        self._file.truncate(size)

    def write(self, **row) -> None:
        """Raises ValueError where a number is not finite."""
        line = json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
        self._file.write(line)
        self._file.flush()
        self._digest.update(line.encode())
        self._also(row)

    def written(self) -> dict:
        """{"size", "sha256"} of what is written, which is on the disk when this returns.

        Raises `UserError` where the file that lines go to is no longer the one of its name.
        """
        os.fsync(self._file.fileno())
        here = os.fstat(self._file.fileno())
        if not is_same_file(self._file.name, here):
            raise UserError(
                f"{self._file.name} was removed or replaced during the run: put it back, or give "
                "--overwrite true to start afresh"
            )
        return {"size": here.st_size, "sha256": self._digest.hexdigest()}

    def read(self) -> list[dict]:
        """All lines so far."""
        with open(self._file.name, encoding="utf-8") as file:
            return [json.loads(line) for line in file]

    def close(self) -> None:
        self._file.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class NoLog:
    """A `JsonlLog` that writes nothing: that of every process but the first."""

    def __init__(self, path: str | Path, written: dict | None = None, also=None):
        pass

    def write(self, **row) -> None:
        pass

    def close(self) -> None:
        pass
