"""Runs train_slsd_seq.py for every method, order and seed, one after another, and compares them.

A finished run is left alone and an interrupted one goes on, so the same command may be given again
and again. Every other option goes to all runs, whose folders lie below --log_dir and --save_dir.
"""

import dataclasses
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import plot_loss
from configs.base_config import (
    NOT_RESULTS,
    TASKS,
    UserError,
    command_line,
    knob,
    parse_config,
)

REPLAYED = {"use_slsd": True, "kd_probes": "replay", "kd_every": 1}
METHODS = {
    "seq_lora": {"method": "seq_lora"},
    # In all layers, as LoRA is mostly used.
    "seq_lora_all": {"method": "seq_lora", "num_frozen_layers": 0},
    "replay": {"method": "replay"},
    "ewc": {"method": "ewc"},
    "lwf": {"method": "lwf"},
    "bank": {"method": "bank"},
    "joint": {"method": "joint"},
    "ds_lora": {"method": "ds_lora", "use_slsd": False},
    "slsd": {"method": "ds_lora", "use_slsd": True},
    # The probes of the earlier tasks too, for the slow branch or for both.
    "slsd_replay": {"method": "ds_lora", **REPLAYED},
    "slsd_replay_all": {"method": "ds_lora", **REPLAYED, "kd_branches": "all"},
}
SPECIFIED_ORDER = "12345"


@dataclass
class Experiments:
    methods: list[str] = knob(
        list(METHODS),
        f"out of {', '.join(METHODS)}; settings of its own follow a comma: slsd,kd_lambda=3",
    )
    seeds: list[int] = knob([42], "of branch weights, samples, their order, and probes")
    orders: list[str] = knob(
        [SPECIFIED_ORDER], "of the tasks: 12345 as specified, 51234 with safety first"
    )


@dataclass
class Run:
    """One run of `train_slsd_seq.py`: its name, its options and what they mean."""

    name: str
    argv: list[str]
    cfg: object

    @property
    def summary(self) -> Path:
        """Written last: the run is finished where it is."""
        return Path(self.cfg.log_dir) / "seq_summary.json"


@command_line
def main(argv=None):
    cfg, experiments = parse_config(argv, Experiments, description=__doc__)
    runs = plan(cfg, experiments)
    failed = []
    for number, run in enumerate(runs, 1):
        state = "finished" if run.summary.exists() and not cfg.overwrite else "starting"
        print(f"[{number}/{len(runs)}] {run.name}: {state}", flush=True)
        if state == "finished" or cfg.dry_run:
            continue
        script = Path(__file__).with_name("train_slsd_seq.py")
        # A process of its own: what goes wrong in one run does not end the night.
        code = subprocess.run([sys.executable, script, *run.argv]).returncode
        if code in (130, 143):
            raise KeyboardInterrupt
        failed += [run.name] if code else []
    done = [str(run.summary.parent) for run in runs if run.summary.exists()]
    if done:
        plot_loss.main(["compare", *done, "--log_dir", cfg.log_dir])
    if failed:
        raise UserError(f"{len(failed)} runs failed ({', '.join(failed)}): see above for each")


def plan(cfg, experiments) -> list[Run]:
    """Every run, all seeds of one kind after another; `UserError` with all that is wrong."""
    common, runs, problems = as_flags(dataclasses.asdict(cfg)), [], []
    for entry in experiments.methods:
        method, *own = entry.split(",")
        if method not in METHODS:
            problems.append(f"--methods {method}: give some of {', '.join(METHODS)}")
            continue
        settings = METHODS[method] | dict(setting.partition("=")[::2] for setting in own)
        for order in experiments.orders:
            if sorted(order) != sorted(SPECIFIED_ORDER):
                problems.append(f"--orders {order}: give each digit of {SPECIFIED_ORDER} once")
                continue
            group = entry if order == SPECIFIED_ORDER else f"{entry}@{order}"
            for seed in experiments.seeds:
                name = f"{group}/seed{seed}"
                changes = {
                    **settings,
                    "task_order": [TASKS[int(digit) - 1] for digit in order],
                    "seed": seed,
                    "log_dir": f"{cfg.log_dir}/{name}",
                    "save_dir": f"{cfg.save_dir}/{name}",
                }
                flags = common + as_flags(changes)
                try:
                    runs.append(Run(name, flags, *parse_config(flags, description=__doc__)))
                    check_finished(runs[-1])
                except UserError as error:
                    problems += [f"{entry}: {line}" for line in str(error).splitlines()]
    if problems:
        raise UserError("\n".join(dict.fromkeys(problems)))
    return runs


def as_flags(settings: dict) -> list[str]:
    """Fields of a configuration as options of a command line."""
    flags = []
    for name, value in settings.items():
        flags += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return flags


def check_finished(run: Run) -> None:
    """Raises `UserError` where the finished run in the folder of `run` had other settings."""
    if run.cfg.overwrite or not run.summary.exists():
        return
    found, wanted = json.loads(run.summary.read_text())["config"], dataclasses.asdict(run.cfg)
    differing = [
        f"{name} {found.get(name)} -> {wanted[name]}"
        for name in wanted
        if name not in NOT_RESULTS and found.get(name) != wanted[name]
    ]
    if differing:
        raise UserError(
            f"{run.summary.parent} holds a run with other settings ({', '.join(differing)}): give "
            "another --log_dir and --save_dir, or --overwrite true"
        )


if __name__ == "__main__":
    sys.exit(main())
