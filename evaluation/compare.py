"""Logs as they are read, and finished runs compared in tables."""

import itertools
import json
import math
import re
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from configs.base_config import NOT_RESULTS
from configs.command_line import UserError


def read_log(path: Path, keys: tuple[str, ...], command: str) -> list[dict]:
    """Rows of a JSON-lines log that hold all `keys`.

    Raises UserError where the log is missing, empty or damaged; `command` is what writes it.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise UserError(f"{path} is missing: run {command} first, or give --log_dir") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
            missing = [key for key in keys if key not in rows[-1]]
        except (json.JSONDecodeError, TypeError):
            raise UserError(
                f"{path}, line {number}: damaged; remove the line or run again"
            ) from None
        if missing:
            raise UserError(f"{path}, line {number}: {missing[0]!r} is missing; is it this log?")
    if not rows:
        raise UserError(f"{path} is empty: wait for the first line, or run {command} again")
    return rows


@dataclass
class FinishedRun:
    """One run of the sequence, as its log folder tells it."""

    folder: Path
    summary: dict
    losses: list[dict]  # of the last stage: {"eval_task", "branches", "loss"}
    drift: list[dict]  # of the last stage, from each earlier task's just-learned model
    scores: list[dict]  # of the last stage, where evaluate_tasks.py was run on it

    @classmethod
    def read(cls, folder: Path) -> "FinishedRun":
        """Raises UserError where the run is not finished."""
        path, command = folder / "seq_summary.json", "python train_slsd_seq.py"
        try:
            summary = json.loads(path.read_text(encoding="utf-8"))
            last = list(summary["stages"])[-1]
            summary["config"]["seed"], summary["matrix"], summary["tasks"]
        except FileNotFoundError:
            raise UserError(f"{path} is missing: is the run of that folder finished?") from None
        except (ValueError, KeyError, TypeError, IndexError):
            raise UserError(f"{path} is no summary of a run: run {command} again") from None
        rows = read_log(folder / "seq_eval_loss.jsonl", ("stage", "eval_task", "loss"), command)
        log, drift = folder / "seq_drift.jsonl", []
        # One task alone, or all at once, has no earlier one.
        if log.exists() and log.stat().st_size:
            drift = read_log(log, ("stage", "probe_task", "teacher", "kl_first"), command)
        path = folder / f"scores_{last}.jsonl"
        keys = ("task", "metric", "branches", "score", "low", "high")
        scores = read_log(path, keys, "python evaluate_tasks.py") if path.exists() else []
        return cls(
            folder,
            summary,
            [row for row in rows if row["stage"] == last],
            [
                row
                for row in drift
                if row["stage"] == last and row["probe_task"] == row["teacher"] != last
            ],
            scores,
        )

    def reading(self, name: str) -> float:
        """Mean loss of all tasks after the last stage as the reading `name`; NaN without it."""
        return mean([r["loss"] for r in self.losses if r.get("branches", "latest") == name])

    def mean_drift(self, key: str) -> float:
        """Mean drift of the earlier tasks: "kl_first" or "kl_rest", nats per response token."""
        return mean([row[key] for row in self.drift if row[key] is not None])

    def accuracy(self, key: str) -> float:
        """Of choices: "last", "avg", "bwt" or "fwt"; NaN where there is none."""
        value = self.summary.get("accuracy", {}).get(key)
        return math.nan if value is None else value

    def metric(self, name: str) -> float:
        """A number of the summary; NaN where it is null.

        The LoRA of a bank's last task is not meant for the others: only what it learns counts.
        """
        if not self.summary.get("is_one_model", True) and name != "learning_loss":
            return math.nan
        value = self.summary.get(name)
        return math.nan if value is None else value


ACCURACIES = ("last", "avg", "bwt", "fwt")


def known(values: list[float]) -> list[float]:
    """Those that are not NaN."""
    return [value for value in values if not math.isnan(value)]


def mean(values: list[float]) -> float:
    """The mean of the known values; NaN without any."""
    numbers = known(values)
    return sum(numbers) / len(numbers) if numbers else math.nan


def deviation(values: list[float]) -> float:
    """The sample standard deviation of the known values; 0 of fewer than two."""
    numbers = known(values)
    return statistics.stdev(numbers) if len(numbers) > 1 else 0.0


# Of all fields, those that tell one run of a group from another.
OF_A_RUN = {"seed", *NOT_RESULTS}


def group_runs(folders: list[Path]) -> dict[str, list[FinishedRun]]:
    """Runs by name: folders NAME/seed1, NAME/seed2, ... are one group NAME.

    Settings that follow a comma in a name are left out where the names stay apart without them.
    Raises UserError where the runs of a group differ in more than the seed.
    """
    groups: dict[str, list[FinishedRun]] = {}
    for folder in dict.fromkeys(folder.resolve() for folder in folders):
        is_seed = re.fullmatch(r"seed\d+", folder.name)
        groups.setdefault(folder.parent.name if is_seed else folder.name, []).append(
            FinishedRun.read(folder)
        )
    for name, runs in groups.items():
        first, *others = (
            {k: v for k, v in run.summary["config"].items() if k not in OF_A_RUN} for run in runs
        )
        for run, config in zip(runs[1:], others, strict=True):
            differing = [key for key in {**first, **config} if first.get(key) != config.get(key)]
            if differing:
                raise UserError(
                    f"{run.folder} is not like {runs[0].folder} ({', '.join(sorted(differing))} "
                    f"differ): compare them under names other than {name}"
                )
        seeds = [run.summary["config"]["seed"] for run in runs]
        if len(set(seeds)) < len(seeds):
            raise UserError(f"{name}: two of its {len(seeds)} runs have the same seed; give one")
    check_alike([run for runs in groups.values() for run in runs])
    short = [re.sub(r",[^@]*", "", name) for name in groups]
    return {
        brief if short.count(brief) == 1 else name: runs
        for brief, (name, runs) in zip(short, groups.items(), strict=True)
    }


# The base's loss on the same samples varies by rounding only, in half precision by less than this.
SAME_BASE = 0.02


def check_alike(runs: list[FinishedRun]) -> None:
    """Raises UserError where the runs differ in tasks, base model or held-out samples."""
    first, *others = (
        dict(zip(run.summary["tasks"], run.summary["matrix"][0], strict=True)) for run in runs
    )
    for run, base in zip(runs[1:], others, strict=True):
        if base.keys() != first.keys() or any(
            abs(base[task] - first[task]) > SAME_BASE for task in first
        ):
            raise UserError(
                f"{run.folder} and {runs[0].folder} differ in tasks, base model or held-out "
                "samples (row base of the matrix): compare like with like"
            )


def spread(values: list[float], form: str, form_of_spread: str = ".3f") -> str:
    """Mean and, of several, sample standard deviation; empty where there is no number."""
    numbers = known(values)
    if not numbers:
        return ""
    text = format(mean(numbers), form)
    if len(numbers) > 1:
        text += f" ± {format(deviation(numbers), form_of_spread)}"
    return text


COLUMNS: dict[str, tuple[Callable[[FinishedRun], float], str]] = {
    "just learned ↓": (lambda run: run.metric("learning_loss"), ".3f"),
    "forgetting ↓": (lambda run: run.metric("forgetting"), "+.3f"),
    "BWT ↑": (lambda run: run.metric("backward_transfer"), "+.3f"),
    "final ↓": (lambda run: run.metric("average_final_loss"), ".3f"),
    "AIA ↓": (lambda run: run.metric("average_incremental_loss"), ".3f"),
    "retention ↑": (lambda run: run.metric("retention"), ".2f"),
    "drift, first 5 ↓": (lambda run: run.mean_drift("kl_first"), ".3f"),
    "drift, rest ↓": (lambda run: run.mean_drift("kl_rest"), ".3f"),
}


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """An aligned Markdown table, for a file and for a terminal."""
    table = [header, *rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in table
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def readings_in(runs: Iterable[FinishedRun]) -> list[str]:
    """The readings that some of the runs has, "latest" first."""
    names = (row.get("branches", "latest") for run in runs for row in run.losses)
    return list(dict.fromkeys(["latest", *names]))


def with_readings(groups: dict[str, list[FinishedRun]]) -> dict[str, list[FinishedRun]]:
    """The groups that have more than one reading."""
    return {name: runs for name, runs in groups.items() if len(readings_in(runs)) > 1}


def compare_tables(groups: dict[str, list[FinishedRun]]) -> str:
    """All groups by metric, and those with several readings by reading."""
    a_run = next(iter(groups.values()))[0]
    base = mean([loss for loss in a_run.summary["matrix"][0] if loss is not None])
    rows = [["base", "", *(f"{base:.3f}" if name == "final ↓" else "" for name in COLUMNS), ""]]
    for name, runs in groups.items():
        cells = [spread([value(run) for run in runs], form) for value, form in COLUMNS.values()]
        stages = [stage for run in runs for stage in run.summary["stages"].values()]
        seconds = [stage["train_seconds"] for stage in stages]
        rows.append([name, str(len(runs)), *cells, f"{sum(seconds) / len(runs) / 60:.1f}"])
    parts = [
        "Losses in nats per response token, mean ± standard deviation over seeds; ↓ lower is "
        "better, ↑ higher.",
        markdown(["method", "seeds", *COLUMNS, "training, min"], rows),
    ]
    if several := with_readings(groups):
        readings = readings_in(itertools.chain(*several.values()))
        rows = [
            [name, *(spread([run.reading(r) for run in runs], ".3f") for r in readings)]
            for name, runs in several.items()
        ]
        parts += ["Final loss by reading:", markdown(["method", *readings], rows)]
    if known([run.accuracy("last") for runs in groups.values() for run in runs]):
        parts += [
            "Accuracy by likelihood, 0 to 100, as papers report it (BWT, FWT: negative = worse).",
            markdown(["method", "Last", "Avg", "BWT", "FWT"], accuracy_rows(groups)),
        ]
    if any(run.scores for runs in groups.values() for run in runs):
        parts += [
            "Scores after the last stage, 0 to 100, higher is better: with the 95 % interval of "
            "one seed, or mean ± standard deviation of several.",
            markdown(*score_table(groups)),
        ]
    return "\n\n".join(parts) + "\n"


def accuracy_rows(groups: dict[str, list[FinishedRun]]) -> list[list[str]]:
    """A row for each group, and the mean over orders of a method that has several."""
    by_method: dict[str, list[str]] = {}
    for name in groups:
        by_method.setdefault(name.partition("@")[0], []).append(name)
    rows = []
    for method, names in by_method.items():
        means = {
            n: [mean([run.accuracy(k) for run in groups[n]]) for k in ACCURACIES] for n in names
        }
        for name in names:
            values = ([run.accuracy(k) for run in groups[name]] for k in ACCURACIES)
            rows.append([name, *(spread(of_key, ".1f", ".1f") for of_key in values)])
        if len(names) > 1:
            columns = zip(*means.values(), strict=True)
            over_orders = [spread(list(column), ".1f", ".1f") for column in columns]
            rows.append([f"{method}, mean of {len(names)} orders", *over_orders])
    return rows


def score_table(groups: dict[str, list[FinishedRun]]) -> tuple[list[str], list[list[str]]]:
    """(header, rows): a row for each method and reading, a column for each score."""
    cells: dict[tuple[str, str], dict[str, list[dict]]] = {}
    for name, runs in groups.items():
        for line in (line for run in runs for line in run.scores):
            column = f"{line['task']} {line['metric']}"
            of_row = cells.setdefault((name, line["branches"]), {})
            of_row.setdefault(column, []).append(line)
    columns = list(dict.fromkeys(column for of_row in cells.values() for column in of_row))

    def cell(lines: list[dict]) -> str:
        if len(lines) == 1:
            (line,) = lines
            return f"{line['score']:.0f} [{line['low']:.0f}, {line['high']:.0f}]"
        return spread([line["score"] for line in lines], ".1f", ".1f")

    rows = [[*key, *(cell(of_row.get(c, [])) for c in columns)] for key, of_row in cells.items()]
    return ["method", "read as", *columns], rows
