"""Writes the five tasks in one format, {"instruction", "input", "output"}, to data/full/.

The sets come from the Hugging Face hub, or from a folder laid out like it (--raw_dir). With --own
files of your own are brought into that format instead, and with --suite a published suite.
"""

import contextlib
import hashlib
import json
import os
import random
import re
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from configs.command_line import Knobs, UserError, config_class, knob, parse_dataclasses
from configs.ending import command_line
from configs.task_files import NO_TASK, TASK_NAME
from models.reading import read_json
from tasks import TASKS
from tasks.own import OwnFile
from tasks.prompt import KEYS
from tasks.source import Drop, Source, WrongShape
from tasks.suites import SuiteFile, find_task_files
from training.saving import atomic_file, file_sha256, run_lock, write_json
from utils_data import read_jsonl

TOY_CHARS = 400
SUITES = ("long_sequence", "standard", "absa", "trace")


@dataclass
class PrepareConfig(Knobs):
    """What to prepare, and how much of it."""

    tasks: list[str] = knob(list(TASKS), "the tasks to prepare", not_empty=True)
    own: list[str] = knob(
        [],
        "instead: files of your own, law=law.csv or law.test=test.json: JSON, CSV, Parquet, a "
        "folder or a hub id",
    )
    columns: list[str] = knob(
        [], "with --own: columns of another name, instruction=question output=solution"
    )
    suite: Literal[("", *SUITES)] = knob(
        "", "instead: the tasks of a published suite, from its folder --raw_dir"
    )
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
        for entry in self.own:
            name, _, path = entry.partition("=")
            task = name.removesuffix(".test")
            if not re.fullmatch(TASK_NAME, task) or task in NO_TASK or not path:
                found.append(
                    f"--own {entry}: give NAME=FILE or NAME.test=FILE; a name has letters, digits, "
                    f"- and _, and is not {', '.join(NO_TASK)}"
                )
            elif task in TASKS:
                found.append(f"--own {entry}: {task} has sources of its own; give another name")
        for entry in self.columns:
            if not re.fullmatch(rf"({'|'.join(KEYS)})=.+", entry):
                found.append(f"--columns {entry}: give {', '.join(f'{k}=NAME' for k in KEYS)}")
        if self.columns and not self.own:
            found.append("--columns says what --own reads: give that too")
        if self.suite and not self.raw_dir:
            found.append(f"--suite {self.suite} needs --raw_dir, the folder that holds its tasks")
        if sum(map(bool, (self.own, self.suite, self.toy))) > 1:
            found.append("--own, --suite and --toy: give one of them")
        if self.raw_dir and not Path(self.raw_dir).is_dir():
            found.append(f"--raw_dir {self.raw_dir}: there is no such folder")
        return found

    def path(self, task: str) -> Path:
        """The full file of `task`."""
        return Path(self.data_dir) / "full" / f"{task}_full.jsonl"


@dataclass
class Job:
    """One file to write: its name in the manifest, and the sources of its rows.

    Attributes:
        overlaps: a task whose rows are dropped here.
        is_whole: a published file that stays as it is: in its order, with its long rows.
        is_test: a published test file, which keeps its duplicates too.
    """

    name: str
    path: Path
    sources: list
    overlaps: str = ""
    is_whole: bool = False
    is_test: bool = False
    settings: dict = field(default_factory=dict)

    def __post_init__(self):
        self.settings = {"sources": [source.hub_id for source in self.sources], **self.settings}

    def is_prepared(self, entry: dict) -> bool:
        """Whether a run with these settings has written the file, and nobody changed it."""
        return self._is_like(entry) and self._sha256() == entry.get("sha256")

    def is_cut_short(self, entry: dict) -> bool:
        """Whether such a run died just before it replaced the file."""
        return self._is_like(entry) and self._sha256() == entry.get("replaces", "")

    def _is_like(self, entry: dict) -> bool:
        return all(entry.get(name) == value for name, value in self.settings.items())

    def _sha256(self) -> str | None:
        return file_sha256(self.path) if self.path.exists() else None


def jobs_of(cfg: PrepareConfig) -> list[Job]:
    """What was asked for, in its order; `UserError` where a suite's files are not there."""
    if cfg.own:
        return own_jobs(cfg)
    if cfg.suite:
        return suite_jobs(cfg)
    asked = [task for task in TASKS if task in cfg.tasks]
    return [
        Job(task, cfg.path(task), sources(cfg, task), TASKS[task].overlaps, settings=limits(cfg))
        for task in asked
    ]


def own_jobs(cfg: PrepareConfig) -> list[Job]:
    columns, jobs = dict(entry.split("=", 1) for entry in cfg.columns), []
    for entry in cfg.own:
        name, _, path = entry.partition("=")
        task = name.removesuffix(".test")
        kind = "train" if name == task else "test"
        target = cfg.path(task).with_name(f"{task}_{'full' if kind == 'train' else 'test'}.jsonl")
        source = OwnFile(path, path, columns, kind)
        more = {"columns": columns, "source_sha256": sha256_of(path)}
        jobs.append(Job(name, target, [source], settings=limits(cfg) | more))
    return jobs


