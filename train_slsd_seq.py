"""Trains the tasks in order with DS-LoRA + SLSD and evaluates every task seen after each stage.

--method trains one of the baselines instead, in the same loop.
"""

import dataclasses
import math
import platform
import sys
import time

import torch
import transformers
from torch.utils.data import ConcatDataset

from configs.base_config import command_line, parse_config
from models.baselines import EWC, Bank, Baseline, Replay
from models.drift import Drift
from models.ds_lora import BRANCHES, branch_parameters, reset_branch
from models.router import Router
from models.slsd import SLSD
from utils_benchmarks import Questions, held_out_questions
from utils_checkpoint import JsonlLog, write_json, write_json_lines
from utils_data import TaskData
from utils_distributed import gather, is_first
from utils_generate import ask, generate, prompt_ids
from utils_metrics import (
    format_matrix,
    format_readings,
    format_samples,
    format_scores,
    loss_matrix,
    summarise,
)
from utils_plan import visits_again
from utils_readings import (
    BASE,
    LATEST,
    READINGS,
    Stage,
    add_to_router,
    evaluate_reading,
    readings_of,
)
from utils_session import set_up
from utils_train import seed_torch, train_task

# Of each task seen, after each stage: answers that a person can read, and their tokens.
SAMPLES_TOLD, SAMPLE_TOKENS = 2, 64


@command_line
def main(argv=None):
    (cfg,) = parse_config(argv, description=__doc__)
    tasks = cfg.task_order
    with set_up(cfg, "seq", tasks) as session:
        train_log, eval_log = session.log("seq_train_loss"), session.log("seq_eval_loss")
        drift_log = session.log("seq_drift")
        method = session.attach("method", make_method(cfg, session))
        drift = Drift(session.model, session.make_passes, gather, cfg.kd_top_k)
        session.attach("drift", drift)
        router_log, router = session.log("seq_router"), session.attach("router", Router())
        sample_log, score_log = session.log("seq_samples"), session.log("seq_scores")
        now = Stage(BASE, cfg.method, session, router)
        others = [name for name in readings_of(cfg.method, cfg.num_frozen_layers) if name != LATEST]
        questions = {asked.name: asked for asked in held_out_questions(cfg, tasks)}
        stages = tasks
        if cfg.method == "joint":
            cfg, stages = one_stage(cfg, session)

        def evaluate(seen: list[str], reading: str = LATEST):
            for task in seen:
                result, answered_as = evaluate_reading(now, reading, task)
                eval_log.write(stage=now.name, eval_task=task, branches=reading, **result)
                if READINGS[reading].is_routed:
                    router_log.write(stage=now.name, eval_task=task, answered_as=answered_as)
                elif reading == LATEST:
                    loss = result["loss"]
                    print(f"after {now.name}: {task} held-out loss {loss:.3f} nats per token")

        if not session.position:
            evaluate(tasks)
            session.position = {"stages_done": 0, "stages": {}}
            session.save()
        for t in range(session.position["stages_done"], len(stages)):
            now.name = stage = stages[t]
            start = time.perf_counter()
            previous = stages[t - 1] if t else None
            probes = train_one_task_with_slsd(
                cfg, session, stage, train_log, method, previous, drift
            )
            trained = time.perf_counter()
            routed = any(READINGS[name].is_routed for name in others)
            if routed:
                add_to_router(session, router, stage)
            session.save_checkpoint(
                f"seq_{stage}", **({"router": router.state()} if routed else {})
            )
            seen = tasks if cfg.method == "joint" else tasks[: t + 1]
            evaluate(tasks if cfg.all_readings else seen)
            if cfg.all_readings or t + 1 == len(stages):
                for reading in others:
                    evaluate(seen, reading)
            measure_drift(session, drift, drift_log, stage, tasks)
            log_answers(cfg, now, [questions[task] for task in seen], sample_log, score_log)
            session.position["stages_done"] = t + 1
            session.position["stages"][stage] = {
                "probes": probes,
                "train_seconds": trained - start,
                "evaluate_seconds": time.perf_counter() - trained,
            }
            session.save()

        if is_first():
            evaluations = eval_log.read()
            matrix, joint = loss_matrix(evaluations, tasks), cfg.method == "joint"
            print(format_matrix(matrix, tasks, joint))
            if others:
                meanings = {name: reading.meaning for name, reading in READINGS.items()}
                print(format_readings(evaluations, tasks, meanings))
            if cfg.generate:
                last = [line for line in score_log.read() if line["stage"] == now.name]
                print(format_scores(last))
            references = {n: [r["output"] for r in q.rows] for n, q in questions.items()}
            print(format_samples(sample_log.read(), references))
            write_summary(session, matrix, summarise(matrix, joint))
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
            probe_size_per_task=sys.maxsize,
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
                drift.remember(f"{task}/{previous}", method.buffer)
    if cfg.method == "ds_lora" and cfg.fast_init == "fresh":
        # After the probes were read: their teacher is the whole model of the last stage.
        seed_torch(cfg.seed, task, "fast branch")
        reset_branch(session.model, "fast")


def measure_drift(session, drift: Drift, log: JsonlLog, stage: str, tasks: list[str]) -> None:
    """Logs how far the answers to each earlier task have moved; keeps those to this stage's task.

    An earlier task's are those to some of its held-out samples, by the model that had just learned
    it, and those to some of its probes, by the model that chose them.
    """
    for name in drift.buffers:
        task, teacher = name.split("/")
        moved = {k: v if math.isfinite(v) else None for k, v in drift.measure(name).items()}
        log.write(stage=stage, probe_task=task, teacher=teacher, **moved)
    if stage in tasks:
        drift.remember(f"{stage}/{stage}", session.data[stage].held_out)


def log_answers(cfg, now: Stage, asked: list[Questions], samples: JsonlLog, scores: JsonlLog):
    """Logs the first answers to each task's held-out samples; --generate: all, with scores."""
    told = [(q, i) for q in asked for i in range(min(SAMPLES_TOLD, len(q.rows)))]
    prompts = prompt_ids(now.session.tokenizer, [q.rows[i] for q, i in told], cfg.max_seq_len)
    replies = generate(now.session, prompts, SAMPLE_TOKENS, f"{now.name}: answers")
    for (of, number), reply in zip(told, replies, strict=True):
        samples.write(stage=now.name, task=of.name, number=number, reply=reply)
    for of in asked if cfg.generate else ():
        lines, found = ask(now, LATEST, of)
        if is_first():
            write_json_lines(f"{cfg.log_dir}/gen_{now.name}_{of.name}.jsonl", lines)
        for line in found:
            scores.write(**line)


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


def write_summary(session, matrix, metrics: dict[str, float]) -> None:
    """Writes `seq_summary.json`: NaN becomes null."""

    def finite(value: float):
        return value if math.isfinite(value) else None

    write_json(
        f"{session.cfg.log_dir}/seq_summary.json",
        {
            "tasks": session.cfg.task_order,
            "matrix": [[finite(loss) for loss in row] for row in matrix],
            **{name: finite(value) for name, value in metrics.items()},
            "stages": session.position["stages"],
            "config": dataclasses.asdict(session.cfg),
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
            "device": torch.cuda.get_device_name() if session.device.type == "cuda" else "cpu",
        },
    )


if __name__ == "__main__":
    sys.exit(main())
