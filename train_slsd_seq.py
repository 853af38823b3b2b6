"""Trains the tasks in order with DS-LoRA + SLSD and evaluates every task seen after each stage."""

import dataclasses
import math
import platform
import sys
import time

import torch
import transformers

from configs.base_config import command_line, parse_config
from models.ds_lora import branch_parameters, reset_branch
from models.slsd import SLSD
from utils_checkpoint import JsonlLog, save_checkpoint, write_json
from utils_metrics import format_matrix, loss_matrix, summarise
from utils_train import evaluate_loss, seed_torch, set_up, train_task


@command_line
def main(argv=None):
    (cfg,) = parse_config(argv, description=__doc__)
    tasks = cfg.task_order
    session = set_up(cfg, "seq", tasks)
    slsd = make_slsd(cfg, session) if cfg.use_slsd else None
    evaluations, stages = [], {}

    with (
        JsonlLog(f"{cfg.log_dir}/seq_train_loss.jsonl") as train_log,
        JsonlLog(f"{cfg.log_dir}/seq_eval_loss.jsonl") as eval_log,
    ):

        def evaluate(stage: str, seen: list[str]):
            for task in seen:
                result = evaluate_loss(session, session.data[task].held_out, f"{stage}: {task}")
                line = {"stage": stage, "eval_task": task, "branches": "latest", **result}
                eval_log.write(**line)
                evaluations.append(line)
                print(f"after {stage}: {task} held-out loss {result['loss']:.3f} nats per token")

        evaluate("base", tasks)
        for t, task in enumerate(tasks):
            start = time.perf_counter()
            probes = train_one_task_with_slsd(cfg, session, task, train_log, slsd if t else None)
            trained = time.perf_counter()
            path = f"{cfg.save_dir}/seq_{task}"
            save_checkpoint(path, session.model, session.tokenizer, session.about_base)
            evaluate(task, tasks[: t + 1])
            stages[task] = {
                "train_seconds": trained - start,
                "evaluate_seconds": time.perf_counter() - trained,
                "probes": probes,
            }

    matrix = loss_matrix(evaluations, tasks)
    print(format_matrix(matrix, tasks))
    write_summary(cfg, session, matrix, stages)


def make_slsd(cfg, session) -> SLSD:
    """The auxiliary loss that the configuration asks for."""
    return SLSD(
        session.model,
        branch_parameters(session.model, "fast"),
        session.make_passes,
        weight=cfg.kd_lambda,
        temperature=cfg.kd_temperature,
        top_k=cfg.kd_top_k,
        batch_size=cfg.kd_batch_size,
        every=cfg.kd_every,
        probe_size=cfg.probe_size_per_task,
        pool_factor=cfg.probe_pool_factor,
        threshold=cfg.entropy_threshold,
        seed=cfg.seed,
    )


def train_one_task_with_slsd(cfg, session, task: str, log: JsonlLog, slsd: SLSD | None) -> int:
    """One stage: the probe buffer from the model as it is now, then the training of both branches.

    `slsd` is None for the first task, which has no previous model, and without distillation.
    Returns the number of probes.
    """
    probes = 0
    if slsd:
        slsd.begin_task(task, session.data[task].train)
        probes = report_probes(cfg, task, slsd)
    if cfg.fast_init == "fresh":
        # After the probes were read: their teacher is the whole model of the last stage.
        seed_torch(cfg.seed, task, "fast branch")
        reset_branch(session.model, "fast")
    train_task(cfg, session, task, log, aux=slsd, stage=task)
    if slsd:
        slsd.end_task()
    return probes


def report_probes(cfg, task: str, slsd: SLSD) -> int:
    """Prints how many probes were chosen, and warns where no sample was sure enough."""
    seen = slsd.pool_entropies
    if slsd.buffer is None:
        print(
            f"warning: {task} trains without distillation: its surest sample has an entropy of "
            f"{min(seen):.2f} nats per token, above --entropy_threshold {cfg.entropy_threshold}",
            file=sys.stderr,
        )
        return 0
    print(
        f"{task}: {len(slsd.buffer)} probes out of {len(seen)} samples of entropy "
        f"{min(seen):.2f} to {max(seen):.2f} nats per token"
    )
    return len(slsd.buffer)


def write_summary(cfg, session, matrix, stages: dict) -> None:
    """Writes `seq_summary.json`: NaN becomes null."""

    def finite(value: float):
        return value if math.isfinite(value) else None

    write_json(
        f"{cfg.log_dir}/seq_summary.json",
        {
            "tasks": cfg.task_order,
            "matrix": [[finite(loss) for loss in row] for row in matrix],
            **{name: finite(value) for name, value in summarise(matrix).items()},
            "stages": stages,
            "config": dataclasses.asdict(cfg),
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
