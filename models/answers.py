"""A model's answers, kept small: its likeliest classes at each response token, and the rest as one.

And the divergence from answers that were kept to those of the model as it is now.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from models.forward import (
    IGNORE,
    block_rows,
    evaluation,
    picked_log_probs,
    response_logits,
    response_tokens,
    to_device,
)


def entropy(logits: torch.Tensor) -> torch.Tensor:
    """H(softmax(logits)) in nats: (n, vocabulary) any float dtype -> (n,) fp32."""
    lowest, parts = torch.finfo(torch.float32).min, []
    # A few rows at a time: at 8,192 positions of 128,256 classes an fp32 copy is 3.9 GiB.
    for rows in logits.split(block_rows(logits)):
        log_p = rows.float().log_softmax(-1)
        # 0 log 0 = 0: the clamp spares a class without mass from being 0 times infinity.
        parts.append(-(log_p.exp() * log_p.clamp(min=lowest)).sum(-1))
    return torch.cat(parts) if parts else logits[:, 0].float()


def _log_of_rest(log_mass: torch.Tensor) -> torch.Tensor:
    """log(1 - exp(log_mass)); the mass of the classes left out is 0 where rounding says so."""
    return torch.log(-torch.expm1(log_mass.clamp(max=0.0)))


def coarsen(logits: torch.Tensor, k: int, temperature: float = 1.0):
    """The k likeliest classes of softmax(logits / temperature), and one tail class of all others.

    Args:
        logits: (n, vocabulary), any float dtype.
        k: classes kept; 0 or more than the vocabulary: all, and the tail has mass 0.

    Returns:
        log_probs (n, k) fp32, ids (n, k) int64, log_tail (n,) fp32 (-inf where its mass is 0).
    """
    vocabulary = logits.shape[-1]
    k = min(k, vocabulary) or vocabulary
    ids = logits.topk(k).indices
    log_probs = picked_log_probs(logits, ids, temperature)
    if k == vocabulary:
        return log_probs, ids, torch.full_like(log_probs[:, 0], -math.inf)
    return log_probs, ids, _log_of_rest(log_probs.logsumexp(-1))


def compact(log_probs: torch.Tensor, ids: torch.Tensor, log_tail: torch.Tensor):
    """`coarsen`'s answers in the dtypes in which they are kept: fp16, int32, fp32."""
    return log_probs.half(), ids.int(), log_tail.float()


def kl_divergence(
    logits: torch.Tensor,
    log_probs: torch.Tensor,
    ids: torch.Tensor,
    log_tail: torch.Tensor,
    temperature: float = 1.0,
) -> torch.Tensor:
    """KL(teacher || student) over the teacher's k classes and the tail, position by position.

    Exact for the two coarsened distributions, and the full KL where k is the vocabulary. A class
    without mass in the teacher contributes neither loss nor gradient.

    Args:
        logits: (n, vocabulary), the student's, any float dtype; the backward overwrites them, see
            `picked_log_probs`.
        log_probs, ids, log_tail: the teacher's `coarsen(...)` at the same temperature.

    Returns:
        (n,) fp32, nats.
    """
    kept = picked_log_probs(logits, ids, temperature)
    # The tail's gradient is infinite where the student leaves it no mass: fp32 cannot tell less
    # than its own rounding apart, and where the teacher has no tail there is none to follow.
    has_tail = log_tail != -math.inf
    mass = kept.logsumexp(-1).clamp(max=-torch.finfo(torch.float32).eps)
    tail = _log_of_rest(torch.where(has_tail, mass, -1.0))
    log_p = torch.cat([log_probs, log_tail[:, None]], dim=-1)
    log_q = torch.cat([kept, tail[:, None]], dim=-1)
    p = log_p.exp()
    return torch.where(p == 0, 0.0, p * (log_p - log_q)).sum(-1)


def kd_loss(logits, log_probs, ids, log_tail, temperature: float = 1.0) -> torch.Tensor:
    """temperature^2 times the sum of `kl_divergence` (Hinton et al. 2015, section 2): a scalar."""
    return temperature**2 * kl_divergence(logits, log_probs, ids, log_tail, temperature).sum()