def suite_jobs(cfg: PrepareConfig) -> list[Job]:
    paths, jobs, problems = config_class(cfg.suite)().data_paths, [], []
    for task, of_task in paths.items():
        try:
            files = find_task_files(cfg.raw_dir, task)
        except UserError as error:
            problems.append(str(error))
            continue
        for kind, file in zip(("full", "test"), files, strict=True):
            name = task if kind == "full" else f"{task}.test"
            target = Path(of_task[kind].replace("{data_dir}", cfg.data_dir))
            source = SuiteFile(file.name, file)
            most = cfg.max_samples_per_task if kind == "full" else 0
            more = {"max_samples_per_task": most, "source_sha256": sha256_of(file)}
            more |= {"options_sha256": sha256_of(source.options_path)}
            kinds = {"is_whole": True, "is_test": kind == "test"}
            jobs.append(Job(name, target, [source], **kinds, settings=limits(cfg) | more))
    if not jobs:
        raise UserError("\n".join(problems))
    for problem in problems:
        print(f"warning: {problem}; left out", file=sys.stderr)
    return jobs


def sha256_of(path: str | Path) -> str | None:
    """Of a file; None of a folder or a set on the hub, which are taken to stay as they are."""
    return file_sha256(path) if Path(path).is_file() else None


def sources(cfg: PrepareConfig, task: str) -> list[Source]:
    """The sets that make up `task`."""
    choices = TASKS[task].sources
    return choices.get(cfg.tool_dataset) or next(iter(choices.values()))


def limits(cfg: PrepareConfig) -> dict:
    """What decides the content of a file, beside its sources."""
    return {
        "seed": cfg.seed,
        "max_chars": cfg.max_chars,
        "max_samples_per_task": cfg.max_samples_per_task,
    }


def prepare(cfg: PrepareConfig, job: Job, taken: set) -> tuple[str, dict]:
    """The file of `job` as text, and its entry in the manifest.

    `taken` holds the (instruction, input) of another task's rows, which are dropped here.
    """
    rows, origin, numbers = [], {}, {}
    for source in job.sources:
        loaded, origin[source.hub_id] = source.load(cfg.raw_dir)
        numbers[source.hub_id] = len(loaded)
        if not loaded:
            print(f"warning: {job.name}: {source.hub_id} holds no row", file=sys.stderr)
        rows += [(source.convert, row) for row in loaded]
    most, longest = job.settings["max_samples_per_task"], 0 if job.is_whole else cfg.max_chars
    if most or not job.is_whole:
        # All sources in one shuffle: any first part of it holds them in proportion.
        random.Random(f"{cfg.seed}/{job.name}").shuffle(rows)
    samples, keys, dropped, malformed = [], set(), Counter(), 0
    for convert, row in tqdm(rows, desc=job.name, unit="row", disable=not sys.stderr.isatty()):
        try:
            sample = convert(row)
            length = len(sample.instruction) + len(sample.input) + len(sample.output)
            if longest and length > longest:
                raise Drop("longer than max_chars")
            if (sample.instruction, sample.input) in taken:
                raise Drop(f"also in {job.overlaps}")
            if sample.key in keys and not job.is_test:
                raise Drop("duplicate")
            keys.add(sample.key)
            if most and len(samples) == most:
                raise Drop("beyond max_samples_per_task")
            samples.append(sample)
        except Drop as reason:
            dropped[str(reason)] += 1
            malformed += isinstance(reason, WrongShape)
    if not samples or malformed > len(rows) / 2:
        raise UserError(
            f"{job.name}: {len(rows)} rows of {', '.join(origin)} gave {len(samples)} samples "
            f"({dict(dropped.most_common(3))}); is this the set in its usual form?"
        )
    text = "".join(json.dumps(sample.row(), ensure_ascii=False) + "\n" for sample in samples)
    return text, {
        **job.settings,
        "from": origin,
        "rows_of": numbers,
        "rows_read": len(rows),
        "dropped": dict(dropped.most_common()),
        "written": len(samples),
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
    }


def refuse_existing(paths: list[Path]) -> None:
    """Raises `UserError` for every file that is there."""
    found = [path for path in paths if path.exists()]
    if found:
        raise UserError(
            "\n".join(f"{path} exists: give --overwrite to replace it" for path in found)
        )


def read_manifest(path: Path) -> dict:
    """Task -> what is known of its file."""
    if not os.path.lexists(path):
        return {}
    try:
        manifest = read_json(path)
        if not all(isinstance(entry["written"], int) for entry in manifest.values()):
            raise TypeError("an entry says nothing of what was written")
        return manifest
    except (ValueError, TypeError, LookupError, AttributeError):
        raise UserError(f"{path} is no manifest: remove it, it is written anew") from None


