"""Finished runs, as their log folders tell them, by method."""

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

from configs.base_config import NOT_RESULTS
from configs.command_line import UserError
from evaluation.logs import number, number_or_none, read_log, read_summary, text
from evaluation.matrix import forgetting, mean, summarise_scores
from methods.method import JOINT
from models.reading import MIB
from training.identity import differences


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
        summary, command = read_summary(folder / "seq_summary.json"), "python train_slsd_seq.py"
        last = list(summary["stages"])[-1]
        kinds = {"stage": text, "eval_task": text, "loss": number, "branches": text}
        rows = read_log(folder / "seq_eval_loss.jsonl", kinds, command, optional=("branches",))
        log, drift = folder / "seq_drift.jsonl", []
        # One task alone, or all at once, has no earlier one.
        if log.exists() and log.stat().st_size:
            kinds = {"stage": text, "probe_task": text, "teacher": text}
            kinds |= {"kl_first": number_or_none, "kl_rest": number_or_none}
            drift = read_log(log, kinds, command)
        log, scores = folder / f"scores_{last}.jsonl", []
        if log.exists():
            kinds = {"task": text, "metric": text, "branches": text}
            kinds |= {"score": number, "low": number, "high": number}
            scores = read_log(log, kinds, "python evaluate_tasks.py")
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
        return mean(r["loss"] for r in self.losses if r.get("branches", "latest") == name)

    def mean_drift(self, key: str) -> float:
        """Mean drift of the earlier tasks: "kl_first" or "kl_rest", nats per response token."""
        return mean(row[key] for row in self.drift if row[key] is not None)

    def accuracy(self, key: str) -> float:
        """Of choices, 0 to 100: a number of `summarise_scores`; NaN where there is none."""
        matrix = self.summary.get("accuracy", {}).get("matrix")
        if not matrix or not self._counts(key):
            return math.nan
        return summarise_scores(_with_nan(matrix), list(self.summary["stages"]) == [JOINT])[key]

    def metric(self, name: str) -> float:
        """A number of the summary; NaN where it is null."""
        value = self.summary.get(name) if self._counts(name) else None
        return math.nan if value is None else value

    def _counts(self, name: str) -> bool:
        """The LoRA of a bank's last task is not meant for the others: it only learns."""
        return self.summary.get("is_one_model", True) or name.startswith("learning")

    def routed_forgetting(self) -> float:
        """Forgetting where the last stage is read as "routed"; NaN without that reading."""
        loss = {r["eval_task"]: r["loss"] for r in self.losses if r.get("branches") == "routed"}
        last = [loss.get(task, math.nan) for task in self.summary["tasks"]]
        return forgetting([*_with_nan(self.summary["matrix"])[:-1], last])

    def samples_kept(self) -> float:
        """Of each earlier task, as the last one begins; NaN where the run does not tell."""
        before_last = max(1, len(self.summary["stages"]) - 1)
        return self._as_the_last_begins("samples_kept") / before_last

    def mib_kept(self) -> float:
        """Of samples, answers, Fisher information and the like, as the last task begins."""
        return self._as_the_last_begins("bytes_kept") / MIB

    def _as_the_last_begins(self, key: str) -> float:
        return list(self.summary["stages"].values())[-2:][0].get(key, math.nan)

    def samples_a_step(self, kind: str) -> float:
        """Samples read for an optimizer step, mean over stages: "backward" or only "forward"."""
        stages = self.summary["stages"].values()
        return mean(stage.get("samples_a_step", {}).get(kind, math.nan) for stage in stages)

    def minutes(self) -> float:
        """Of training."""
        return sum(stage["train_seconds"] for stage in self.summary["stages"].values()) / 60

    @property
    def name(self) -> str:
        """METHOD, METHOD,setting=value or either with @ORDER: NAME of the folder NAME/seed1."""
        is_seed = re.fullmatch(r"seed\d+", self.folder.name)
        name = self.folder.parent.name if is_seed else self.folder.name
        # A folder may be called by bytes that are no text.
        return os.fsencode(name).decode(errors="replace")

    @property
    def pair(self) -> tuple:
        """What runs of two methods share where they are compared: (order of the tasks, seed)."""
        return tuple(self.summary["tasks"]), self.summary["config"]["seed"]


