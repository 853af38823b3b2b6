"""Kept samples of earlier tasks: what every method that replays shares."""

import random
from dataclasses import dataclass
from functools import partial

from configs.command_line import Knobs, knob
from models.answers import PackedSamples, ProbeBuffer, everywhere, pack, read_answers, unpack
from models.forward import cross_entropy, response_logits, response_tokens


@dataclass
class MemoryKnobs(Knobs):
    memory_per_task: float = knob(
        0.02, "samples of each earlier task that are kept; below 1: its share of them", above=0
    )
    memory_batch_size: int = knob(
        4, "kept samples that are read again at each step", at_least=1, at_most=10**5
    )


def num_kept_of(cfg, size: int) -> int:
    """How many of a task's `size` samples are kept: at least one."""
    wanted = cfg.memory_per_task
    return min(max(1, int(wanted) if wanted >= 1 else round(wanted * size)), size)


def sample_bytes(cfg, samples: int) -> int:
    """About what so many kept samples take: ids of 4 bytes, an id of the whole, two lengths."""
    return samples * (4 * cfg.max_seq_len + 48)


def answer_bytes(cfg, model, samples: int) -> int:
    """About what so many samples take with their answers: of each class a number and its id.

    A response is taken to have 256 tokens, a long one.
    """
    tokens = samples * min(cfg.max_seq_len, 256)
    return sample_bytes(cfg, samples) + tokens * (6 * _classes(cfg, model) + 4)


def teacher_bytes(cfg, model, positions: int) -> int:
    """About what the divergence from cached answers at so many positions takes on the device.

    Ids, log-probabilities of both, their difference, p and their product.
    """
    return positions * _classes(cfg, model) * 40


def _classes(cfg, model) -> int:
    return cfg.kd_top_k or model.config.get_text_config().vocab_size


def choose_kept(cfg, task: str, samples) -> list[dict]:
    """The samples of `task` that are kept, the same for every method."""
    size = num_kept_of(cfg, len(samples))
    order = random.Random(f"{cfg.seed}/{task}/replay").sample(range(len(samples)), size)
    # What a restored state gives, and nothing else: before and after a resume they are alike.
    return list(PackedSamples.build([samples[i] for i in order]))


def draw(cfg, samples: list, step: int, what: str = "") -> list[int]:
    """The numbers of the kept samples that are read at `step`."""
    order = random.Random(f"{cfg.seed}/{len(samples)}/{step}{what}")
    return order.sample(range(len(samples)), min(cfg.memory_batch_size, len(samples)))


def learn_again(model, make_passes, samples: list[dict], backward, weight: float = 1.0) -> None:
    """Leaves the gradient of `weight` times the mean cross entropy of the response tokens."""
    tokens = sum(map(response_tokens, samples))
    for _, batch, targets in make_passes(samples):
        loss = cross_entropy(response_logits(model, **batch), targets)
        backward(weight * loss / tokens)


class KeptAnswers:
    """Kept samples of earlier tasks, with the answers of the model that had just learned them."""

    def __init__(self, cfg, tools):
        self.cfg, self.tools = cfg, tools
        self.of_tasks: list[ProbeBuffer] = []

    @staticmethod
    def kept_bytes(cfg, model, sizes: list[int]) -> int:
        """About what they take after tasks of so many samples."""
        return sum(answer_bytes(cfg, model, num_kept_of(cfg, size)) for size in sizes)

    def __len__(self) -> int:
        return sum(map(len, self.of_tasks))

    def samples(self) -> list[dict]:
        return [sample for buffer in self.of_tasks for sample in buffer]

    def draw(self, step: int, what: str = "") -> list[tuple[ProbeBuffer, int]]:
        """(buffer, number in it) of the samples that are read at `step`."""
        every = [(buffer, i) for buffer in self.of_tasks for i in range(len(buffer))]
        return [every[i] for i in draw(self.cfg, every, step, what)]

    def keep(self, task: str, samples) -> None:
        """Some of `task`'s samples, which the model reads once as it is now."""
        kept, tools = choose_kept(self.cfg, task, samples), self.tools
        read = partial(read_answers, tools.model, tools.make_passes, kept, self.cfg.kd_top_k, 1.0)
        answers = everywhere(tools.gather, tools.with_less_memory(read)[1])
        self.of_tasks.append(ProbeBuffer.of(kept, [answers[i] for i in range(len(kept))]))

    def state(self):
        return pack({f"kept_{n:04d}": buffer for n, buffer in enumerate(self.of_tasks)})

    def restore(self, tensors):
        kept = {key: tensor for key, tensor in tensors.items() if key.startswith("kept_")}
        self.of_tasks = list(unpack(kept).values())
