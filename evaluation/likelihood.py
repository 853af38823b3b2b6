"""What a model holds for likely, which needs no generation: an option of a closed set, a better
reply rather than a worse one."""

import inspect

import torch
from torch import nn
from torch.utils.data import Subset

from evaluation.generate import left_padded, prompt_ids, prompt_samples
from evaluation.questions import Questions, score
from evaluation.readings import Stage, read_as, sources_of
from models.answers import everywhere
from models.forward import (
    IGNORE,
    evaluation,
    picked_log_probs,
    response_logits,
    response_tokens,
)
from tasks.choice import LIKELIEST, normal
from tasks.prompt import REJECTED
from training.passes import Passes, progress_bar
from training.processes import gather
from utils_data import InstructionDataset

PREFERRED = "preferred"


def choose(stage: Stage, reading: str, questions: Questions) -> list[dict]:
    """The share of `questions` whose likeliest option is the right one, as a line of the scores.

    Without a line where the task has no options, or no question has one of them as its output.
    """
    options = questions.about.options
    right = {normal(option): i for i, option in enumerate(options)}
    rows = [row for row in questions.rows if normal(row["output"]) in right]
    if not rows:
        return []
    template = stage.passes.template
    responses = template.responses([{"output": option} for option in options])
    room = stage.cfg.max_seq_len - max(map(len, responses))
    prompts = prompt_ids(template, rows, room)
    chosen = {}
    for source, of_source in sources_of(
        stage, reading, questions.task, prompt_samples(prompts)
    ).items():
        with read_as(stage, reading, source):
            losses = option_losses(stage.passes, [prompts[i] for i in of_source], responses)
        chosen.update(zip(of_source, losses.argmin(1).tolist(), strict=True))
    correct = [chosen[i] == right[normal(row["output"])] for i, row in enumerate(rows)]
    return [_line(stage, reading, questions, LIKELIEST, correct)]


def option_losses(
    passes: Passes, prompts: list[list[int]], options: list[list[int]]
) -> torch.Tensor:
    """(prompts, options) fp32: mean loss of each option's tokens after each prompt, in nats.

    A prompt is read once, whatever the number of its options, unless what the model keeps of it
    can be read on only once. The prompts are shared among the processes; every one gets all losses.
    """
    if not passes.has_lasting_cache:
        samples = [_sample(prompt, option) for prompt in prompts for option in options]
        return sample_losses(passes, samples).view(len(prompts), len(options)).float()
    longest = max(map(len, options))
    # After each option the prompt stands in the cache once more.
    lengths = [(len(prompt) + longest) * len(options) for prompt in prompts]

    def run() -> dict[int, torch.Tensor]:
        found = {}
        progress = progress_bar(len(prompts), "likeliest option", "sample")
        with evaluation(passes.model), progress:
            for batch in passes.batches(lengths):
                inputs = left_padded(
                    [prompts[i] for i in batch], passes.tokenizer.pad_token_id, passes.device
                )
                losses = _losses(passes.model, inputs, options, passes.tokenizer.pad_token_id)
                found.update(zip(batch, losses.cpu(), strict=True))
                progress.update(len(batch))
        return found

    losses = everywhere(gather, passes.with_less_memory(run))
    return torch.stack([losses[i] for i in range(len(prompts))])


def _sample(prompt: list[int], response: list[int]) -> dict:
    """A sample of token ids; without an id, as its prefix is not kept."""
    labels = torch.tensor([IGNORE] * len(prompt) + response)
    return {"id": "", "input_ids": torch.tensor(prompt + response), "labels": labels}


