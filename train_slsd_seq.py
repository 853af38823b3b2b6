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
from utils_checkpoint import JsonlLog, write_json
from utils_distributed import gather, is_first
from utils_metrics import format_matrix, loss_matrix, summarise
from utils_plan import visits_again
from utils_session import set_up
from utils_train import evaluate_loss, seed_torch, train_task


@command_line
def main(argv=None):
    (cfg,) = parse_config(argv, description=__doc__)
    tasks = cfg.task_order
    with set_up(cfg, "seq", tasks) as session:
        train_log, eval_log = session.log("seq_train_loss"), session.log("seq_eval_loss")
        slsd = make_slsd(cfg, session) if cfg.use_slsd else None

        def evaluate(stage: str, seen: list[str]):
            for task in seen:
                result = evaluate_loss(session, session.data[task].held_out, f"{stage}: {task}")
                eval_log.write(stage=stage, eval_task=task, branches="latest", **result)
                print(f"after {stage}: {task} held-out loss {result['loss']:.3f} nats per token")

        if not session.position:
            evaluate("base", tasks)
            session.position = {"stages_done": 0, "stages": {}}
            session.save()
        for t in range(session.position["stages_done"], len(tasks)):
            task, start = tasks[t], time.perf_counter()
            probes = train_one_task_with_slsd(cfg, session, task, train_log, slsd if t else None)
            trained = time.perf_counter()
            session.save_checkpoint(f"seq_{task}")
            evaluate(task, tasks[: t + 1])
            session.position["stages_done"] = t + 1
            session.position["stages"][task] = {
                "probes": probes,
                "train_seconds": trained - start,
                "evaluate_seconds": time.perf_counter() - trained,
            }
            session.save()

        if is_first():
            matrix = loss_matrix(eval_log.read(), tasks)
            print(format_matrix(matrix, tasks))
            write_summary(cfg, session, matrix)
        session.finish()


def make_slsd(cfg, session) -> SLSD:
    """The auxiliary loss that the configuration asks for."""
    return SLSD(
        session.model,
        branch_parameters(session.model, "fast"),
        session.make_passes,
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
    )


def train_one_task_with_slsd(cfg, session, task: str, log: JsonlLog, slsd: SLSD | None) -> int:
    """One stage: the probe buffer from the model as it is now, then the training of both branches.

    `slsd` is None for the first task, which has no previous model, and without distillation.
    Returns the number of probes.
    """
    samples = session.data[task].train
    with session.kept_prefix() as keep:
        if visits_again(cfg, len(samples)):
            keep(samples, f"frozen layers, {task}")
        if session.training:
            if slsd:
                slsd.restore(session.training[1]["aux"])
        else:
            begin_stage(cfg, session, task, slsd)
        buffer = slsd.buffer if slsd and slsd.buffer else []
        probes = len(buffer)
        keep([buffer.sample(i) for i in range(probes)], "frozen layers, probes")
        train_task(cfg, session, task, log, aux=slsd, stage=task)
    if slsd:
        slsd.end_task()
    return probes


def begin_stage(cfg, session, task: str, slsd: SLSD | None) -> None:
    """What happens before a task's first step, and not again where the task is resumed."""
    if slsd:
        samples = session.data[task].train
        session.with_less_memory(lambda: slsd.begin_task(task, samples))
        report_probes(cfg, task, slsd)
    if cfg.fast_init == "fresh":
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


def write_summary(cfg, session, matrix) -> None:
    """Writes `seq_summary.json`: NaN becomes null."""

    def finite(value: float):
        return value if math.isfinite(value) else None

    write_json(
        f"{cfg.log_dir}/seq_summary.json",
        {
            "tasks": cfg.task_order,
            "matrix": [[finite(loss) for loss in row] for row in matrix],
            **{name: finite(value) for name, value in summarise(matrix).items()},
            "stages": session.position["stages"],
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
