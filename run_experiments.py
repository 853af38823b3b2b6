"""Runs train_slsd_seq.py for every method, order and seed, one after another, and compares them.

A finished run is left alone and an interrupted one goes on, so the same command may be given again
and again. Every other option goes to all runs, whose folders lie below --log_dir and --save_dir.
"""

import dataclasses
import json
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import plot_loss
from configs.base_config import TASKS, UserError, command_line, knob, parse_config
from training.base_model import describe_base
from training.session import differences, run_identity

REPLAYED = {"use_slsd": True, "kd_probes": "replay"}
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
DIGITS = "12345"


@dataclass
class Experiments:
    methods: list[str] = knob(
        list(METHODS),
        f"out of {', '.join(METHODS)}; settings of its own follow a comma: slsd,kd_lambda=3",
    )
    seeds: list[int] = knob([], "of branch weights, samples, their order, probes; none: --seed")
    orders: list[str] = knob(
        [], "of the tasks: 12345 as specified, 51234 with safety first; none: --task_order"
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
        code = execute(run)
        if code in (130, 143):
            raise KeyboardInterrupt
        failed += [run.name] if code else []
    done = [str(run.summary.parent) for run in runs if run.summary.exists()]
    if done and plot_loss.main(["compare", *done, "--log_dir", cfg.log_dir]):
        failed.append("the comparison")
    if failed:
        raise UserError(f"failed: {', '.join(failed)}; see above for each")


def plan(cfg, experiments) -> list[Run]:
    """Every run, all seeds of one kind after another; `UserError` with all that is wrong."""
    common, runs, problems = as_flags(dataclasses.asdict(cfg)), [], []
    given = "".join(str(TASKS.index(task) + 1) for task in cfg.task_order)
    orders = experiments.orders or [given]
    for order in orders:
        if not order or set(order) - set(DIGITS):
            problems.append(f"--orders {order}: give digits of {DIGITS}, one a task")
    for entry in experiments.methods:
        method, *own = entry.split(",")
        if method not in METHODS:
            problems.append(f"--methods {method}: give some of {', '.join(METHODS)}")
            continue
        settings = METHODS[method] | dict(setting.partition("=")[::2] for setting in own)
        for order in orders:
            tasks = [TASKS[int(digit) - 1] for digit in order if digit in DIGITS]
            group = entry if order == DIGITS else f"{entry}@{order}"
            for seed in experiments.seeds or [cfg.seed]:
                name = f"{group}/seed{seed}"
                changes = {
                    **settings,
                    "task_order": tasks,
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


def execute(run: Run) -> int:
    """The exit code of the run, in a process of its own: its faults do not end the night."""
    script = Path(__file__).with_name("train_slsd_seq.py")
    with subprocess.Popen([sys.executable, script, *run.argv]) as process:
        before = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
        try:
            while True:
                try:
                    return process.wait()
                except KeyboardInterrupt:
                    # The terminal has told the run too, and it saves before it ends.
                    continue
        finally:
            signal.signal(signal.SIGTERM, before)


def check_finished(run: Run) -> None:
    """Raises `UserError` where the finished run in the folder of `run` was another one."""
    if run.cfg.overwrite or not run.summary.exists():
        return
    try:
        wanted = run_identity(run.cfg, run.cfg.task_order, describe_base(run.cfg))
        found = json.loads(run.summary.read_text(encoding="utf-8")).get("identity", {})
    except (OSError, ValueError) as error:
        raise UserError(f"{run.summary.parent} cannot be checked: {error}") from error
    if differing := differences({name: found.get(name) for name in wanted}, wanted):
        raise UserError(
            f"{run.summary.parent} holds another run ({differing}): give another --log_dir and "
            "--save_dir, or --overwrite true"
        )


if __name__ == "__main__":
    sys.exit(main())
