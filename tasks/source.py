"""Where a task's rows come from: sets on the hub, and samples made of their rows."""

import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from configs.command_line import UserError
from utils_data import KEYS


class Drop(Exception):
    """A row that cannot be used; the message is the reason that is counted."""


class WrongShape(Drop):
    """A row that its source should not hold; a set with mostly such rows is not the one meant."""


@dataclass
class Sample:
    """One line of the output; of samples with the same `key` only the first is kept."""

    instruction: str
    input: str
    output: str
    key: object = None

    def __post_init__(self):
        self.instruction, self.input = self.instruction.strip(), self.input.strip()
        # A leading-space strip would break indented code.
        self.output = self.output.lstrip("\r\n").rstrip()
        if not self.instruction:
            raise WrongShape("empty instruction")
        if not self.output:
            raise WrongShape("empty output")
        if self.key is None:
            self.key = self.instruction, self.input

    def row(self) -> dict[str, str]:
        return {key: getattr(self, key) for key in KEYS}


def texts(row: dict, *columns: str) -> list[str]:
    """The columns of `row`, null as ""; raises WrongShape where one is missing or no text."""
    found = [row.get(column, column) for column in columns if column in row]
    for column in columns:
        if not isinstance(row.get(column, 0), str | None):
            raise WrongShape(f"column {column} is missing or no text")
    return [text or "" for text in found]


@dataclass
class Source:
    """A set on the hub, with the arguments of `load_dataset`, and what converts its rows."""

    hub_id: str
    convert: Callable[[dict], Sample]
    config: str | None = None
    data_dir: str | None = None

    def load(self, raw_dir: str) -> tuple[list[dict], str]:
        """(rows, "raw" or "hub"). Raises `UserError` that names the set and the cure."""
        # Slow to import, and only needed here.
        from datasets import disable_progress_bars, load_dataset
        from datasets.exceptions import DatasetsError

        if not sys.stderr.isatty():
            disable_progress_bars()
        folder = Path(raw_dir) / self.hub_id
        place = "raw" if raw_dir and folder.is_dir() else "hub"
        where = str(folder) if place == "raw" else self.hub_id
        try:
            # A cache of its own for a local folder: datasets would not see that a file has changed.
            with tempfile.TemporaryDirectory() as fresh:
                cache = fresh if place == "raw" else None
                rows = load_dataset(
                    where, self.config, data_dir=self.data_dir, split="train", cache_dir=cache
                )
                return rows.to_list(), place
        except (OSError, ValueError, DatasetsError) as error:
            reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            cure = "mend or remove that folder"
            if place == "hub":
                cure = (
                    "check the network or set HF_ENDPOINT to a mirror; where it is gated, request "
                    f"access at https://huggingface.co/datasets/{self.hub_id} and run `hf auth "
                    "login`; or give --raw_dir"
                )
            raise UserError(f"{self.hub_id} cannot be read ({reason}): {cure}") from error
