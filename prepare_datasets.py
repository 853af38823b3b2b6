"""Writes the five tasks in one format, {"instruction", "input", "output"}, to data/full/.

The sets come from the Hugging Face hub, or from a folder laid out like it (--raw_dir).
"""

import hashlib
import json
import random
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from configs.command_line import Knobs, UserError, knob, parse_dataclasses
from configs.ending import command_line
from tasks import TASKS
from tasks.source import Drop, Source, WrongShape
from training.saving import atomic_file, file_sha256, write_json
from utils_data import read_jsonl

TOY_CHARS = 400


@dataclass
class PrepareConfig(Knobs):
    """What to prepare, and how much of it."""

    tasks: list[str] = knob(list(TASKS), "the tasks to prepare", not_empty=True)
    raw_dir: str = knob("", "folder laid out like the hub, OWNER/NAME/..., tried first; empty: hub")
    data_dir: str = knob("data", "the files go to its sub-folder full/")
    tool_dataset: Literal["glaive", "xlam"] = knob(
        "glaive", "source of tool calling; xlam needs access requested on the hub"
    )
    max_samples_per_task: int = knob(0, "a random choice of so many samples; 0: all", at_least=0)
    max_chars: int = knob(
        6000, "longer samples, all three texts together, are dropped; 0: none", at_least=0
    )
    seed: int = knob(42, "of the order and the choice of samples")
    toy: bool = knob(
        False, f"only sample toy files (texts under {TOY_CHARS} characters) from full/"
    )
    toy_dir: str = knob("", "with --toy: the folder that gets T*.jsonl")
    toy_samples: int = knob(80, "with --toy: samples per task", at_least=1)
    overwrite: bool = knob(False, "replace files that are there already")

    def problems(self):
        found = super().problems()
        if not set(self.tasks) <= set(TASKS):
            found.append(f"--tasks: give some of {', '.join(TASKS)}")
        if self.toy and not self.toy_dir:
            found.append("--toy needs --toy_dir, the folder that gets the files")
        if self.raw_dir and not Path(self.raw_dir).is_dir():
            found.append(f"--raw_dir {self.raw_dir}: there is no such folder")
        return found

    def path(self, task: str) -> Path:
        """The full file of `task`."""
        return Path(self.data_dir) / "full" / f"{task}_full.jsonl"


def sources(cfg: PrepareConfig, task: str) -> list[Source]:
    """The sets that make up `task`."""
    choices = TASKS[task].sources
    return choices.get(cfg.tool_dataset) or next(iter(choices.values()))


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
                raise Drop(f"also in {TASKS[task].overlaps}")
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
        other = TASKS[task].overlaps
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
