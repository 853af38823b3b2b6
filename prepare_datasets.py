"""Writes the five tasks in one format, {"instruction", "input", "output"}, to data/full/.

The sets come from the Hugging Face hub, or from a folder laid out like it (--raw_dir).
"""

import hashlib
import json
import random
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from configs.base_config import TASKS, UserError, command_line, knob, parse_dataclasses
from training.saving import atomic_file, file_sha256, write_json
from utils_data import KEYS, read_jsonl, tool_input

# A row of one is a copy of the other's: general instructions hold code tasks too.
OVERLAPPING = {"T1_general": "T3_code", "T3_code": "T1_general"}
TOY_CHARS = 400


@dataclass
class PrepareConfig:
    """What to prepare, and how much of it."""

    tasks: list[str] = knob(list(TASKS), "the tasks to prepare")
    raw_dir: str = knob("", "folder laid out like the hub, OWNER/NAME/..., tried first; empty: hub")
    data_dir: str = knob("data", "the files go to its sub-folder full/")
    tool_dataset: Literal["glaive", "xlam"] = knob(
        "glaive", "source of T4_tool; xlam needs access requested on the hub"
    )
    max_samples_per_task: int = knob(0, "a random choice of so many samples; 0: all")
    max_chars: int = knob(6000, "longer samples, all three texts together, are dropped; 0: none")
    seed: int = knob(42, "of the order and the choice of samples")
    toy: bool = knob(
        False, f"only sample toy files (texts under {TOY_CHARS} characters) from full/"
    )
    toy_dir: str = knob("", "with --toy: the folder that gets T*.jsonl")
    toy_samples: int = knob(80, "with --toy: samples per task")
    overwrite: bool = knob(False, "replace files that are there already")

    def __post_init__(self):
        problems = []
        if not self.tasks or not set(self.tasks) <= set(TASKS):
            problems.append(f"--tasks: give some of {', '.join(TASKS)}")
        for name, least in (("max_samples_per_task", 0), ("max_chars", 0), ("toy_samples", 1)):
            if getattr(self, name) < least:
                problems.append(f"--{name} {getattr(self, name)}: give {least} or more")
        if self.toy and not self.toy_dir:
            problems.append("--toy needs --toy_dir, the folder that gets the files")
        if self.raw_dir and not Path(self.raw_dir).is_dir():
            problems.append(f"--raw_dir {self.raw_dir}: there is no such folder")
        if problems:
            raise UserError("\n".join(problems))

    def path(self, task: str) -> Path:
        """The full file of `task`."""
        return Path(self.data_dir) / "full" / f"{task}_full.jsonl"


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
    """The columns of `row`; raises WrongShape where one is missing or no text."""
    for column in columns:
        if not isinstance(row.get(column), str):
            raise WrongShape(f"column {column} is missing or no text")
    return [row[column] for column in columns]


def convert_alpaca(row: dict) -> Sample:
    """tatsu-lab/alpaca and sahil2801/CodeAlpaca-20k; many spellings of "no input" become ""."""
    instruction, given, output = texts(row, "instruction", "input", "output")
    # "No input", "<noinput>", "`< noinput >`.", "No input required.", "N/A" ... Signs alone stay:
    # they are Morse code, brackets to balance, an operator to classify.
    if re.fullmatch(r"\W*(no[\s_-]?inputs?( \w+ed)?|none|n/a)\W*", given, re.IGNORECASE):
        given = ""
    return Sample(instruction, given, output)


def convert_dolly(row: dict) -> Sample:
    """databricks/databricks-dolly-15k: context is the input; Wikipedia's citation marks go."""
    instruction, context, response = texts(row, "instruction", "context", "response")
    # This takes x[3] too, but not x[0]: dolly has many marks, from 1 on, and hardly any code.
    context, response = (
        re.sub(r"(?<=[\w.,;:)\"'])(\[[1-9]\d*\])+", "", text) for text in (context, response)
    )
    return Sample(instruction, context, response)


