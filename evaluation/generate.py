"""Greedy answers of the model as it is, or as a reading makes of it."""

import contextlib

import torch
from tqdm import tqdm
from transformers import GenerationConfig

from configs.base_config import num_processes
from models.forward import evaluation
from models.router import Router
from models.answers import everywhere
from evaluation.questions import Questions, judge_all
from utils_data import IGNORE, PromptTemplate
from training.processes import gather, rank, shows_progress
from evaluation.readings import read_as, sources_of

# New tokens at most: all but a few of the training responses are shorter.
MAX_NEW_TOKENS = {
    "T1_general": 192,
    "T2_math": 256,
    "T3_code": 192,
    "T4_tool": 192,
    "T5_safety": 128,
}
SENSITIVE = "T5_safety"
# A token in the cache takes far less memory than one in a training pass.
TOKENS_IN_CACHE = 16


def prompt_ids(tokenizer, rows: list[dict], max_length: int) -> list[list[int]]:
    """The ids of each row's prompt, as in training: what an `InstructionDataset` does not label."""
    template = PromptTemplate(tokenizer)
    return [template.join(prompt, max_length) for prompt in template.prompts(rows)]


@contextlib.contextmanager
def greedy(model, tokenizer, max_new_tokens: int):
    """Within the block `model.generate` is greedy, whatever the base model's own settings."""
    before = model.generation_config
    model.generation_config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
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
    session, prompts: list[list[int]], max_new_tokens: int, description: str = "generating"
) -> list[str]:
    """The greedy continuation of each prompt (token ids) up to eos, as text, in their order.

    The samples are shared among the processes; every one gets all answers.
    """
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
    mine = order[rank() :: num_processes()]
    tokenizer, device = session.tokenizer, session.device

    def run() -> dict[int, str]:
        replies, start = {}, 0
        progress = tqdm(
            total=len(mine),
            desc=description,
            unit="answer",
            leave=False,
            disable=not shows_progress(),
        )
        with evaluation(session.model), greedy(session.model, tokenizer, max_new_tokens), progress:
            while start < len(mine):
                if num_processes() == 1:
                    session.stop.check()
                longest = len(prompts[mine[start]]) + max_new_tokens
                size = max(1, TOKENS_IN_CACHE * session.tokens_per_pass // longest)
                batch = mine[start : start + size]
                session.samples_in_pass = len(batch)
                inputs = left_padded([prompts[i] for i in batch], tokenizer.pad_token_id, device)
                outputs = session.model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
                texts = tokenizer.batch_decode(outputs, skip_special_tokens=True)
                replies.update(zip(batch, (text.strip() for text in texts), strict=True))
                start += len(batch)
                progress.update(len(batch))
        return replies

    replies = everywhere(gather, session.with_less_memory(run))
    return [replies[i] for i in range(len(prompts))]


def ask(stage, reading: str, questions: Questions, max_new_tokens: int = 0):
    """The replies of a `evaluation.readings.Stage` to `questions`, judged.

    Returns:
        the lines of `logs/gen_<stage>_<task>.jsonl`, one an answer; the scores, one a metric.
    """
    rows, task = questions.rows, questions.task
    replies, sources = answer(
        stage.session, stage.method, reading, task, rows, stage.router, max_new_tokens
    )
    judged, scores = judge_all(questions, replies)
    what = {"stage": stage.name, "branches": reading, "task": questions.name}
    lines = [
        {
            **what,
            "number": i,
            # Harmful prompts are not copied about.
            "instruction": "" if task == SENSITIVE else row["instruction"],
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
    session,
    method: str,
    reading: str,
    task: str,
    rows: list[dict],
    router: Router,
    max_new_tokens: int = 0,
) -> tuple[list[str], list[str]]:
    """(replies, the task whose branches gave each) to `rows` of `task`, read as `reading`.

    Args:
        max_new_tokens: 0: MAX_NEW_TOKENS of the task.
    """
    prompts = prompt_ids(session.tokenizer, rows, session.cfg.max_seq_len)
    samples = [
        {"id": "", "input_ids": ids, "labels": torch.full_like(ids, IGNORE)}
        for ids in map(torch.tensor, prompts)
    ]
    replies, sources = [""] * len(rows), [""] * len(rows)
    for source, chosen in sources_of(session, reading, task, samples, router).items():
        with read_as(session, method, reading, source):
            texts = generate(
                session,
                [prompts[i] for i in chosen],
                max_new_tokens or MAX_NEW_TOKENS[task],
                f"{task} ({reading})",
            )
        for i, text in zip(chosen, texts, strict=True):
            replies[i], sources[i] = text, source
    return replies, sources
