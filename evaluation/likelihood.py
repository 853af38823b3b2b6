"""What a model holds for likely, which needs no generation: an option of a closed set, a better
reply rather than a worse one."""

import hashlib

import torch
from torch.utils.data import Subset

from evaluation.generate import prompt_ids, prompt_samples
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


def choose(
    stage: Stage, reading: str, questions: Questions
) -> tuple[list[dict], dict[tuple, float]]:
    """The share of `questions` whose likeliest option is the right one, as a line of the scores.

    Without a line where the task has no options, or no question has one of them as its output.
    Returns also the loss of each prompt (token ids) with its right option, in nats a token.
    """
    rows, right = _answerable(questions)
    if not rows:
        return [], {}
    prompts, responses = _prompts_and_options(stage.cfg, stage.passes, questions, rows)
    losses = torch.empty(len(prompts), len(responses))
    for source, of_source in sources_of(
        stage, reading, questions.task, prompt_samples(prompts)
    ).items():
        with read_as(stage, reading, source):
            found = option_losses(stage.passes, [prompts[i] for i in of_source], responses)
        losses[of_source] = found
    numbers = torch.tensor(right)
    correct = (losses.argmin(1) == numbers).tolist()
    texts = [(*prompts[i], *responses[number]) for i, number in enumerate(right)]
    known = dict(zip(texts, losses.gather(1, numbers[:, None])[:, 0].tolist(), strict=True))
    return [_line(stage, reading, questions, LIKELIEST, correct)], known


def keep_options(cfg, passes: Passes, questions: Questions) -> None:
    """Keeps what the frozen layers make of the questions' options, for all that `choose` reads."""
    rows, _ = _answerable(questions)
    if rows:
        samples = _branching(passes, *_prompts_and_options(cfg, passes, questions, rows))
        passes.keep_prefix(samples, f"frozen layers, {questions.task} options")


def _answerable(questions: Questions) -> tuple[list[dict], list[int]]:
    """(the rows whose output is an option, the number of that option)."""
    numbers = {normal(option): i for i, option in enumerate(questions.about.options)}
    rows = [row for row in questions.rows if normal(row["output"]) in numbers]
    return rows, [numbers[normal(row["output"])] for row in rows]


def _prompts_and_options(cfg, passes: Passes, questions: Questions, rows: list[dict]):
    """Token ids of (the prompt of each of `rows`, each option)."""
    options = [{"output": option} for option in questions.about.options]
    responses = passes.template.responses(options)
    room = cfg.max_seq_len - max(map(len, responses))
    return prompt_ids(passes.template, rows, room), responses


def _branching(passes: Passes, prompts: list[list[int]], options: list[list[int]]) -> list[dict]:
    """Each prompt with all options as one sample; none where the model cannot read such rows."""
    samples = [branching_sample(prompt, options) for prompt in prompts]
    longest = max(len(sample["input_ids"]) for sample in samples)
    return samples if passes.branches_to(longest) else []


def option_losses(
    passes: Passes, prompts: list[list[int]], options: list[list[int]]
) -> torch.Tensor:
    """(prompts, options) fp32: mean loss of each option's tokens after each prompt, in nats.

    A prompt is read once, whatever the number of its options, where the model reads rows that
    branch. The prompts are shared among the processes; every one gets all losses.
    """
    samples = _branching(passes, prompts, options)
    if not samples:
        samples = [_sample(prompt, option) for prompt in prompts for option in options]
        return sample_losses(passes, samples).view(len(prompts), len(options)).float()
    lengths = torch.tensor([len(option) for option in options])

    def run() -> dict[int, torch.Tensor]:
        found = {}
        progress = progress_bar(len(samples), "likeliest option", "sample")
        with evaluation(passes.model), progress:
            for indices, batch, targets in passes.make(samples):
                logits = response_logits(passes.model, **batch)
                log_probs = picked_log_probs(logits, targets[:, None]).view(len(indices), -1)
                of_options = log_probs.cpu().split(lengths.tolist(), dim=1)
                totals = torch.stack([of_option.sum(1) for of_option in of_options], 1)
                found.update(zip(indices, -totals / lengths, strict=True))
                progress.update(len(indices))
        return found

    losses = everywhere(gather, passes.with_less_memory(run))
    return torch.stack([losses[i] for i in range(len(prompts))])


def branching_sample(prompt: list[int], options: list[list[int]]) -> dict:
    """`prompt` with all `options` after it, each of which follows the prompt: one sample.

    "parents" (length,) long: the token that each one follows, see `told_of_branches`.
    """
    ids, parents = list(prompt), [0, *range(len(prompt) - 1)]
    for option in options:
        parents += [len(prompt) - 1, *range(len(ids), len(ids) + len(option) - 1)]
        ids += option
    input_ids, follows = torch.tensor(ids), torch.tensor(parents)
    labels = torch.where(torch.arange(len(ids)) < len(prompt), IGNORE, input_ids)
    name = hashlib.sha256(torch.stack([input_ids, follows]).numpy().tobytes()).hexdigest()
    return {"id": name, "input_ids": input_ids, "labels": labels, "parents": follows}


def _sample(prompt: list[int], response: list[int]) -> dict:
    """A sample of token ids; without an id, as its prefix is not kept."""
    labels = torch.tensor([IGNORE] * len(prompt) + response)
    return {"id": "", "input_ids": torch.tensor(prompt + response), "labels": labels}


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
    return choose(stage, reading, questions)[0] + prefer(stage, reading, questions)


def _line(stage: Stage, reading: str, questions: Questions, metric: str, right: list) -> dict:
    what = {"stage": stage.name, "branches": reading, "task": questions.name, "metric": metric}
    return {**what, **score(right)}
