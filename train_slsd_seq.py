"""Trains the tasks in order with DS-LoRA + SLSD and evaluates every task seen after each stage.

--method trains one of the other methods instead, in the same loop.
"""

import dataclasses
import operator
import sys
import time
from functools import reduce
from pathlib import Path

from configs.command_line import num_processes
from configs.ending import command_line
from evaluation.report import SequenceReport
from methods import find_method, parse_config
from methods.method import JOINT, Method, Tools
from models.drift import Drift
from training.device import select_device as select_device
from training.hub import push_checkpoints
from training.logs import JsonlLog
from training.loop import TaskTraining
from training.plan import count_steps, worth_keeping
from training.processes import gather, sum_over_processes
from training.session import Session, set_up
from utils_data import TaskData


@command_line
def main(argv=None):
    (cfg,) = parse_config(argv, description=__doc__)
    with set_up(cfg, "seq", cfg.task_order) as session:
        journal = session.journal
        train_log = journal.log("seq_train_loss")
        method = journal.attach("method", make_method(cfg, session))
        report, stages = SequenceReport(cfg, session), cfg.task_order
        drift = None if cfg.light_evaluation else report.drift
        if method.merges_tasks:
            cfg, stages = one_stage(cfg, session)

        if not journal.position:
            report.base()
            journal.position = {"stages_done": 0, "stages": {}}
            journal.save()
        for t in range(journal.position["stages_done"], len(stages)):
            stage, previous = stages[t], stages[t - 1] if t else None
            is_last = t + 1 == len(stages)
            if not journal.training:
                journal.started = time.perf_counter()
                journal.position["read_before"] = session.passes.samples_read_by_all()
            with session.passes.kept_prefix():
                probes = train_one_task_with_slsd(
                    cfg, session, stage, train_log, method, previous, is_last, drift
                )
                trained = time.perf_counter()
                costs = costs_of_stage(cfg, session, stage, method)
                report.stage(stage, cfg.task_order if stage == JOINT else stages[: t + 1], is_last)
            journal.position["stages_done"] = t + 1
            journal.position["stages"][stage] = {
                "probes": probes,
                "train_seconds": trained - journal.started,
                "evaluate_seconds": time.perf_counter() - trained,
                **costs,
            }
            journal.save()
        report.finish()
        journal.picture(lambda: draw(cfg))
        push_checkpoints(cfg, [f"seq_{stage}" for stage in stages])
        journal.finish()


def draw(cfg) -> Path:
    """The picture of `plot_loss.py seq`."""
    # It takes a second that only this needs.
    from plot_loss import plot_sequence

    return plot_sequence(Path(cfg.log_dir))


def costs_of_stage(cfg, session: Session, stage: str, method: Method) -> dict:
    """What the method keeps now, and how many samples it read a step, with a backward and without.

    All that the stage read counts, also before its first step and after its last.
    """
    before, now = session.journal.position["read_before"], session.passes.samples_read_by_all()
    _, steps = count_steps(cfg, len(session.data[stage].train))
    kept = sum(tensor.nbytes for tensor in method.state().values())
    if kept:
        print(f"{stage}: {method.num_kept} samples and {kept / 2**20:.1f} MiB are kept for later")
    return {
        "samples_kept": method.num_kept,
        "bytes_kept": kept,
        "samples_a_step": {kind: (now[kind] - before[kind]) / steps for kind in now},
    }


def make_method(cfg, session: Session) -> Method:
    """What is done beside the supervised training of each task, as `--method` asks."""
    steps = (count_steps(cfg, len(session.data[task].train))[1] for task in cfg.task_order)
    passes = session.passes
    tools = Tools(
        passes.model,
        passes.make,
        gather,
        sum_over_processes,
        num_processes(),
        max(steps),
        passes.with_less_memory,
    )
    return find_method(cfg.method)(cfg, tools)


def one_stage(cfg, session: Session):
    """All tasks as one, with the steps of all: the configuration and the name of its only stage."""
    everything = reduce(operator.add, (session.data[task].train for task in cfg.task_order))
    session.data[JOINT] = TaskData(train=everything, held_out=None)
    steps = cfg.max_steps_per_task * len(cfg.task_order)
    return dataclasses.replace(cfg, max_steps_per_task=steps), [JOINT]


def train_one_task_with_slsd(
    cfg,
    session: Session,
    task: str,
    log: JsonlLog,
    method: Method,
    previous: str | None = None,
    is_last: bool = True,
    drift: Drift | None = None,
) -> int:
    """One stage: what the method reads with the model as it is now, then the training.

    `previous` is the stage before this one; the first one has none, and nothing to distil.
    Returns the number of samples that the method read beside the task's own.
    """
    samples, passes = session.data[task].train, session.passes
    passes.keep_prefix(worth_keeping(cfg, task, samples), f"frozen layers, {task}")
    if not session.journal.training:
        begin_stage(session, task, method, previous, drift)
    others = method.auxiliary_samples()
    passes.keep_prefix(others, "frozen layers, probes")
    options = {"method": method, "journal": session.journal, "stage": task}
    TaskTraining(cfg, passes, task, samples, log, **options).run()
    method.end_task(task, samples, is_last)
    return len(others)


def begin_stage(
    session: Session, task: str, method: Method, previous: str | None, drift: Drift | None
) -> None:
    """What happens before a task's first step, and not again where the task is resumed."""
    samples = session.data[task].train
    line = method.read_task(task, samples, previous)
    if line:
        print(line, file=sys.stderr if line.startswith("warning") else sys.stdout)
    if drift and previous and method.probes:
        name, probes, passes = f"{task}/{previous}", method.probes, session.passes
        read = dict(passes.samples_read)
        passes.with_less_memory(lambda: drift.remember(name, probes))
        # A measurement, which is no part of what the method reads.
        passes.samples_read = read
    method.begin_task(task, samples, previous)


if __name__ == "__main__":
    sys.exit(main())