@contextlib.contextmanager
def held(folder: Path):
    """Within the block no other preparation writes to `folder`, and what a killed one left goes."""
    with run_lock([str(folder)], "prepare"):
        # Of `atomic_file`; with a process id in their names, of earlier versions.
        for pattern in (".*.jsonl.tmp", ".*.jsonl.*.tmp"):
            for left in folder.glob(pattern):
                left.unlink()
        yield


def prepare_full(cfg: PrepareConfig, jobs: list[Job]) -> None:
    """Writes the files and their manifest; a source that fails leaves the other tasks whole.

    A file that an earlier run has finished with the same settings is left as it is.
    """
    with held(jobs[0].path.parent):
        write_jobs(cfg, jobs)


def write_jobs(cfg: PrepareConfig, jobs: list[Job]) -> None:
    """As `prepare_full`, in a folder that is held."""
    manifest_path = jobs[0].path.parent / "manifest.json"
    manifest = read_manifest(manifest_path)
    if not cfg.overwrite:
        done = [job for job in jobs if job.is_prepared(manifest.get(job.name, {}))]
        for job in done:
            print(f"{job.name} is prepared: {manifest[job.name]['written']} samples")
        jobs = [job for job in jobs if job not in done]
        others = [job for job in jobs if not job.is_cut_short(manifest.get(job.name, {}))]
        refuse_existing([job.path for job in others])
    width = max([10, *(len(job.name) for job in jobs)]) + 1
    if jobs:
        print(f"{'task':<{width}}{'read':>9}{'dropped':>9}{'written':>9}  reasons")
    problems = []
    for number, job in enumerate(jobs, 1):
        try:
            taken = set()
            if job.overlaps and job.overlaps not in [later.name for later in jobs[number:]]:
                other = cfg.path(job.overlaps)
                rows = read_jsonl(other) if other.exists() else ()
                taken = {(row["instruction"], row["input"]) for row in rows}
            text, entry = prepare(cfg, job, taken)
        except UserError as error:
            problems.append(str(error))
            continue
        if job.path.exists():
            entry["replaces"] = file_sha256(job.path)
        manifest[job.name] = entry
        # The manifest first: a run that is killed between the two does the task again.
        order = [name for name in TASKS if name in manifest]
        order += [name for name in manifest if name not in TASKS]
        write_json(manifest_path, {name: manifest[name] for name in order})
        with atomic_file(job.path) as file:
            file.write(text)
        read, written, dropped = map(entry.get, ("rows_read", "written", "dropped"))
        reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
        print(f"{job.name:<{width}}{read:>9}{read - written:>9}{written:>9}  {reasons}".rstrip())
    if problems:
        raise UserError("\n".join(problems))


def tell_next(cfg: PrepareConfig, jobs: list[Job]) -> None:
    """How to train on what was written."""
    if cfg.own:
        entries = " ".join(f"{job.name}={job.path}" for job in jobs)
        order = " ".join(job.name for job in jobs if not job.name.endswith(".test"))
        print(f"train with: --task_data {entries} --task_order {order}")
    elif cfg.suite:
        print(f"train with: python train_slsd_seq.py --config {cfg.suite}")


def length_of(row: dict) -> int:
    """Characters of a row's three texts."""
    return sum(len(row[key]) for key in KEYS)


def sample_toy(cfg: PrepareConfig) -> None:
    """Samples short rows of data/full/ into `cfg.toy_dir`."""
    targets = {task: Path(cfg.toy_dir) / f"{task}.jsonl" for task in cfg.tasks}
    if not cfg.overwrite:
        refuse_existing(list(targets.values()))
    full = [(target, task, read_jsonl(cfg.path(task))) for task, target in targets.items()]
    with held(Path(cfg.toy_dir)):
        write_toy(cfg, full)


def write_toy(cfg: PrepareConfig, full: list[tuple[Path, str, list[dict]]]) -> None:
    for target, task, rows in full:
        short = [row for row in rows if length_of(row) < TOY_CHARS]
        if len(short) < cfg.toy_samples:
            short = sorted(rows, key=length_of)[: cfg.toy_samples]
        chosen = random.Random(f"{cfg.seed}/{task}").sample(short, min(cfg.toy_samples, len(short)))
        with atomic_file(target) as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in chosen)
        print(f"{target}: {len(chosen)} of {len(rows)} rows")


@command_line
def main(argv=None):
    (cfg,) = parse_dataclasses(argv, PrepareConfig, description=__doc__)
    jobs = [] if cfg.toy else jobs_of(cfg)
    try:
        sample_toy(cfg) if cfg.toy else prepare_full(cfg, jobs)
    except OSError as error:
        raise UserError(f"{error}: give a folder with room that may be written") from error
    tell_next(cfg, jobs)


if __name__ == "__main__":
    sys.exit(main())