def _losses(model: nn.Module, inputs: dict, options: list[list[int]], pad: int) -> torch.Tensor:
    """Of one batch of prompts, padded on the left: (batch, options) fp32."""
    mask, n = inputs["attention_mask"], len(options)
    longest = max(map(len, options))
    ids = torch.tensor([o + [pad] * (longest - len(o)) for o in options], device=mask.device)
    lengths = torch.tensor([len(o) for o in options], device=mask.device)

    known = inspect.signature(model.forward).parameters

    def more(of_mask: torch.Tensor, last: int, keep: int) -> dict:
        # Padding does not count. Models without positions are told none.
        positions = (of_mask.cumsum(-1) - 1).clamp(min=0)[:, -last:]
        wanted = {"position_ids": positions, "logits_to_keep": keep}
        return {name: value for name, value in wanted.items() if name in known}

    read = model(**inputs, **more(mask, mask.shape[1], keep=1), use_cache=True)
    cache = read.past_key_values
    cache.batch_repeat_interleave(n)
    of_option = ids.repeat(len(mask), 1)
    whole = torch.cat([mask.repeat_interleave(n, 0), torch.ones_like(of_option)], 1)
    after = model(
        input_ids=of_option,
        attention_mask=whole,
        **more(whole, longest, keep=longest),
        past_key_values=cache,
        use_cache=True,
    )
    first = read.logits[:, -1:].repeat_interleave(n, 0)
    logits = torch.cat([first, after.logits[:, :-1]], 1)
    log_probs = picked_log_probs(logits.flatten(0, 1), of_option.flatten()[:, None])
    counts = torch.arange(longest, device=mask.device) < lengths[:, None]
    total = (log_probs.view(len(mask), n, longest) * counts).sum(-1)
    return -total / lengths


def prefer(stage: Stage, reading: str, questions: Questions) -> list[dict]:
    """The share of pairs whose output the model holds for likelier than the rejected reply.

    By the mean log-likelihood of a token. As a line of the scores; none without such pairs.
    """
    rows = [row for row in questions.rows if row.get(REJECTED)]
    passes, length = stage.passes, stage.cfg.max_seq_len

    def sample(row: dict, key: str) -> InstructionDataset:
        whole = [{**row, "output": row[key]}]
        return InstructionDataset(whole, passes.tokenizer, length, passes.template.kind)

    pairs = [[sample(row, key) for row in rows] for key in ("output", REJECTED)]
    # One that has no room for a reply is in no pair.
    whole = [i for i in range(len(rows)) if all(len(of_key[i]) for of_key in pairs)]
    if not whole:
        return []
    chosen, rejected = ([of_key[i][0] for i in whole] for of_key in pairs)
    correct = {}
    for source, of_source in sources_of(stage, reading, questions.task, chosen).items():
        with read_as(stage, reading, source):
            better, worse = (
                sample_losses(passes, Subset(samples, of_source)) for samples in (chosen, rejected)
            )
        correct.update(zip(of_source, (better < worse).tolist(), strict=True))
    return [_line(stage, reading, questions, PREFERRED, list(correct.values()))]


def sample_losses(passes: Passes, samples) -> torch.Tensor:
    """(n,) fp64: each sample's mean loss of a response token, in nats."""

    def run() -> dict[int, float]:
        found = {}
        with evaluation(passes.model), progress_bar(len(samples), "likelihood", "sample") as bar:
            for indices, batch, targets in passes.make(samples):
                log_probs = picked_log_probs(
                    response_logits(passes.model, **batch), targets[:, None]
                )
                rows = batch["positions"] // batch["input_ids"].shape[1]
                sums = torch.zeros(len(indices), dtype=torch.float64, device=passes.device)
                sums.index_add_(0, rows, -log_probs[:, 0].double())
                for i, of_sample in zip(indices, sums.tolist(), strict=True):
                    found[i] = of_sample / response_tokens(samples[i])
                bar.update(len(indices))
        return found

    losses = everywhere(gather, passes.with_less_memory(run))
    return torch.tensor([losses[i] for i in range(len(samples))], dtype=torch.float64)


def by_likelihood(stage: Stage, reading: str, questions: Questions) -> list[dict]:
    """All scores of `questions` that need no reply, as lines of the scores."""
    return choose(stage, reading, questions) + prefer(stage, reading, questions)


def _line(stage: Stage, reading: str, questions: Questions, metric: str, right: list) -> dict:
    what = {"stage": stage.name, "branches": reading, "task": questions.name, "metric": metric}
    return {**what, **score(right)}
