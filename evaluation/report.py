"""What is measured of a sequence, at the base and after each stage, and told at its end."""

import dataclasses
import math
import platform
from functools import partial

import torch
import transformers

from configs.command_line import is_first
from evaluation.card import model_card
from evaluation.generate import answer_room, ask, generate, prompt_ids
from evaluation.likelihood import choose, keep_options, prefer
from evaluation.matrix import (
    format_costs,
    format_matrix,
    format_readings,
    format_samples,
    format_score_matrix,
    format_scores,
    loss_matrix,
    primary_metrics,
    score_matrix,
    summarise,
    summarise_scores,
)
from evaluation.questions import held_out_questions
from evaluation.readings import (
    BASE,
    LATEST,
    READINGS,
    Stage,
    add_to_router,
    evaluate_reading,
    possible_readings,
)
from methods import find_method
from models.drift import Drift
from tasks.choice import LIKELIEST
from training.processes import gather
from training.saving import write_json, write_json_lines
from training.session import Session

# Of each task seen, after each stage: answers that a person can read, and their tokens.
ANSWERS_SHOWN, ANSWER_TOKENS = 2, 64


class SequenceReport:
    """The logs of a sequence beside that of its training, and what they need to be written.

    Attributes:
        drift: answers of earlier models, see `models.drift.Drift`.
    """

    def __init__(self, cfg, session: Session):
        self.cfg, self.passes, self.journal = cfg, session.passes, session.journal
        self.losses, self.routes, self.drift_log, self.samples, self.scores = (
            self.journal.log(f"seq_{name}")
            for name in ("eval_loss", "router", "drift", "samples", "scores")
        )
        drift = Drift(self.passes.model, self.passes.make, gather, cfg.kd_top_k)
        self.drift = self.journal.attach("drift", drift)
        self.now = Stage(BASE, cfg, self.passes, session.data)
        self.journal.attach("router", self.now.router)
        self.method = find_method(cfg.method)
        possible = possible_readings(self.method, self.passes)
        self.others = [reading for reading in possible if reading != LATEST]
        self.questions = {
            task: held_out_questions(
                cfg, task, session.data[task].held_out_rows, session.data[task].outputs
            )
            for task in cfg.task_order
        }
        # Here, where a resumed run comes by too: what is kept changes the last bits.
        for questions in self.questions.values():
            keep_options(cfg, self.passes, questions)

    def base(self) -> None:
        """Row 0: the untouched model on every task."""
        if self.cfg.light_evaluation:
            return
        self.evaluate(self.cfg.task_order)
        self.score(self.cfg.task_order)

    def stage(self, stage: str, seen: list[str], is_last: bool) -> None:
        """Saves the checkpoint of the task just learned, and measures it on the tasks seen."""
        self.now.name = stage
        further = {}
        if any(READINGS[reading].is_routed for reading in self.others):
            add_to_router(self.now)
            further["router"] = self.now.router.state()
        self.journal.save_checkpoint(f"seq_{stage}", self.card(seen), **further)
        if self.cfg.light_evaluation:
            further = seen if is_last else [stage]
            self.evaluate(further)
        else:
            further = self.cfg.task_order if self.cfg.all_readings else seen
            self.evaluate([*further, *self.next_choice(further)])
            if self.cfg.all_readings or is_last:
                for reading in self.others:
                    self.evaluate(seen, reading)
            self.measure_drift()
            self.log_first_answers(seen)
        self.journal.renew_card(f"seq_{stage}", self.card(seen))
        self.score(further)

    def next_choice(self, seen: list[str]) -> list[str]:
        """The task that is learned next, where it is a choice: papers report forward transfer."""
        later = self.cfg.task_order[len(seen) :][:1]
        return [task for task in later if self.questions[task].about.options]

    def card(self, seen: list[str]) -> str:
        """The model card of the stage, with what is known by now."""
        losses = self.losses.read() if is_first() else []
        return model_card(self.cfg, self.journal.about_base["base_model"], seen, losses)

    def evaluate(self, tasks: list[str], reading: str = LATEST) -> None:
        """Logs the held-out loss of `tasks`, read as `reading`, and of choices the accuracy."""
        for task in tasks:
            lines, known = choose(self.now, reading, self.questions[task])
            result, answered_as = evaluate_reading(self.now, reading, task, known)
            stage = self.now.name
            self.losses.write(stage=stage, eval_task=task, branches=reading, **result)
            for line in lines:
                self.scores.write(**line)
            if READINGS[reading].is_routed:
                self.routes.write(stage=stage, eval_task=task, answered_as=answered_as)
            elif reading == LATEST:
                print(f"after {stage}: {task} held-out loss {result['loss']:.3f} nats per token")

    def measure_drift(self) -> None:
        """Logs how far the answers to earlier tasks have moved; keeps those to this stage's task.

        An earlier task's are those to some of its held-out samples, by the model that had just
        learned it, and those to some of its probes, by the model that chose them.
        """
        stage, with_less_memory = self.now.name, self.passes.with_less_memory
        for name in sorted(self.drift.buffers):
            task, teacher = name.split("/")
            divergences = with_less_memory(partial(self.drift.measure, name))
            divergences = {key: _finite(value) for key, value in divergences.items()}
            self.drift_log.write(stage=stage, probe_task=task, teacher=teacher, **divergences)
        if stage in self.cfg.task_order:
            held_out = self.now.data[stage].held_out
            with_less_memory(partial(self.drift.remember, f"{stage}/{stage}", held_out))

    def log_first_answers(self, tasks: list[str]) -> None:
        """Logs the first answers to the held-out samples of `tasks`."""
        first = [
            (task, number, row)
            for task in tasks
            for number, row in enumerate(self.questions[task].rows[:ANSWERS_SHOWN])
        ]
        rows = [row for *_, row in first]
        room, limit = answer_room(self.now, ANSWER_TOKENS)
        prompts = prompt_ids(self.passes.template, rows, room)
        replies = generate(self.passes, prompts, limit, f"{self.now.name}: answers")
        for (task, number, _), reply in zip(first, replies, strict=True):
            self.samples.write(stage=self.now.name, task=task, number=number, reply=reply)

    def score(self, tasks: list[str]) -> None:
        """--generate: logs all answers to the held-out samples of `tasks`, and their scores."""
        for task in tasks if self.cfg.generate else ():
            lines, scores = ask(self.now, LATEST, self.questions[task])
            scores += prefer(self.now, LATEST, self.questions[task])
            if is_first():
                path = f"{self.cfg.log_dir}/seq_gen_{self.now.name}_{task}.jsonl"
                write_json_lines(path, lines)
            for line in scores:
                self.scores.write(**line)

    def finish(self) -> None:
        """Prints the tables and writes `seq_summary.json`."""
        if not is_first():
            return
        tasks, joint = self.cfg.task_order, self.method.merges_tasks
        evaluations = self.losses.read()
        matrix = loss_matrix(evaluations, tasks)
        print(format_matrix(matrix, tasks, joint))
        if self.others and not self.cfg.light_evaluation:
            meanings = {name: reading.meaning for name, reading in READINGS.items()}
            print(format_readings(evaluations, tasks, meanings | self.method.meanings))
        stages = self.journal.position["stages"]
        print(format_costs(stages))
        scores = self.scores.read()
        if self.cfg.generate:
            last = list(stages)[-1]
            print(format_scores([line for line in scores if line["stage"] == last]))
            primary = primary_metrics(scores, {t: q.about for t, q in self.questions.items()})
            print(format_score_matrix(score_matrix(scores, primary), primary, joint))
        accuracy = {}
        if any(line["metric"] == LIKELIEST for line in scores):
            choices = {task: LIKELIEST for task in tasks}
            accuracies = score_matrix(scores, choices)
            print(format_score_matrix(accuracies, choices, joint))
            accuracy = {
                "matrix": [[_finite(cell) for cell in row] for row in accuracies],
                **{k: _finite(v) for k, v in summarise_scores(accuracies, joint).items()},
            }
        references = {n: [row["output"] for row in q.rows] for n, q in self.questions.items()}
        if samples := self.samples.read():
            print(format_samples(samples, references))
        on_gpu = self.passes.device.type == "cuda"
        write_json(
            f"{self.cfg.log_dir}/seq_summary.json",
            {
                "tasks": tasks,
                "matrix": [[_finite(loss) for loss in row] for row in matrix],
                **{name: _finite(value) for name, value in summarise(matrix, joint).items()},
                # Of choices, by likelihood, 0 to 100; empty where no task is one.
                "accuracy": accuracy,
                "stages": stages,
                "is_one_model": self.method.is_one_model,
                "config": dataclasses.asdict(self.cfg),
                "identity": self.journal.identity,
                "versions": {
                    "python": platform.python_version(),
                    "torch": torch.__version__,
                    "transformers": transformers.__version__,
                },
                "device": torch.cuda.get_device_name() if on_gpu else "cpu",
            },
        )


def _finite(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None
