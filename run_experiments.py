"""Runs train_slsd_seq.py for every method, order and seed, one or several at a time, and compares.

A finished run is left alone and an interrupted one goes on, so the same command may be given again
and again. Every other option goes to all runs, whose folders lie below --log_dir and --save_dir.
"""

import dataclasses
import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path

import plot_loss
from configs.command_line import Knobs, Stopped, UserError, default_of, knob, value_of_option
from configs.ending import command_line
from methods import METHODS, find_method, knob_names, parse_config
from models.reading import MIB, read_json
from tasks import TASKS
from training.identity import describe_base, differences, run_identity
from training.side_by_side import Command, find_places, run_side_by_side

VARIANTS = {
    name: {"method": method.name, **settings}
    for method in METHODS.values()
    for name, settings in (method.variants or {method.name: {}}).items()
}
# What tells one run of a method from another, and where it goes.
RESERVED = {"seed", "task_order", "log_dir", "save_dir", "method", "config", "overwrite", "dry_run"}
NUMBERED = list(TASKS)
DIGITS = "".join(str(number) for number in range(1, len(NUMBERED) + 1))


@dataclass
class Experiments(Knobs):
    methods: list[str] = knob(
        list(VARIANTS),
        f"out of {', '.join(VARIANTS)}; settings of its own follow a comma: slsd,kd_lambda=3",
    )
    seeds: list[int] = knob([], "of branch weights, samples, their order, probes; none: --seed")
    orders: list[str] = knob(
        [],
        "of the tasks: 12345 as specified, 51234 with safety first; law,medicine; or the name of "
        "an order of the configuration; none: --task_order",
    )
    jobs: int = knob(
        1,
        "runs at a time, each on a GPU of its own, or on a CPU with its share of the threads; what "
        "they print goes to files in log_dir",
        at_least=1,
    )
    part: str = knob(
        "1/1",
        "i/n: the i-th of n shares of the runs, for several servers or an array of Slurm jobs",
        pattern=(r"[1-9]\d*/[1-9]\d*", "i/n, such as 1/4"),
    )

    def problems(self):
        found = super().problems()
        if not found and self.share[0] >= (shares := self.share[1]):
            found.append(f"part is {self.part!r}: give 1/{shares} to {shares}/{shares}")
        return found

    @property
    def share(self) -> tuple[int, int]:
        """(number of the share, from 0, number of shares)."""
        number, shares = map(int, self.part.split("/"))
        return number - 1, shares


@dataclass
class Experiment:
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
    cfg, experiments = parse_config(argv, Experiments, description=__doc__, every_method=True)
    runs = plan(cfg, experiments, argv)
    places = find_places(experiments.jobs, cfg.device)
    first, step = experiments.share
    commands = {}
    for number, run in list(enumerate(runs, 1))[first::step]:
        name = f"[{number}/{len(runs)}] {run.name}"
        if run.summary.exists() and not cfg.overwrite:
            print(f"{name}: finished", flush=True)
        elif cfg.dry_run:
            print(f"{name}: would be run", flush=True)
        else:
            commands[run.name] = command(cfg, name, run, experiments.jobs)
    codes, stopped = run_side_by_side(list(commands.values()), places)
    if stopped:
        raise Stopped(stopped)
    failed = [name for name, of_run in commands.items() if codes[of_run.name]]
    done = [str(run.summary.parent) for run in runs if run.summary.exists()]
    if done and plot_loss.main(["compare", *done, "--log_dir", cfg.log_dir]):
        failed.append("the comparison")
    if failed:
        raise UserError(f"failed: {', '.join(failed)}; see above for each")


