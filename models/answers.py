"""Stability-aware Lightweight Self-Distillation (SLSD).

Before task t the model as task t-1 left it, theta(t-1), reads a pool of task t's samples once.
Those it is surest about become the probe buffer, with its answers; distilling them during task t
moves the slow branch only:  L_slow = L_supervised + lambda L_KD,  L_fast = L_supervised.
"""

import contextlib
import math
import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from models.ds_lora import branch_off, branch_parameters
from models.forward import dropout_off, evaluation, picked_log_probs, response_logits, to_device


def entropy(logits: torch.Tensor) -> torch.Tensor:
    """H(softmax(logits)) in nats: (n, vocabulary) any float dtype -> (n,) fp32."""
    log_p = logits.float().log_softmax(-1)
    # 0 log 0 = 0: the clamp spares a class without mass from being 0 times infinity.
    return -(log_p.exp() * log_p.clamp(min=torch.finfo(torch.float32).min)).sum(-1)


def choose_probes(entropies: list[float], threshold: float, size: int) -> list[int]:
    """Indices of the samples with entropy <= `threshold` nats, lowest first, at most `size`."""
    order = sorted(range(len(entropies)), key=lambda i: (entropies[i], i))
    return [i for i in order if entropies[i] <= threshold][:size]


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
        labels = [sample["labels"] for sample in samples]
        return cls(
            sample_ids=torch.tensor(
                [list(bytes.fromhex(s["id"])) for s in samples], dtype=torch.uint8
            ),
            lengths=torch.tensor([len(row) for row in labels]),
            response_lengths=torch.tensor([int((row != -100).sum()) for row in labels]),
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
        labels[: len(labels) - int(self.response_lengths[i])] = -100
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


def read_answers(model: nn.Module, make_passes, samples, top_k: int, temperature: float):
    """The model as it is now reads this process's share of `samples` once, in eval mode.

    Returns:
        {index: mean entropy in nats per response token}, {index: `compact(*coarsen(...))`}.
    """
    entropies, answers = {}, {}
    with evaluation(model):
        for indices, batch, _ in make_passes(samples):
            logits = response_logits(model, **batch)
            counts = [int((samples[i]["labels"] != -100).sum()) for i in indices]
            parts = [entropy(logits), *coarsen(logits, top_k, temperature)]
            of_samples = zip(*(part.cpu().split(counts) for part in parts), strict=True)
            for i, (entropy_of, *answer) in zip(indices, of_samples, strict=True):
                entropies[i], answers[i] = entropy_of.mean().item(), compact(*answer)
    return entropies, answers


def everywhere(gather, share: dict) -> dict:
    """The shares of all processes in one; `gather` returns what each process gave it."""
    return {key: value for part in gather(share) for key, value in part.items()}


class SLSD:
    """The auxiliary loss of `train_slsd_seq.py`: distils the slow branch from the probe buffer.

    Life cycle: `begin_task` before a task that follows another, `aux_backward` before the
    supervised passes of each optimizer step, `end_task` after each task.

    Args:
        model: the student; before a task's first step it is its own teacher.
        make_passes: cuts this process's share of some samples into passes: yields (their indices,
            arguments of `response_logits`, target tokens).
        gather: returns what each process gave it.
        weight: lambda, of the distillation loss in the slow branch's loss.
        temperature, top_k: of the cached answers, see `coarsen`.
        batch_size, every: probes distilled, every so many optimizer steps.
        probe_size, pool_factor, threshold: the surest `probe_size` out of `pool_factor` times as
            many samples, with entropy of at most `threshold` nats per response token.
        seed: of the pool and of the order of distillation.
        choice: "entropy", or "random": any `probe_size` samples.
        branches: the branches that distillation moves, "slow" or "all".
        forward: what answers as the student, "joint" (both branches) or "slow" alone.
        probes: those of the "current" task, or "replay": also each earlier task's, with the answers
            of the model that had just learned it.
    """

    def __init__(
        self,
        model: nn.Module,
        make_passes,
        gather,
        *,
        weight: float,
        temperature: float,
        top_k: int,
        batch_size: int,
        every: int,
        probe_size: int,
        pool_factor: int,
        threshold: float,
        seed: int,
        choice: str = "entropy",
        branches: str = "slow",
        forward: str = "joint",
        probes: str = "current",
    ):
        self.model, self.make_passes, self.gather = model, make_passes, gather
        self.weight, self.temperature, self.top_k = weight, temperature, top_k
        self.batch_size, self.every = batch_size, every
        self.probe_size, self.pool_factor, self.threshold = probe_size, pool_factor, threshold
        if choice == "random":
            self.pool_factor, self.threshold = 1, math.inf
        self.seed, self.branches, self.forward, self.probes = seed, branches, forward, probes
        self.fast_params = branch_parameters(model, "fast")
        self.buffer: ProbeBuffer | None = None
        self.earlier: list[ProbeBuffer] = []
        self.pool_entropies: list[float] = []

    def begin_task(self, task: str, samples) -> None:
        """The model as it is now reads the pool once; the surest samples become the buffer.

        `samples` is a sequence of {"id", "input_ids", "labels"}. `pool_entropies` (nats per
        response token) tells what was seen; `buffer` is None where no sample is sure enough.
        """
        shuffled = random.Random(f"{self.seed}/{task}/probes").sample(
            range(len(samples)), len(samples)
        )
        pool = [samples[i] for i in shuffled[: self.pool_factor * self.probe_size]]
        entropies, answers = self._read(pool)
        entropies = everywhere(self.gather, entropies)
        self.pool_entropies = [entropies[i] for i in range(len(pool))]
        chosen = choose_probes(self.pool_entropies, self.threshold, self.probe_size)
        # Every process holds the same buffer.
        answers = everywhere(self.gather, {i: answers[i] for i in chosen if i in answers})
        self.buffer = None
        if chosen:
            self.buffer = ProbeBuffer.of([pool[i] for i in chosen], [answers[i] for i in chosen])

    def _read(self, samples):
        return read_answers(self.model, self.make_passes, samples, self.top_k, self.temperature)

    def _probes(self) -> list[tuple[ProbeBuffer, int]]:
        """Every probe, in the order of distillation: sure and less sure, old and new mixed."""
        buffers = [*self.earlier, *([self.buffer] if self.buffer else [])]
        probes = [(buffer, i) for buffer in buffers for i in range(len(buffer))]
        random.Random(f"{self.seed}/{len(probes)}").shuffle(probes)
        return probes

    def auxiliary_samples(self) -> list[dict]:
        """What `aux_backward` reads during this task."""
        return [buffer[i] for buffer, i in self._probes()]

    def aux_backward(self, step: int, backward):
        """Leaves the gradient of lambda L_KD on the slow branch, and none on the fast branch.

        L_KD is the mean over the response tokens of this step's probes. Detaching the fast branch's
        output instead would be wrong: slow gradients of lower layers flow through it.

        Args:
            step: optimizer steps of this task before this one.
            backward: called with each part of the loss; carries loss scaling.

        Returns:
            (summed KL in nats over this process's probes, a detached scalar; response tokens of
            all processes), or None where nothing is due.
        """
        if self.weight == 0 or step % self.every:
            return None
        probes = self._probes()
        if not probes:
            return None
        # Read round and round, so that every probe is distilled equally often.
        start = step // self.every * self.batch_size
        size = min(self.batch_size, len(probes))
        chosen = [probes[(start + j) % len(probes)] for j in range(size)]
        tokens = sum(int(buffer.response_lengths[i]) for buffer, i in chosen)
        total = torch.zeros((), device=self.fast_params[0].device)
        with contextlib.ExitStack() as stack:
            stack.enter_context(dropout_off(self.model))
            if self.forward == "slow":
                stack.enter_context(branch_off(self.model, "fast"))
            for indices, batch, _ in self.make_passes([buffer[i] for buffer, i in chosen]):
                logits = response_logits(self.model, **batch)
                answers = [buffer.answers(i) for buffer, i in (chosen[j] for j in indices)]
                teacher = [
                    to_device(torch.cat(parts), logits.device)
                    for parts in zip(*answers, strict=True)
                ]
                loss = kd_loss(logits, *teacher, self.temperature)
                backward(self.weight / tokens * loss)
                total = total + loss.detach()
        if self.branches == "slow":
            # None, not zero: AdamW moves a parameter whose gradient is zero.
            for parameter in self.fast_params:
                parameter.grad = None
        return total, tokens

    def end_task(self, task: str, samples) -> None:
        """Forgets the buffer, or keeps its probes with the answers of the model as it is now."""
        if self.probes == "replay":
            if self.buffer:
                probes = [self.buffer[i] for i in range(len(self.buffer))]
                answers = everywhere(self.gather, self._read(probes)[1])
                self.buffer = ProbeBuffer.of(probes, [answers[i] for i in range(len(probes))])
            else:
                # The first task, which had no previous model.
                self.begin_task(task, samples)
            self.earlier += [self.buffer] if self.buffer else []
        self.buffer = None

    def state(self) -> dict[str, torch.Tensor]:
        """What `restore` needs to go on, inside a task or between two."""
        buffers = {f"earlier_{n:04d}": buffer for n, buffer in enumerate(self.earlier)}
        if self.buffer:
            buffers["now"] = self.buffer
        return pack(buffers)

    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        """Takes up what `state` gave."""
        buffers = unpack(tensors)
        self.buffer = buffers.pop("now", None)
        self.earlier = [buffers[name] for name in sorted(buffers)]


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
