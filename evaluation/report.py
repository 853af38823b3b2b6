"""What is measured of a sequence, at the base and after each stage, and told at its end."""

import dataclasses
import math
import platform
from functools import partial

import torch
import transformers

from models.drift import Drift
from models.router import Router
from evaluation.questions import PRIMARY, held_out_questions
from training.saving import write_json, write_json_lines
from training.processes import gather, is_first
from evaluation.generate import ask, generate, prompt_ids
from evaluation.matrix import (
    format_matrix,
    format_readings,
    format_samples,
    format_score_matrix,
    format_scores,
    loss_matrix,
    score_matrix,
    summarise,
)
from evaluation.readings import (
    BASE,
    LATEST,
    READINGS,
    Stage,
    add_to_router,
    evaluate_reading,
    readings_of,
)

# Of each task seen, after each stage: answers that a person can read, and their tokens.
SAMPLES_TOLD, SAMPLE_TOKENS = 2, 64


class SequenceReport:
    """The logs of a sequence beside that of its training, and what they need to be written.

    Attributes:
        drift: answers of earlier models, see `models.drift.Drift`.
    """

    def __init__(self, session):
        self.session, self.cfg = session, session.cfg
        self.losses = session.log("seq_eval_loss")
        self.routes = session.log("seq_router")
        self.moved = session.log("seq_drift")
        self.samples = session.log("seq_samples")
        self.scores = session.log("seq_scores")
        drift = Drift(session.model, session.make_passes, gather, self.cfg.kd_top_k)
        self.drift = session.attach("drift", drift)
        router = session.attach("router", Router())
        self.now = Stage(BASE, self.cfg.method, session, router)
        possible = readings_of(self.cfg.method, self.cfg.num_frozen_layers)
        self.others = [reading for reading in possible if reading != LATEST]
        asked = held_out_questions(self.cfg, self.cfg.task_order)
        self.questions = {questions.name: questions for questions in asked}

    def base(self) -> None:
        """Row 0: the untouched model on every task."""
        self.evaluate(self.cfg.task_order)
        self.score(self.cfg.task_order)

    def stage(self, stage: str, seen: list[str], is_last: bool) -> None:
        """Saves the checkpoint of the task just learned, and measures it on the tasks seen."""
        self.now.name = stage
        further = {}
        if any(READINGS[reading].is_routed for reading in self.others):
            add_to_router(self.session, self.now.router, stage)
            further["router"] = self.now.router.state()
        self.session.save_checkpoint(f"seq_{stage}", **further)
        self.evaluate(self.cfg.task_order if self.cfg.all_readings else seen)
        if self.cfg.all_readings or is_last:
            for reading in self.others:
                self.evaluate(seen, reading)
        self.measure_drift()
        self.log_first_answers(seen)
        self.score(seen)

    def evaluate(self, tasks: list[str], reading: str = LATEST) -> None:
        """Logs the held-out loss of `tasks`, read as `reading`."""
        for task in tasks:
            result, answered_as = evaluate_reading(self.now, reading, task)
            stage = self.now.name
            self.losses.write(stage=stage, eval_task=task, branches=reading, **result)
            if READINGS[reading].is_routed:
                self.routes.write(stage=stage, eval_task=task, answered_as=answered_as)
            elif reading == LATEST:
                print(f"after {stage}: {task} held-out loss {result['loss']:.3f} nats per token")

    def measure_drift(self) -> None:
        """Logs how far the answers to earlier tasks have moved; keeps those to this stage's task.

        An earlier task's are those to some of its held-out samples, by the model that had just
        learned it, and those to some of its probes, by the model that chose them.
        """
        stage, with_less_memory = self.now.name, self.session.with_less_memory
        for name in sorted(self.drift.buffers):
            task, teacher = name.split("/")
            moved = with_less_memory(partial(self.drift.measure, name))
            moved = {key: _finite(value) for key, value in moved.items()}
            self.moved.write(stage=stage, probe_task=task, teacher=teacher, **moved)
        if stage in self.cfg.task_order:
            held_out = self.session.data[stage].held_out
            with_less_memory(partial(self.drift.remember, f"{stage}/{stage}", held_out))

    def log_first_answers(self, tasks: list[str]) -> None:
        """Logs the first answers to the held-out samples of `tasks`."""
        asked = [self.questions[task] for task in tasks]
        told = [(q, i) for q in asked for i in range(min(SAMPLES_TOLD, len(q.rows)))]
        rows = [questions.rows[i] for questions, i in told]
        prompts = prompt_ids(self.session.tokenizer, rows, self.cfg.max_seq_len)
        replies = generate(self.session, prompts, SAMPLE_TOKENS, f"{self.now.name}: answers")
        for (of, number), reply in zip(told, replies, strict=True):
            self.samples.write(stage=self.now.name, task=of.name, number=number, reply=reply)

    def score(self, tasks: list[str]) -> None:
        """--generate: logs all answers to the held-out samples of `tasks`, and their scores."""
        for task in tasks if self.cfg.generate else ():
            lines, scores = ask(self.now, LATEST, self.questions[task])
            if is_first():
                path = f"{self.cfg.log_dir}/seq_gen_{self.now.name}_{task}.jsonl"
                write_json_lines(path, lines)
            for line in scores:
                self.scores.write(**line)

    def finish(self) -> None:
        """Prints the tables and writes `seq_summary.json`."""
        if not is_first():
            return
        tasks, joint = self.cfg.task_order, self.cfg.method == "joint"
        evaluations = self.losses.read()
        matrix = loss_matrix(evaluations, tasks)
        print(format_matrix(matrix, tasks, joint))
        if self.others:
            meanings = {name: reading.meaning for name, reading in READINGS.items()}
            if self.cfg.method == "bank":
                meanings |= {LATEST: "the last LoRA", "own": "its own LoRA"}
            print(format_readings(evaluations, tasks, meanings))
        if self.cfg.generate:
            scores, metrics = self.scores.read(), {task: PRIMARY[task] for task in tasks}
            last = list(self.session.position["stages"])[-1]
            print(format_scores([line for line in scores if line["stage"] == last]))
            print(format_score_matrix(score_matrix(scores, metrics), metrics, joint))
        references = {n: [row["output"] for row in q.rows] for n, q in self.questions.items()}
        print(format_samples(self.samples.read(), references))
        on_gpu = self.session.device.type == "cuda"
        write_json(
            f"{self.cfg.log_dir}/seq_summary.json",
            {
                "tasks": tasks,
                "matrix": [[_finite(loss) for loss in row] for row in matrix],
                **{name: _finite(value) for name, value in summarise(matrix, joint).items()},
                "stages": self.session.position["stages"],
                "config": dataclasses.asdict(self.cfg),
                "identity": self.session.identity,
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
