"""Greedy answers of the model as it is, or as a reading makes of it."""

import contextlib

import torch
from transformers import GenerationConfig, TextStreamer

from configs.ending import printable
from evaluation.questions import Questions, judge_all
from evaluation.readings import Stage, read_as, sources_of
from models.answers import everywhere
from models.forward import IGNORE, evaluation
from tasks import find_task
from tasks.prompt import PromptTemplate
from training.passes import Passes, progress_bar
from training.processes import gather


def prompt_samples(prompts: list[list[int]]) -> list[dict]:
    """Prompts (token ids) as samples without a response."""
    ids = map(torch.tensor, prompts)
    return [{"id": "", "input_ids": i, "labels": torch.full_like(i, IGNORE)} for i in ids]


def prompt_ids(template: PromptTemplate, rows: list[dict], max_length: int) -> list[list[int]]:
    """The ids of each row's prompt, as in training: what an `InstructionDataset` does not label."""
    return [template.join(prompt, max_length) for prompt in template.prompts(rows)]


def answer_room(stage: Stage, max_new_tokens: int) -> tuple[int, int]:
    """(tokens of a prompt, new tokens) at most, which the model has positions for together.

    The prompt gives way, but not below half of the positions.
    """
    room, config = stage.cfg.max_seq_len, stage.passes.model.config.get_text_config()
    if positions := getattr(config, "max_position_embeddings", None):
        max_new_tokens = min(max_new_tokens, max(positions - room, positions // 2))
        room = min(room, positions - max_new_tokens)
    return room, max_new_tokens


@contextlib.contextmanager
def greedy(model, template: PromptTemplate, max_new_tokens: int):
    """Within the block `model.generate` is greedy up to the end of a reply in `template`.

    Whatever the base model's own settings.
    """
    before = model.generation_config
    model.generation_config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        eos_token_id=template.stop,
        pad_token_id=template.tokenizer.pad_token_id,
    )
    try:
        yield
    finally:
        model.generation_config = before


def left_padded(prompts: list[list[int]], pad: int, device) -> dict[str, torch.Tensor]:
    """ "input_ids" and "attention_mask", (batch, longest) long, each prompt at the right end."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def generate(
    passes: Passes, prompts: list[list[int]], max_new_tokens: int, description: str = "generating"
) -> list[str]:
    """The greedy continuation of each prompt (token ids) up to its end, as text, in their order.

    The samples are shared among the processes; every one gets all answers.
    """
    lengths = [len(prompt) + max_new_tokens for prompt in prompts]
    model, tokenizer = passes.model, passes.tokenizer

    def run() -> dict[int, str]:
        replies, progress = {}, progress_bar(len(prompts), description, "answer")
        with evaluation(model), greedy(model, passes.template, max_new_tokens), progress:
            for batch in passes.batches(lengths):
                chosen = [prompts[i] for i in batch]
                inputs = left_padded(chosen, tokenizer.pad_token_id, passes.device)
                # Each process has batches of its own: of a shared model transformers would have
                # them all go on to the longest answer together.
                outputs = model.generate(**inputs, synced_gpus=False)
                outputs = outputs[:, inputs["input_ids"].shape[1] :]
                texts = tokenizer.batch_decode(outputs, skip_special_tokens=True)
                replies.update(zip(batch, (text.strip() for text in texts), strict=True))
                progress.update(len(batch))
        return replies

    replies = everywhere(gather, passes.with_less_memory(run))
    return [replies[i] for i in range(len(prompts))]


def continue_prompt(
    passes: Passes, prompt: list[int], max_new_tokens: int, streamer: TextStreamer | None = None
) -> list[int]:
    """Ids of the greedy continuation of one prompt (token ids), with the end of the reply."""
    model = passes.model
    with evaluation(model), greedy(model, passes.template, max_new_tokens):
        inputs = left_padded([prompt], passes.tokenizer.pad_token_id, passes.device)
        (ids,) = model.generate(**inputs, streamer=streamer)
    return ids[len(prompt) :].tolist()


class Voice(TextStreamer):
    """Prints an answer token by token; nothing in it steers the terminal."""

    def __init__(self, tokenizer):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        super().on_finalized_text(printable(text), stream_end)


def ask(stage: Stage, reading: str, questions: Questions, max_new_tokens: int = 0):
    """The replies of `stage` to `questions`, judged.

    Returns:
        the lines of `logs/gen_<stage>_<task>.jsonl`, one an answer; the scores, one a metric.
    """
    rows, task = questions.rows, questions.task
    limit = max_new_tokens or questions.about.max_new_tokens
    replies, sources = answer(stage, reading, task, rows, limit)
    judged, scores = judge_all(questions, replies)
    what = {"stage": stage.name, "branches": reading, "task": questions.name}
    is_sensitive = questions.about.is_sensitive
    lines = [
        {
            **what,
            "number": i,
            # Harmful prompts are not copied about.
            "instruction": "" if is_sensitive else row["instruction"],
            "answered_as": source,
            "reply": reply,
            **of_reply,
        }
        for i, (row, source, reply, of_reply) in enumerate(
            zip(rows, sources, replies, judged, strict=True)
        )
    ]
    return lines, [{**what, "metric": metric, **scores[metric]} for metric in scores]


def answer(
    stage: Stage, reading: str, task: str, rows: list[dict], max_new_tokens: int = 0
) -> tuple[list[str], list[str]]:
    """(replies, the task whose branches gave each) to `rows` of `task`, read as `reading`.

    Args:
        max_new_tokens: 0: as many as the task wants.
    """
    room, limit = answer_room(stage, max_new_tokens or find_task(task).max_new_tokens)
    prompts = prompt_ids(stage.passes.template, rows, room)
    replies, sources = [""] * len(rows), [""] * len(rows)
    for source, chosen in sources_of(stage, reading, task, prompt_samples(prompts)).items():
        with read_as(stage, reading, source):
            of_source = [prompts[i] for i in chosen]
            texts = generate(stage.passes, of_source, limit, f"{task} ({reading})")
        for i, text in zip(chosen, texts, strict=True):
            replies[i], sources[i] = text, source
    return replies, sources