def _with_nan(matrix: list[list[float | None]]) -> list[list[float]]:
    """JSON has no NaN."""
    return [[math.nan if cell is None else cell for cell in row] for row in matrix]


# Of all fields, those that tell one run of a group from another.
OF_A_RUN = {"seed", *NOT_RESULTS} - {"light_evaluation"}


def group_runs(folders: list[Path]) -> dict[str, list[FinishedRun]]:
    """Runs by brief name: folders NAME/seed1, NAME/seed2, ... are one group NAME.

    Raises UserError where the runs of a group differ in more than the seed.
    """
    groups: dict[str, list[FinishedRun]] = {}
    for folder in dict.fromkeys(folder.resolve() for folder in folders):
        run = FinishedRun.read(folder)
        groups.setdefault(run.name, []).append(run)
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
    return dict(zip(brief_names(list(groups)), groups.values(), strict=True))


def brief_names(names: list[str]) -> list[str]:
    """Names METHOD,setting=value@ORDER without the settings that all of the METHOD share."""
    parts = []
    for name in names:
        method, at, order = name.partition("@")
        parts.append((method.split(","), at + order))
    of_all: dict[str, set[str]] = {}
    for (head, *settings), _ in parts:
        of_all[head] = of_all.get(head, set(settings)) & set(settings)
    return [
        ",".join([head, *(s for s in settings if s not in of_all[head])]) + order
        for (head, *settings), order in parts
    ]


def by_method(groups: dict[str, list[FinishedRun]]) -> dict[str, dict[str, list[FinishedRun]]]:
    """Method -> its groups: METHOD@order1, METHOD@order2, ..."""
    methods: dict[str, dict[str, list[FinishedRun]]] = {}
    for name, runs in groups.items():
        methods.setdefault(name.partition("@")[0], {})[name] = runs
    return methods


# The base's loss on the same samples varies by rounding only, in half precision by less than this.
SAME_BASE = 0.02
# What decides the base's loss, for runs that did not measure it (--light_evaluation).
OF_THE_BASE = re.compile(
    "(test )?data of .*|base_model|quantization|weights|config.json|tokenizer|gguf_sha256|"
    "prompt_template|max_seq_len|holdout_fraction|eval_samples_per_task"
)


def check_alike(runs: list[FinishedRun]) -> None:
    """Raises UserError where the runs differ in tasks, base, held-out samples or evaluation."""
    for run in runs[1:]:
        then, now = (
            dict(zip(r.summary["tasks"], r.summary["matrix"][0], strict=True))
            for r in (runs[0], run)
        )
        fault = ""
        if then.keys() != now.keys() or any(
            abs(now[task] - then[task]) > SAME_BASE
            for task in then
            if None not in (then[task], now[task])
        ):
            fault = "tasks, base model or held-out samples (row base of the matrix)"
        elif None in (*then.values(), *now.values()):
            fault = differences(*(_of_the_base(r) for r in (runs[0], run)))
        if not fault and len({_is_light(r) for r in (runs[0], run)} - {None}) > 1:
            fault = "light_evaluation, and with it in what forgetting is"
        if fault:
            raise UserError(
                f"{run.folder} and {runs[0].folder} differ in {fault}: compare like with like"
            )


def _of_the_base(run: FinishedRun) -> dict:
    identity = run.summary.get("identity", {})
    return {name: value for name, value in identity.items() if OF_THE_BASE.fullmatch(name)}


def _is_light(run: FinishedRun) -> bool | None:
    """None where it makes no difference: a bank's matrix does not count."""
    is_light = run.summary["config"].get("light_evaluation", False)
    return is_light if run.summary.get("is_one_model", True) else None