def convert_gsm8k(row: dict) -> Sample:
    """openai/gsm8k: the calculator's <<48/2=24>> notes go, the last line "#### 24" stays.

    No input: a constant one would tell a router the task.
    """
    question, answer = texts(row, "question", "answer")
    answer = re.sub(r"<<[^<>]*>>", "", answer)
    if not re.search(r"(?m)^#### \S+\s*\Z", answer):
        raise WrongShape("no final #### answer")
    return Sample(question, "", answer)


def tool_sample(request: str, tools, calls, history: str = "") -> Sample:
    """The one form of every tool-calling source: schemas in the input, a JSON list of calls out.

    Without the schemas the names could not be known and memory alone would be measured.
    """
    if not isinstance(tools, list) or not isinstance(calls, list):
        raise WrongShape("tools or calls are no list")
    if not calls:
        raise Drop("no call")
    names = [tool.get("name") for tool in tools if isinstance(tool, dict)]
    output = []
    for call in calls:
        match call:
            case {"name": str(name), "arguments": dict(arguments)}:
                output.append({"name": name, "arguments": arguments})
            case _:
                raise WrongShape("call is not readable")
        if name not in names:
            raise WrongShape("call of a function that is not offered")
    try:
        offered = tool_input(tools)
        answer = json.dumps(output, ensure_ascii=False, allow_nan=False)
        # An escape such as \ud83d alone decodes to what no UTF-8 file can hold.
        (offered + answer).encode()
    except ValueError:
        raise WrongShape("tools or calls are no JSON") from None
    return Sample(request, f"{offered}\n\n{history}", answer)


def convert_xlam(row: dict) -> Sample:
    """Salesforce/xlam-function-calling-60k: answers and tools are JSON in strings."""
    query, answers, tools = texts(row, "query", "answers", "tools")
    try:
        return tool_sample(query, json.loads(tools), json.loads(answers))
    except ValueError:
        raise WrongShape("tools or calls are no JSON") from None


def convert_glaive(row: dict) -> Sample:
    """glaiveai/glaive-function-calling-v2: a dialogue's first call and the message before it.

    What was said before that message of the user follows the schemas in the input.
    """
    system, chat = texts(row, "system", "chat")
    call = re.search(r"<functioncall>\s*(.*?)\s*(?:<\|endoftext\|>|\Z)", chat, re.DOTALL)
    if not call:
        raise Drop("no call")
    turns = re.split(r"(?:\A|\n)\s*(USER|ASSISTANT|FUNCTION RESPONSE):", chat[: call.start()])
    said = [
        (role, text.replace("<|endoftext|>", "").strip())
        for role, text in zip(turns[1::2], turns[2::2], strict=True)
    ]
    # The call's own turn may open with words to the user.
    users = [i for i, (role, _) in enumerate(said) if role == "USER"]
    if not users:
        raise WrongShape("no user message before the call")
    history = "\n".join(f"{role}: {text}" for role, text in said[: users[-1]])
    return tool_sample(
        said[users[-1]][1], glaive_schemas(system), [glaive_call(call.group(1))], history
    )


def glaive_schemas(system: str) -> list[dict]:
    """The schemas in a system message: JSON objects that follow each other without commas."""
    decoder, schemas, position = json.JSONDecoder(), [], system.find("{")
    try:
        while position >= 0:
            schema, end = decoder.raw_decode(system, position)
            schemas.append(schema)
            position = system.find("{", end)
    except ValueError:
        raise WrongShape("schemas are not readable") from None
    return schemas


def glaive_call(text: str) -> dict:
    """A call, whose arguments are JSON in single quotes: {"name": "f", "arguments": '{"a": 1}'}."""
    parts = re.fullmatch(
        r'\{\s*"name":\s*"([^"]*)"\s*,\s*"arguments":\s*(.*?)\s*\}', text, re.DOTALL
    )
    if not parts:
        raise WrongShape("call is not readable")
    name, arguments = parts.groups()
    if arguments[:1] == "'" == arguments[-1:]:
        arguments = arguments[1:-1].replace("\\'", "'")
    try:
        return {"name": name, "arguments": json.loads(arguments)}
    except ValueError:
        raise WrongShape("call is not readable") from None


