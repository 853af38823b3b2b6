"""Drift: how far a model's answers move from those it once gave."""

import torch
from torch import nn

from models.answers import (
    ProbeBuffer,
    everywhere,
    kl_divergence,
    pack,
    read_answers,
    teacher_of_pass,
    unpack,
)
from models.forward import evaluation, response_logits

FIRST_TOKENS = 5
SAMPLES = 25


class Drift:
    """Answers of earlier models, and the mean KL from them to the model as it is now.

    The first response tokens are measured apart: alignment and style show in them first
    (Qi et al. 2024, "Safety alignment should be made more than just a few tokens deep").

    Args:
        model, make_passes, gather: see `methods.method.Tools`.
        top_k: classes kept of an answer.
    """

    def __init__(self, model: nn.Module, make_passes, gather, top_k: int):
        self.model, self.make_passes, self.gather, self.top_k = model, make_passes, gather, top_k
        self.buffers: dict[str, ProbeBuffer] = {}

    def remember(self, name: str, samples) -> None:
        """Keeps the answers of the model as it is now to SAMPLES of `samples`, evenly spread."""
        step = max(1, len(samples) // SAMPLES)
        chosen = [samples[i] for i in range(0, len(samples), step)][:SAMPLES]
        share = read_answers(self.model, self.make_passes, chosen, self.top_k, 1.0)[1]
        answers = everywhere(self.gather, share)
        self.buffers[name] = ProbeBuffer.of(chosen, [answers[i] for i in range(len(chosen))])

    def measure(self, name: str) -> dict[str, float]:
        """{"kl_first", "kl_rest"}: mean KL(then || now), nats per response token.

        Of the first FIRST_TOKENS tokens of each response, and of the others (NaN without any).
        """
        buffer = self.buffers[name]
        samples = [buffer[i] for i in range(len(buffer))]
        sums = torch.zeros(4, dtype=torch.float64)
        with evaluation(self.model):
            for indices, batch, _ in self.make_passes(samples):
                logits = response_logits(self.model, **batch)
                teacher = teacher_of_pass([(buffer, i) for i in indices], logits.device)
                kl = kl_divergence(logits, *teacher).double().cpu()
                places = [torch.arange(int(buffer.response_lengths[i])) for i in indices]
                is_first = torch.cat(places) < FIRST_TOKENS
                sums += torch.stack(
                    [kl[is_first].sum(), kl[~is_first].sum(), is_first.sum(), (~is_first).sum()]
                )
        first, rest, num_first, num_rest = sum(self.gather(sums)).tolist()
        return {
            "kl_first": first / num_first,
            "kl_rest": rest / num_rest if num_rest else float("nan"),
        }

    def state(self) -> dict[str, torch.Tensor]:
        """What `restore` takes up."""
        return pack(self.buffers)

    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        """Takes up what `state` gave."""
        self.buffers = unpack(tensors)
