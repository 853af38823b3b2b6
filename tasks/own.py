"""Rows of the user's own in the formats that people have, as our samples.

JSON array or lines, CSV, Parquet, a folder or a hub id; see `FORMS` for the columns.
"""

import csv
import io
import json
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from configs.command_line import UserError
from tasks.prompt import REJECTED
from tasks.source import Sample, Source, WrongShape, without_placeholders

# Each of our columns by the names that it has elsewhere; the first that is there is read.
NAMES = {
    "instruction": ("instruction", "prompt", "question", "query"),
    "input": ("input", "context"),
    "output": ("output", "response", "completion", "answer"),
}
TURNS = ("messages", "conversations")
# Said to the model before the row's own prompt, where such a column is there too.
BEFORE = ("system", "history")
FORMS = (
    "instruction, input, output; prompt and response, completion or answer; question and answer; "
    "messages or conversations (role and content, or from and value)"
)
ROLES = {
    **dict.fromkeys(("system", "developer"), "System"),
    **dict.fromkeys(("user", "human"), "Human"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "chatgpt"), "Assistant"),
}


def read_rows(path: str, split: str) -> list:
    """The rows of a file, of a folder, or of a set on the hub, as values of JSON.

    `split`: of a folder or set. Raises `UserError` where they cannot be read.
    """
    file = Path(path)
    if not file.is_file():
        if not file.exists() and file.suffix.lower() in (".json", ".jsonl", ".csv", ".parquet"):
            raise UserError(f"{path}: there is no such file")
        # As a raw folder where it is one, else from the hub.
        raw, name = (str(file.parent), file.name) if file.is_dir() else ("", path)
        return Source(name, Sample, split=split).load(raw or "")[0]
    try:
        with open(file, "rb") as opened:
            is_parquet = opened.read(4) == b"PAR1"
        if is_parquet:
            import pyarrow.parquet

            return pyarrow.parquet.read_table(file).to_pylist()
        text = file.read_text(encoding="utf-8-sig")
        if file.suffix.lower() in (".csv", ".tsv"):
            return _csv_rows(text, "\t" if file.suffix.lower() == ".tsv" else ",")
        return _json_rows(text)
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"{path} cannot be read ({reason}): give JSON (an array, or one object a line), CSV, "
            "Parquet, a folder or a hub id"
        ) from error


def _csv_rows(text: str, delimiter: str) -> list[dict]:
    # A cell may be a whole article.
    csv.field_size_limit(2**31 - 1)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
    return [{k: v for k, v in row.items() if k is not None} for row in reader]


def _json_rows(text: str) -> list:
    if text.lstrip().startswith("["):
        return json.loads(text)
    # Not splitlines(): U+2028 is legal inside strings.
    lines = [line for line in text.split("\n") if line.strip()]
    try:
        return [json.loads(line) for line in lines]
    except ValueError:
        # One object over many lines: a row, or what holds the rows.
        whole = json.loads(text)
        if not whole.keys().isdisjoint(TURNS):
            return [whole]
        lists = [value for value in whole.values() if isinstance(value, list)]
        if len(lists) != 1:
            raise
        return lists[0]


@dataclass
class OwnFile:
    """A file of the user's own as a source; `columns` says which of its columns are ours."""

    hub_id: str
    path: str
    columns: dict[str, str] = field(default_factory=dict)
    split: str = "train"
    read: dict[str, str] = field(default_factory=dict)

    def load(self, raw_dir: str) -> tuple[list, str]:
        """(rows, "own"). Raises `UserError` where none has the columns of a form that is known."""
        rows = read_rows(self.path, self.split)
        found = Counter(name for row in rows if isinstance(row, dict) for name in row)
        if missing := set(self.columns.values()) - set(found):
            raise UserError(f"{self.path}: there is no column {missing.pop()}; {_told(found)}")
        turns = next((name for name in TURNS if name in found), "")
        if turns and not self.columns:
            self.read = {"messages": turns}
        else:
            candidates = {
                ours: [self.columns[ours]] if ours in self.columns else names
                for ours, names in NAMES.items()
            }
            first = {o: next((n for n in ns if n in found), "") for o, ns in candidates.items()}
            self.read = {ours: name for ours, name in first.items() if name}
        if "messages" not in self.read and not {"instruction", "output"} <= set(self.read):
            raise UserError(
                f"{self.path}: {_told(found)}; known are {FORMS}; or name them: --columns "
                "instruction=... input=... output=..."
            )
        used = {*self.read.values(), *BEFORE, REJECTED}
        if others := [name for name in found if name not in used and found[name]]:
            print(f"{self.path}: columns that are not read: {', '.join(others)}", file=sys.stderr)
        return rows, "own"

    def convert(self, row) -> Sample:
        """A sample of one row; raises `Drop`."""
        if not isinstance(row, dict) or not any(value is not None for value in row.values()):
            raise WrongShape("empty row")
        if "messages" in self.read:
            said = _turns(row.get(self.read["messages"]))
            before, (instruction, output) = said[:-2], [text for _, text in said[-2:]]
            given = ""
        else:
            before = []
            instruction, given, output = (
                _text(row.get(self.read.get(ours)), ours) for ours in NAMES
            )
        given, output = without_placeholders(given, output)
        system, history = (row.get(name) for name in BEFORE)
        before = [*_history(history), *before]
        if isinstance(system, str) and system.strip():
            before.insert(0, ("System", system.strip()))
        earlier = [text if role == "System" else f"{role}: {text}" for role, text in before]
        worse = row.get(REJECTED)
        return Sample(
            instruction,
            "\n\n".join(filter(None, [*earlier, given])),
            output,
            rejected=worse.strip() if isinstance(worse, str) else "",
        )


def _told(found: Counter) -> str:
    return f"its columns are {', '.join(map(str, found)) or 'none'}"


def _text(value, column: str) -> str:
    """A cell as text: null is "", a number is its digits."""
    if value is None:
        return ""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise WrongShape(f"{column} is no text")
    return value


def _turns(messages) -> list[tuple[str, str]]:
    """(role, text) up to the last reply, which follows what a user said."""
    if isinstance(messages, str):
        try:
            messages = json.loads(messages)
        except (ValueError, RecursionError):
            raise WrongShape("messages are no list") from None
    if not isinstance(messages, list):
        raise WrongShape("messages are no list")
    said = []
    for message in messages:
        if not isinstance(message, dict):
            raise WrongShape("a message is no object")
        role = str(message.get("role") or message.get("from") or "").lower()
        content = message.get("content", message.get("value"))
        if isinstance(content, list):
            # Parts of a message; only text is known here.
            content = [part.get("text") for part in content if isinstance(part, dict)]
            content = "\n".join(map(str, content)) if all(content) else None
        if not role or not isinstance(content, str):
            raise WrongShape("a message has no role or no text")
        said.append((ROLES.get(role, role.capitalize()), content.strip()))
    while said and said[-1][0] != "Assistant":
        said.pop()
    if len(said) < 2 or said[-2][0] != "Human":
        raise WrongShape("no reply to a user")
    return said


def _history(history) -> list[tuple[str, str]]:
    """Earlier turns as pairs of a prompt and a reply."""
    if not history:
        return []
    if not isinstance(history, list) or not all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(t, str) for t in pair)
        for pair in history
    ):
        raise WrongShape("history is no list of pairs")
    return [turn for pair in history for turn in zip(("Human", "Assistant"), pair, strict=True)]
