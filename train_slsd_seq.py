"""Trains the tasks in order with DS-LoRA + SLSD and evaluates every task seen after each stage.

--method trains one of the baselines instead, in the same loop.
"""

import dataclasses
import sys
import time

from torch.utils.data import ConcatDataset

from configs.base_config import command_line, num_processes, parse_config
from methods.ewc import EWC, Bank, Baseline, Replay
from models.drift import Drift
from models.ds_lora import BRANCHES, branch_parameters, reset_branch
from models.answers import SLSD
from training.saving import JsonlLog
from utils_data import TaskData
from training.processes import gather
from training.plan import count_steps, visits_again
from evaluation.report import SequenceReport
from training.session import set_up
from training.loop import seed_torch, train_task


@command_line
def main(argv=None):
    (cfg,) = parse_config(argv, description=__doc__)
    with set_up(cfg, "seq", cfg.task_order) as session:
        train_log = session.log("seq_train_loss")
        method = session.attach("method", make_method(cfg, session))
        report, stages = SequenceReport(session), cfg.task_order
        if cfg.method == "joint":
            cfg, stages = one_stage(cfg, session)

        if not session.position:
            report.base()
            session.position = {"stages_done": 0, "stages": {}}
            session.save()
        for t in range(session.position["stages_done"], len(stages)):
            stage, previous = stages[t], stages[t - 1] if t else None
            if not session.training:
                session.started = time.perf_counter()
            probes = train_one_task_with_slsd(
                cfg, session, stage, train_log, method, previous, report.drift
            )
            trained = time.perf_counter()
            seen = cfg.task_order if stage == "joint" else stages[: t + 1]
            report.stage(stage, seen, is_last=t + 1 == len(stages))
            session.position["stages_done"] = t + 1
            session.position["stages"][stage] = {
                "probes": probes,
                "train_seconds": trained - session.started,
                "evaluate_seconds": time.perf_counter() - trained,
            }
            session.save()
        report.finish()
        session.finish()


def make_method(cfg, session) -> SLSD | Baseline:
    """What is done beside the supervised training of each task, as `--method` asks."""
    model, make_passes = session.model, session.make_passes
    if cfg.method == "replay":
        return Replay(
            model,
            make_passes,
            fraction=cfg.replay_fraction,
            batch_size=cfg.replay_batch_size,
            seed=cfg.seed,
        )
    if cfg.method == "ewc":
        params = [p for branch in BRANCHES for p in branch_parameters(model, branch)]
        return EWC(
            model,
            params,
            make_passes,
            gather,
            processes=num_processes(),
            weight=cfg.ewc_lambda,
            num_samples=cfg.probe_size_per_task,
            seed=cfg.seed,
        )
    if cfg.method == "bank":
        return Bank(model, seed_torch, cfg.seed)
    if cfg.method == "lwf":
        # Learning without forgetting (Li & Hoiem 2017): all samples, all that is trained.
        cfg = dataclasses.replace(
            cfg,
            probe_choice="random",
            probe_size_per_task=probes_read(cfg, session),
            kd_branches="all",
            kd_forward="joint",
            kd_probes="current",
        )
    elif cfg.method != "ds_lora" or not cfg.use_slsd:
        return Baseline()
    return SLSD(
        model,
        make_passes,
        gather,
        weight=cfg.kd_lambda,
        temperature=cfg.kd_temperature,
        top_k=cfg.kd_top_k,
        batch_size=cfg.kd_batch_size,
        every=cfg.kd_every,
        probe_size=cfg.probe_size_per_task,
        pool_factor=cfg.probe_pool_factor,
        threshold=cfg.entropy_threshold,
        seed=cfg.seed,
        choice=cfg.probe_choice,
        branches=cfg.kd_branches,
        forward=cfg.kd_forward,
        probes=cfg.kd_probes,
    )


def probes_read(cfg, session) -> int:
    """How many samples a task's distillation reads; more would only be kept."""
    steps = max(count_steps(cfg, len(session.data[task].train))[1] for task in cfg.task_order)
    return cfg.kd_batch_size * -(-steps // cfg.kd_every)


def one_stage(cfg, session):
    """All tasks as one, with the steps of all: the configuration and the name of its only stage."""
    everything = ConcatDataset([session.data[task].train for task in cfg.task_order])
    session.data["joint"] = TaskData(train=everything, held_out=None)
    steps = cfg.max_steps_per_task * len(cfg.task_order)
    return dataclasses.replace(cfg, max_steps_per_task=steps), ["joint"]


def train_one_task_with_slsd(
    cfg, session, task: str, log: JsonlLog, method, previous=None, drift: Drift | None = None
) -> int:
    """One stage: the probe buffer from the model as it is now, then the training of both branches.

    `previous` is the stage before this one; the first one has none, and nothing to distil.
    Returns the number of samples that the method read beside the task's own.
    """
    samples = session.data[task].train
    with session.kept_prefix() as keep:
        if visits_again(cfg, len(samples)):
            keep(samples, f"frozen layers, {task}")
        if not session.training:
            begin_stage(cfg, session, task, method, previous, drift)
        others = method.auxiliary_samples()
        keep(others, "frozen layers, probes")
        train_task(cfg, session, task, log, aux=method, stage=task)
    session.with_less_memory(lambda: method.end_task(task, samples))
    return len(others)


def begin_stage(cfg, session, task: str, method, previous: str | None, drift: Drift | None) -> None:
    """What happens before a task's first step, and not again where the task is resumed."""
    if previous:
        samples = session.data[task].train
        session.with_less_memory(lambda: method.begin_task(task, samples))
        if isinstance(method, SLSD):
            report_probes(cfg, task, method)
            if drift and method.buffer:
                name, buffer = f"{task}/{previous}", method.buffer
                session.with_less_memory(lambda: drift.remember(name, buffer))
    if cfg.method == "ds_lora" and cfg.fast_init == "fresh":
        # After the probes were read: their teacher is the whole model of the last stage.
        seed_torch(cfg.seed, task, "fast branch")
        reset_branch(session.model, "fast")


def report_probes(cfg, task: str, slsd: SLSD) -> None:
    """Prints how many probes were chosen, and warns where no sample was sure enough."""
    seen = slsd.pool_entropies
    if slsd.buffer is None:
        print(
            f"warning: {task} trains without distillation: its surest sample has an entropy of "
            f"{min(seen):.2f} nats per token, above --entropy_threshold {cfg.entropy_threshold}",
            file=sys.stderr,
        )
    else:
        print(
            f"{task}: {len(slsd.buffer)} probes out of {len(seen)} samples of entropy "
            f"{min(seen):.2f} to {max(seen):.2f} nats per token"
        )


if __name__ == "__main__":
    sys.exit(main())
