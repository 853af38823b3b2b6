"""Where a task's rows come from: sets on the hub, and samples made of their rows."""

import re
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from configs.command_line import UserError
from tasks.prompt import KEYS, REJECTED


class Drop(Exception):
    """A row that cannot be used; the message is the reason that is counted."""


class WrongShape(Drop):
    """A row that its source should not hold; a set with mostly such rows is not the one meant."""


@dataclass
class Sample:
    """One line of the output; of samples with the same `key` only the first is kept.

    `rejected` is a worse reply than the output; "" where there is none.
    """

    instruction: str
    input: str
    output: str
    key: object = None
    rejected: str = ""

    def __post_init__(self):
        self.instruction, self.input = self.instruction.strip(), self.input.strip()
        # A leading-space strip would break indented code.
        self.output = self.output.lstrip("\r\n").rstrip()
        if not self.instruction:
            raise WrongShape("empty instruction")
        if not self.output:
            raise WrongShape("empty output")
        try:
            "".join((self.instruction, self.input, self.output, self.rejected)).encode()
        except UnicodeEncodeError:
            # JSON can say it, and no file and no tokenizer can hold it.
            raise WrongShape("half a surrogate pair") from None
        if self.key is None:
            self.key = self.instruction, self.input

    def row(self) -> dict[str, str]:
        row = {key: getattr(self, key) for key in KEYS}
        return {**row, REJECTED: self.rejected} if self.rejected else row


def without_placeholders(given: str, output: str) -> tuple[str, str]:
    """Input and output of a row, "" where they say that there is none, in any spelling."""
    # "No input", "<noinput>", "`< noinput >`.", "No input required.", "N/A" ... Signs alone stay:
    # they are Morse code, brackets to balance, an operator to classify.
    if re.fullmatch(r"\W*(no[\s_-]?inputs?( \w+ed)?|none|n/a)\W*", given, re.IGNORECASE):
        given = ""
    # "<nooutput>" stands where an answer should.
    if re.fullmatch(r"\W*(no[\s_-]?outputs?( \w+ed)?|n/a)\W*", output, re.IGNORECASE):
        output = ""
    return given, output


def texts(row: dict, *columns: str) -> list[str]:
    """The columns of `row`, null as ""; raises WrongShape where one is missing or no text."""
    if not isinstance(row, dict) or not any(value is not None for value in row.values()):
        raise WrongShape("empty row")
    found = [row.get(column, column) for column in columns if column in row]
    for column in columns:
        if not isinstance(row.get(column, 0), str | None):
            raise WrongShape(f"column {column} is missing or no text")
    return [text or "" for text in found]


@dataclass
class Source:
    """A set on the hub, with the arguments of `load_dataset`, and what converts its rows.

    `license` is the hub's short name of its licence, "" where it is not known.
    """

    hub_id: str
    convert: Callable[[dict], Sample]
    config: str | None = None
    data_dir: str | None = None
    split: str = "train"
    license: str = ""

    def load(self, raw_dir: str) -> tuple[list[dict], str]:
        """(rows, "raw" or "hub"). Raises `UserError` that names the set and the cure."""
        # Slow to import, and only needed here.
        from datasets import disable_progress_bars, load_dataset
        from datasets.utils import logging

        logging.set_verbosity(logging.CRITICAL)  # What it would tell beside, our line says.
        if not sys.stderr.isatty():
            disable_progress_bars()
        folder = Path(raw_dir) / self.hub_id
        place = "raw" if raw_dir and folder.is_dir() else "hub"
        where = str(folder) if place == "raw" else self.hub_id
        config, data_dir = self.config, self.data_dir
        if place == "raw":
            config, data_dir = self._layout(folder)
        try:
            # A cache of its own for a local folder: datasets would not see that a file has changed.
            with tempfile.TemporaryDirectory() as fresh:
                cache = fresh if place == "raw" else None
                rows = load_dataset(
                    where, config, data_dir=data_dir, split=self.split, cache_dir=cache
                )
            return rows.to_list(), place
        except Exception as error:  # Its readers of others' files raise what they like.
            reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            cure = "mend or remove that folder"
            if place == "hub":
                cure = (
                    "check the network or set HF_ENDPOINT to a mirror; where it is gated, request "
                    f"access at https://huggingface.co/datasets/{self.hub_id} and run `hf auth "
                    "login`; or give --raw_dir"
                )
            raise UserError(f"{self.hub_id} cannot be read ({reason}): {cure}") from error

    def _layout(self, folder: Path) -> tuple[str | None, str | None]:
        """(config, data_dir) of a local folder: as the hub has it, or the files in it as they are.

        Without the hub's README a configuration is a folder of its name, or everything.
        """
        if self.data_dir and not (folder / self.data_dir).is_dir():
            raise UserError(
                f"{folder}: {self.data_dir}/ is missing there, which is the part to read"
            )
        if not self.config or self.config in _configs(folder):
            return self.config, self.data_dir
        is_folder = (folder / self.config).is_dir()
        return None, self.config if is_folder else self.data_dir


def _configs(folder: Path) -> list[str]:
    """The configurations that a local set has."""
    from datasets import get_dataset_config_names

    try:
        return get_dataset_config_names(str(folder))
    except Exception:  # What is wrong with the folder is told when its rows are read.
        return []
