"""Runs train_slsd_seq.py for every method, order and seed, one or several at a time, and compares.

A finished run is left alone and an interrupted one goes on, so the same command may be given again
and again. Every other option goes to all runs, whose folders lie below --log_dir and --save_dir.
--runs FILE takes tables of such options from a file; what is given beside it wins.
"""

import dataclasses
import hashlib
import itertools
import sys
from dataclasses import dataclass
from pathlib import Path

import plot_loss
from configs.command_line import (
    Knobs,
    Stopped,
    UserError,
    as_flags,
    default_of,
    knob,
    value_of_option,
)
from configs.ending import command_line
from configs.run_file import read_runs
from evaluation.finished import brief_names
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
RESERVED |= {"push_to_hub"}
NUMBERED = list(TASKS)
DIGITS = "".join(str(number) for number in range(1, len(NUMBERED) + 1))


@dataclass
class Experiments(Knobs):
    methods: list[str] = knob(
        list(VARIANTS),
        f"out of {', '.join(VARIANTS)}; settings of its own follow a comma: slsd,kd_lambda=3, and "
        "'slsd,kd_lambda=1|3' is one with each",
    )
    seeds: list[int] = knob([], "of branch weights, samples, their order, probes; none: --seed")
    orders: list[str] = knob(
        [],
        "of the tasks: 12345 as specified, 51234 with safety first; law,medicine; or the name of "
        "an order of the configuration; none: --task_order",
    )
    against: str = knob("", "one of the methods: the comparison pairs all others with it")
    runs: str = knob("", "FILE or FILE,TABLE,...: tables of options in YAML; all, or those named")
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
    method: str  # with its settings, as it was given
    argv: list[str]
    cfg: object

    @property
    def summary(self) -> Path:
        """Written last: the run is finished where it is."""
        return Path(self.cfg.log_dir) / "seq_summary.json"


@dataclass
class Table:
    """Runs that are compared with one another, in the folder `log_dir`."""

    log_dir: str
    against: str
    runs: list[Experiment]


@command_line
def main(argv=None):
    argv = list(sys.argv[1:] if argv is None else argv)
    tables, cfg, experiments = plan_tables(argv)
    places = find_places(experiments.jobs, cfg.device)
    first, step = experiments.share
    runs = [run for table in tables for run in table.runs]
    commands = {}
    for number, run in list(enumerate(runs, 1))[first::step]:
        name = f"[{number}/{len(runs)}] {run.name}"
        if run.summary.exists() and not run.cfg.overwrite:
            print(f"{name}: finished", flush=True)
        elif run.cfg.dry_run:
            print(f"{name}: would be run", flush=True)
        else:
            commands[run.name] = command(cfg, name, run, experiments.jobs)
    codes, stopped = run_side_by_side(list(commands.values()), places)
    if stopped:
        raise Stopped(stopped)
    failed = [name for name, of_run in commands.items() if codes[of_run.name]]
    failed += [f"the comparison in {table.log_dir}" for table in tables if not compare(table)]
    if failed:
        raise UserError(f"failed: {', '.join(failed)}; see above for each")


def compare(table: Table) -> bool:
    """Whether the finished runs of a table could be compared; there may be none yet."""
    done = [run for run in table.runs if run.summary.exists()]
    argv = ["compare", *(str(run.summary.parent) for run in done), "--log_dir", table.log_dir]
    if any(run.method == table.against for run in done):
        argv += ["--against", table.against]
    return not done or not plot_loss.main(argv)


def plan_tables(argv: list[str]) -> tuple[list[Table], object, Experiments]:
    """The tables of --runs, or the one that the command line is; what was given for the first.

    Raises `UserError` with all that is wrong.
    """
    wanted, tables, problems, first = value_of_option(argv, "--runs"), [], [], ()
    for name, options in (read_runs(wanted) if wanted else {"": []}).items():
        # What comes last counts.
        given = [*options, *argv]
        try:
            cfg, experiments = parse_config(
                given, Experiments, description=__doc__, every_method=True
            )
            runs = plan(cfg, experiments, given, f"{name}/" if name else "")
            reference = find_reference(experiments.against, [run.method for run in runs])
        except UserError as error:
            problems += [f"{name}: {p}" if name else p for p in str(error).splitlines()]
            continue
        tables.append(Table(f"{cfg.log_dir}/{name}".rstrip("/"), reference, runs))
        first = first or (cfg, experiments)
    if problems:
        raise UserError("\n".join(problems))
    return tables, *first


def find_reference(against: str, methods: list[str]) -> str:
    """Which of `methods` is meant; as in the tables it need not have all its settings."""
    methods = list(dict.fromkeys(methods))
    named = dict(zip(brief_names(methods), methods, strict=True)) | {m: m for m in methods}
    if against and against not in named:
        raise UserError(f"--against {against}: give one of {', '.join(methods)}")
    return named.get(against, "")


def variants_of(entry: str) -> list[str]:
    """slsd,kd_lambda=1|3 is two: slsd,kd_lambda=1 and slsd,kd_lambda=3."""
    name, *own = entry.split(",")
    choices = []
    for setting in own:
        key, is_set, values = setting.partition("=")
        choices.append([f"{key}{is_set}{value}" for value in values.split("|")])
    return [",".join([name, *chosen]) for chosen in itertools.product(*choices)]


def plan(cfg, experiments, argv, within: str = "") -> list[Experiment]:
    """Every run, all seeds of one kind after another, in folders below `within`.

    Raises `UserError` with all that is wrong.
    """
    runs, problems = [], []
    if cfg.push_to_hub:
        problems.append("--push_to_hub is for one run: all of these would go to one repository")
    orders = {}
    for order in experiments.orders or [""]:
        try:
            tasks = tasks_of(cfg, order)
            orders[label_of(cfg, order, tasks)] = tasks
        except UserError as error:
            problems.append(str(error))
    entries = [variant for entry in experiments.methods for variant in variants_of(entry)]
    for entry in entries:
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
                folder = f"{within}{group}/seed{seed}"
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
                    runs.append(Experiment(folder, entry, flags, run_cfg))
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
    # How the base was held is decided where it runs.
    found = {k: v for k, v in found.items() if k in wanted or k not in ("dtype", "processes")}
    if differing := differences(found, wanted):
        raise UserError(
            f"{run.summary.parent} holds another run ({differing}): give another --log_dir and "
            "--save_dir, or --overwrite true"
        )


if __name__ == "__main__":
    sys.exit(main())
