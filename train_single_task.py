"""Trains DS-LoRA on one task: the per-task baseline of the sequence."""

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path

from configs.command_line import Knobs, UserError, knob
from configs.ending import command_line
from evaluation.card import model_card
from evaluation.readings import LATEST
from methods import METHODS, find_method, parse_config
from training.device import select_device as select_device
from training.hub import push_checkpoints
from training.loop import TaskTraining, evaluate_loss
from training.plan import worth_keeping
from training.session import set_up


@dataclass
class SingleTask(Knobs):
    task: str = knob("", "the task to learn, out of those of the configuration")


@command_line
def main(argv=None):
    cfg, single = parse_config(argv, SingleTask, description=__doc__)
    check(cfg, single.task)
    task, name = single.task, f"single_{single.task}"
    cfg = dataclasses.replace(cfg, task_order=[task])
    with set_up(cfg, name, [task]) as session:
        journal, passes, data = session.journal, session.passes, session.data[task]
        train_log, eval_log = journal.log(f"{name}_train_loss"), journal.log(f"{name}_eval_loss")

        def end_epoch(epoch: int):
            checkpoint, base_model = f"{name}_epoch{epoch}", journal.about_base["base_model"]
            journal.save_checkpoint(checkpoint, model_card(cfg, base_model, [task], []))
            result = evaluate_loss(passes, data.held_out)
            eval_log.write(task=task, epoch=epoch, **result)
            losses = [{"stage": f"epoch {epoch}", "eval_task": task, "branches": LATEST, **result}]
            journal.renew_card(checkpoint, model_card(cfg, base_model, [task], losses))
            print(f"{task} epoch {epoch}: held-out loss {result['loss']:.3f} nats per token")

        if not journal.training:
            base = evaluate_loss(passes, data.held_out)
            print(f"{task} untouched base: held-out loss {base['loss']:.3f} nats per token")
        passes.keep_prefix(worth_keeping(cfg, task, data.train), f"frozen layers, {task}")
        options = {"journal": journal, "on_epoch_end": end_epoch}
        TaskTraining(cfg, passes, task, data.train, train_log, **options).run()
        journal.picture(lambda: draw(cfg, task))
        checkpoints = (f"{name}_epoch{epoch}" for epoch in range(1, cfg.num_epochs + 1))
        # Fewer where --max_steps_per_task came before.
        push_checkpoints(cfg, [c for c in checkpoints if (Path(cfg.save_dir) / c).is_dir()])
        journal.finish()


def draw(cfg, task: str) -> Path:
    """The picture of `plot_loss.py single`."""
    # It takes a second that only this needs.
    from plot_loss import plot_single

    return plot_single(Path(cfg.log_dir), task)


def check(cfg, task: str) -> None:
    """Raises `UserError` where there is no such task, or the method needs more than one."""
    problems = []
    if task not in cfg.data_paths:
        given = ", ".join(cfg.data_paths)
        problems.append(f"--task {task or 'is missing'}: give one of {given}")
    if find_method(cfg.method).needs_several_tasks:
        others = " or ".join(n for n, method in METHODS.items() if not method.needs_several_tasks)
        problems.append(f"--method {cfg.method} needs several tasks: give {others}")
    if problems:
        raise UserError("\n".join(problems))


if __name__ == "__main__":
    sys.exit(main())