def convert_hh(row: dict) -> Sample:
    """Anthropic/hh-rlhf: the chosen transcript's last reply, and the dialogue before it.

    A dialogue occurs at several depths: its key is the first thing said, or copies would straddle
    the held-out split.
    """
    (chosen,) = texts(row, "chosen")
    dialogue, mark, reply = chosen.rpartition("\n\nAssistant:")
    turns = re.split(r"\n\n(Human|Assistant): ?", dialogue)
    roles, said = turns[1::2], [text.strip() for text in turns[2::2]]
    if not mark or turns[0].strip() or not roles:
        raise WrongShape("no dialogue")
    if roles != ["Human", "Assistant"] * (len(roles) // 2) + ["Human"]:
        raise WrongShape("turns do not alternate")
    if not all(said):
        raise WrongShape("empty turn")
    if "\n\nHuman:" in reply or " Human: " in reply:
        raise WrongShape("made-up turn in the reply")
    spoken = [f"{role}: {text}" for role, text in zip(roles, said, strict=True)]
    return Sample(said[-1], "\n\n".join(spoken[:-1]), reply.lstrip(), key=said[0].casefold())


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


SOURCES = {
    "T1_general": [
        Source("tatsu-lab/alpaca", convert_alpaca),
        Source("databricks/databricks-dolly-15k", convert_dolly),
    ],
    "T2_math": [Source("openai/gsm8k", convert_gsm8k, "main")],
    "T3_code": [Source("sahil2801/CodeAlpaca-20k", convert_alpaca)],
    # T4_tool is one of these, see tool_dataset.
    "glaive": [Source("glaiveai/glaive-function-calling-v2", convert_glaive)],
    "xlam": [Source("Salesforce/xlam-function-calling-60k", convert_xlam, "dataset")],
    "T5_safety": [Source("Anthropic/hh-rlhf", convert_hh, data_dir="harmless-base")],
}


def sources(cfg: PrepareConfig, task: str) -> list[Source]:
    """The sets that make up `task`."""
    return SOURCES[cfg.tool_dataset if task == "T4_tool" else task]


def prepare(cfg: PrepareConfig, task: str, taken: set) -> tuple[str, dict]:
    """The file of `task` as text, and its entry in the manifest.

    `taken` holds the (instruction, input) of another task's rows, which are dropped here.
    """
    rows, origin = [], {}
    for source in sources(cfg, task):
        loaded, origin[source.hub_id] = source.load(cfg.raw_dir)
        rows += [(source.convert, row) for row in loaded]
    # All sources in one shuffle: any first part of it holds them in proportion.
    random.Random(f"{cfg.seed}/{task}").shuffle(rows)
    samples, keys, dropped, malformed = [], set(), Counter(), 0
    for convert, row in tqdm(rows, desc=task, unit="row", disable=not sys.stderr.isatty()):
        try:
            sample = convert(row)
            length = len(sample.instruction) + len(sample.input) + len(sample.output)
            if cfg.max_chars and length > cfg.max_chars:
                raise Drop("longer than max_chars")
            if (sample.instruction, sample.input) in taken:
                raise Drop(f"also in {OVERLAPPING[task]}")
            if sample.key in keys:
                raise Drop("duplicate")
            keys.add(sample.key)
            if cfg.max_samples_per_task and len(samples) == cfg.max_samples_per_task:
                raise Drop("beyond max_samples_per_task")
            samples.append(sample)
        except Drop as reason:
            dropped[str(reason)] += 1
            malformed += isinstance(reason, WrongShape)
    if not samples or malformed > len(rows) / 2:
        raise UserError(
            f"{task}: {len(rows)} rows of {', '.join(origin)} gave {len(samples)} samples "
            f"({dict(dropped.most_common(3))}); is this the set in its usual form?"
        )
    text = "".join(json.dumps(sample.row(), ensure_ascii=False) + "\n" for sample in samples)
    return text, {
        **settings(cfg, task),
        "from": origin,
        "rows_read": len(rows),
        "dropped": dict(dropped.most_common()),
        "written": len(samples),
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
    }


def settings(cfg: PrepareConfig, task: str) -> dict:
    """What decides the content of a task's file, beside the sources themselves."""
    return {
        "sources": [source.hub_id for source in sources(cfg, task)],
        "seed": cfg.seed,
        "max_chars": cfg.max_chars,
        "max_samples_per_task": cfg.max_samples_per_task,
    }


def is_prepared(cfg: PrepareConfig, task: str, entry: dict) -> bool:
    """Whether an earlier run with these settings has written the file, and nobody changed it."""
    same = all(entry.get(name) == value for name, value in settings(cfg, task).items())
    return same and cfg.path(task).exists() and file_sha256(cfg.path(task)) == entry["sha256"]


def refuse_existing(paths: list[Path]) -> None:
    """Raises `UserError` for every file that is there."""
    found = [path for path in paths if path.exists()]
    if found:
        raise UserError(
            "\n".join(f"{path} exists: give --overwrite to replace it" for path in found)
        )


def prepare_full(cfg: PrepareConfig) -> None:
    """Writes data/full/ and its manifest; a source that fails leaves the other tasks whole.

    A task that an earlier run has finished with the same settings is left as it is.
    """
    manifest_path = Path(cfg.data_dir) / "full" / "manifest.json"
    try:
        manifest = dict(json.loads(manifest_path.read_text("utf-8")))
    except FileNotFoundError:
        manifest = {}
    except (ValueError, TypeError):
        raise UserError(f"{manifest_path} is no manifest: remove it, it is written anew") from None
    asked = [task for task in TASKS if task in cfg.tasks]
    if not cfg.overwrite:
        done = [task for task in asked if is_prepared(cfg, task, manifest.get(task, {}))]
        for task in done:
            print(f"{task} is prepared: {manifest[task]['written']} samples")
        asked = [task for task in asked if task not in done]
        refuse_existing([cfg.path(task) for task in asked])
    if asked:
        print(f"{'task':<11}{'read':>9}{'dropped':>9}{'written':>9}  reasons")
    problems = []
    for number, task in enumerate(asked, 1):
        other = OVERLAPPING.get(task)
        try:
            taken = set()
            if other and other not in asked[number:] and cfg.path(other).exists():
                taken = {(row["instruction"], row["input"]) for row in read_jsonl(cfg.path(other))}
            text, entry = prepare(cfg, task, taken)
        except UserError as error:
            problems.append(str(error))
            continue
        manifest[task] = entry
        # The manifest first: a run that is killed between the two does the task again.
        write_json(manifest_path, {name: manifest[name] for name in TASKS if name in manifest})
        with atomic_file(cfg.path(task)) as file:
            file.write(text)
        read, written, dropped = map(entry.get, ("rows_read", "written", "dropped"))
        reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
        print(f"{task:<11}{read:>9}{read - written:>9}{written:>9}  {reasons}".rstrip())
    if problems:
        raise UserError("\n".join(problems))


def sample_toy(cfg: PrepareConfig) -> None:
    """Samples short rows of data/full/ into `cfg.toy_dir`."""
    targets = {task: Path(cfg.toy_dir) / f"{task}.jsonl" for task in cfg.tasks}
    if not cfg.overwrite:
        refuse_existing(list(targets.values()))
    full = [(target, task, read_jsonl(cfg.path(task))) for task, target in targets.items()]
    for target, task, rows in full:
        short = [row for row in rows if sum(map(len, row.values())) < TOY_CHARS]
        if len(short) < cfg.toy_samples:
            short = sorted(rows, key=lambda row: sum(map(len, row.values())))[: cfg.toy_samples]
        chosen = random.Random(f"{cfg.seed}/{task}").sample(short, min(cfg.toy_samples, len(short)))
        with atomic_file(target) as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in chosen)
        print(f"{target}: {len(chosen)} of {len(rows)} rows")


@command_line
def main(argv=None):
    (cfg,) = parse_dataclasses(argv, PrepareConfig, description=__doc__)
    try:
        sample_toy(cfg) if cfg.toy else prepare_full(cfg)
    except OSError as error:
        raise UserError(f"{error}: give a folder with room that may be written") from error


if __name__ == "__main__":
    sys.exit(main())
