"""Trains DS-LoRA on one task: the per-task baseline of the sequence."""

import sys
from dataclasses import dataclass

from configs.base_config import TASKS, UserError, command_line, knob, parse_config
from training.plan import visits_again
from training.session import set_up
from training.loop import evaluate_loss, train_task


@dataclass
class SingleTask:
    task: str = knob("", f"the task to learn: {', '.join(TASKS)}")

    def __post_init__(self):
        if self.task not in TASKS:
            raise UserError(f"--task {self.task or 'is missing'}: give one of {', '.join(TASKS)}")


@command_line
def main(argv=None):
    cfg, single = parse_config(argv, SingleTask, description=__doc__)
    if cfg.method not in ("ds_lora", "seq_lora"):
        raise UserError(f"--method {cfg.method} needs several tasks: give ds_lora or seq_lora")
    task, name = single.task, f"single_{single.task}"
    with set_up(cfg, name, [task]) as session:
        train_log, eval_log = session.log(f"{name}_train_loss"), session.log(f"{name}_eval_loss")

        def end_epoch(epoch: int):
            session.save_checkpoint(f"{name}_epoch{epoch}")
            result = evaluate_loss(session, session.data[task].held_out)
            eval_log.write(task=task, epoch=epoch, **result)
            print(f"{task} epoch {epoch}: held-out loss {result['loss']:.3f} nats per token")

        if not session.training:
            base = evaluate_loss(session, session.data[task].held_out)
            print(f"{task} untouched base: held-out loss {base['loss']:.3f} nats per token")
        samples = session.data[task].train
        with session.kept_prefix() as keep:
            if visits_again(cfg, len(samples)):
                keep(samples, f"frozen layers, {task}")
            train_task(cfg, session, task, train_log, on_epoch_end=end_epoch)
        session.finish()


if __name__ == "__main__":
    sys.exit(main())