def plan(cfg, experiments, argv) -> list[Experiment]:
    """Every run, all seeds of one kind after another; `UserError` with all that is wrong."""
    runs, problems = [], []
    orders = {}
    for order in experiments.orders or [""]:
        try:
            tasks = tasks_of(cfg, order)
            orders[label_of(cfg, order, tasks)] = tasks
        except UserError as error:
            problems.append(str(error))
    for entry in experiments.methods:
        name, *own = entry.split(",")
        if name not in VARIANTS:
            problems.append(f"--methods {name}: give some of {', '.join(VARIANTS)}")
            continue
        own = dict(setting.partition("=")[::2] for setting in own)
        if taken := RESERVED & own.keys():
            problems.append(
                f"--methods {entry}: {', '.join(sorted(taken))} is set for all runs: give it as an "
                "option of its own"
            )
            continue
        settings = VARIANTS[name] | own
        common = flags_for(cfg, settings["method"], argv)
        for label, tasks in orders.items():
            group = f"{entry}@{label}" if label else entry
            for seed in experiments.seeds or [cfg.seed]:
                folder = f"{group}/seed{seed}"
                changes = {
                    **settings,
                    "task_order": tasks,
                    "seed": seed,
                    "log_dir": f"{cfg.log_dir}/{folder}",
                    "save_dir": f"{cfg.save_dir}/{folder}",
                    "prefix_store": cfg.prefix_store or f"{cfg.save_dir}/.prefix_store",
                }
                flags = common + as_flags(changes)
                try:
                    (run_cfg,) = parse_config(flags, description=__doc__)
                    runs.append(Experiment(folder, flags, run_cfg))
                    check_finished(runs[-1])
                except UserError as error:
                    problems += [f"{entry}: {line}" for line in str(error).splitlines()]
    if problems:
        raise UserError("\n".join(dict.fromkeys(problems)))
    return runs


def tasks_of(cfg, order: str) -> list[str]:
    """The tasks that `order` names, see `Experiments.orders`; `UserError` where it is none."""
    if not order:
        return cfg.task_order
    if order in cfg.task_orders:
        return cfg.task_orders[order]
    if not set(order) - set(DIGITS):
        return [NUMBERED[int(digit) - 1] for digit in order]
    tasks = order.split(",")
    if set(tasks) - set(cfg.data_paths) or len(set(tasks)) < len(tasks):
        named = ", ".join(cfg.task_orders)
        raise UserError(
            f"--orders {order}: give digits of {DIGITS}, one a task, or tasks with commas, out of "
            f"{', '.join(cfg.data_paths)}{f', or one of {named}' if named else ''}"
        )
    return tasks


def label_of(cfg, order: str, tasks: list[str]) -> str:
    """What tells a run in the order `tasks` from others; "" where that is the usual one."""
    if order in cfg.task_orders:
        return order
    usual = {field.name: field for field in dataclasses.fields(cfg)}["task_order"]
    if tasks == NUMBERED or (not order and tasks == default_of(usual)):
        return ""
    if not set(tasks) - set(NUMBERED):
        return "".join(str(NUMBERED.index(task) + 1) for task in tasks)
    named = "+".join(tasks)
    # Folders have names of limited length.
    return named if len(named) <= 80 else hashlib.sha256(named.encode()).hexdigest()[:12]


def flags_for(cfg, method: str, argv) -> list[str]:
    """What was given for all runs, as far as it is something to `method`."""
    others = {name for other in METHODS.values() for name in knob_names(other)}
    others -= knob_names(find_method(method))
    changed = {
        field.name: getattr(cfg, field.name)
        for field in dataclasses.fields(cfg)
        if field.metadata["help"]
        and field.name not in others
        and getattr(cfg, field.name) != default_of(field)
    }
    name = value_of_option(list(sys.argv[1:] if argv is None else argv), "--config")
    return [*(["--config", name] if name else []), *as_flags(changed)]


def as_flags(settings: dict) -> list[str]:
    """Fields of a configuration as options of a command line."""
    flags = []
    for name, value in settings.items():
        flags += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return flags


def command(cfg, name: str, run: Experiment, jobs: int) -> Command:
    """The run in a process of its own: its faults do not end the night."""
    script, output = Path(__file__).with_name("train_slsd_seq.py"), None
    if jobs > 1:
        output = Path(cfg.log_dir) / f"{run.name.replace('/', '_')}.txt"
        output.parent.mkdir(parents=True, exist_ok=True)
    return Command(name, [sys.executable, str(script), *run.argv], output)


def check_finished(run: Experiment) -> None:
    """Raises `UserError` where the finished run in the folder of `run` was another one."""
    if run.cfg.overwrite or not run.summary.exists():
        return
    try:
        wanted = run_identity(run.cfg, run.cfg.task_order, describe_base(run.cfg))
        summary = read_json(run.summary, 64 * MIB)
        found = summary.get("identity", {}) if isinstance(summary, dict) else None
        if not isinstance(found, dict):
            raise ValueError(f"{run.summary} is no summary of a run")
    except (OSError, ValueError) as error:
        raise UserError(f"{run.summary.parent} cannot be checked: {error}") from error
    if differing := differences({name: found.get(name) for name in wanted}, wanted):
        raise UserError(
            f"{run.summary.parent} holds another run ({differing}): give another --log_dir and "
            "--save_dir, or --overwrite true"
        )


if __name__ == "__main__":
    sys.exit(main())