@dataclass
class PackedSamples:
    """m samples of T tokens in all, as few tensors: what a method keeps and a state holds."""

    sample_ids: torch.Tensor  # (m, 32) uint8: the sha256 of the sample's text
    lengths: torch.Tensor  # (m,) int64: tokens of each sample
    response_lengths: torch.Tensor  # (m,) int64: response tokens of each sample, its last ones
    input_ids: torch.Tensor  # (T,) int32

    def __post_init__(self):
        self._starts = F.pad(self.lengths.cumsum(0), (1, 0)).tolist()

    @classmethod
    def build(cls, samples: list[dict], **more):
        """From samples with "id" (hex), "input_ids" and "labels"; `more` fields of a subclass."""
        return cls(
            sample_ids=torch.tensor(
                [list(bytes.fromhex(s["id"])) for s in samples], dtype=torch.uint8
            ),
            lengths=torch.tensor([len(s["input_ids"]) for s in samples]),
            response_lengths=torch.tensor([response_tokens(s) for s in samples]),
            input_ids=torch.cat([s["input_ids"] for s in samples]).int(),
            **more,
        )

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int) -> dict:
        """Sample i as "id" (hex), "input_ids" (t,) long and "labels" (t,) long."""
        if not 0 <= i < len(self):
            raise IndexError(i)
        input_ids = self.input_ids[self._starts[i] : self._starts[i + 1]].long()
        labels = input_ids.clone()
        labels[: len(labels) - int(self.response_lengths[i])] = IGNORE
        return {
            "id": bytes(self.sample_ids[i].tolist()).hex(),
            "input_ids": input_ids,
            "labels": labels,
        }

    def tensors(self) -> dict[str, torch.Tensor]:
        """The fields by name."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


@dataclass
class ProbeBuffer(PackedSamples):
    """Probe samples with the teacher's answers: N response tokens in all.

    Each probe carries its own tokens, so answers cannot be paired with another sample's. Rows of
    the answers follow the probes in order, and each probe's response tokens in order.
    """

    log_probs: torch.Tensor  # (N, k) fp16
    ids: torch.Tensor  # (N, k) int32
    log_tail: torch.Tensor  # (N,) fp32

    def __post_init__(self):
        super().__post_init__()
        self._response_starts = F.pad(self.response_lengths.cumsum(0), (1, 0)).tolist()

    @classmethod
    def of(cls, samples: list[dict], answers: list[tuple]) -> "ProbeBuffer":
        """From samples and, for each of them, `compact(*coarsen(...))` of its response."""
        log_probs, ids, log_tail = (torch.cat(parts) for parts in zip(*answers, strict=True))
        return cls.build(samples, log_probs=log_probs, ids=ids, log_tail=log_tail)

    def answers(self, i: int):
        """The teacher's log_probs (n, k) fp32, ids (n, k) int64, log_tail (n,) fp32 of probe i."""
        rows = slice(self._response_starts[i], self._response_starts[i + 1])
        log_probs, log_tail = self.log_probs[rows].float(), self.log_tail[rows]
        # Stored in half precision they sum to 1 only nearly, which would bias the gradient.
        total = torch.cat([log_probs, log_tail[:, None]], dim=-1).logsumexp(-1)
        return log_probs - total[:, None], self.ids[rows].long(), log_tail - total


def teacher_of_pass(probes: list[tuple[ProbeBuffer, int]], device: torch.device) -> list:
    """The answers of the probes (buffer, number) of a pass, one after another, on `device`.

    log_probs (n, k) fp32, ids (n, k) int64 and log_tail (n,) fp32, as `kl_divergence` takes them.
    """
    answers = zip(*(buffer.answers(i) for buffer, i in probes), strict=True)
    return [to_device(torch.cat(parts), device) for parts in answers]


def read_answers(model: nn.Module, make_passes, samples, top_k: int, temperature: float):
    """The model as it is now reads this process's share of `samples` once, in eval mode.

    Returns:
        {index: mean entropy in nats per response token}, {index: `compact(*coarsen(...))`}.
    """
    entropies, answers = {}, {}
    with evaluation(model):
        for indices, batch, _ in make_passes(samples):
            logits = response_logits(model, **batch)
            counts = [response_tokens(samples[i]) for i in indices]
            parts = [entropy(logits), *coarsen(logits, top_k, temperature)]
            of_samples = zip(*(part.cpu().split(counts) for part in parts), strict=True)
            for i, (entropy_of, *answer) in zip(indices, of_samples, strict=True):
                entropies[i], answers[i] = entropy_of.mean().item(), compact(*answer)
    return entropies, answers


def everywhere(gather, share: dict) -> dict:
    """The shares of all processes in one; `gather` returns what each process gave it."""
    return {key: value for part in gather(share) for key, value in part.items()}


def pack(buffers: dict[str, ProbeBuffer]) -> dict[str, torch.Tensor]:
    """All tensors of named buffers, "name.field" -> tensor."""
    return {
        f"{name}.{field}": tensor
        for name, buffer in buffers.items()
        for field, tensor in buffer.tensors().items()
    }


def unpack(tensors: dict[str, torch.Tensor]) -> dict[str, ProbeBuffer]:
    """What `pack` was given; names in the order of the alphabet."""
    fields: dict[str, dict] = {}
    for key in sorted(tensors):
        name, field = key.rsplit(".", 1)
        fields.setdefault(name, {})[field] = tensors[key]
    return {name: ProbeBuffer(**of_buffer) for name, of_buffer in fields.items()}
