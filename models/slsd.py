"""Stability-aware Lightweight Self-Distillation (SLSD).

Before task t the model as task t-1 left it, theta(t-1), reads a pool of task t's samples once.
Those it is surest about become the probe buffer, with its answers; distilling them during task t
moves the slow branch only:  L_slow = L_supervised + lambda L_KD,  L_fast = L_supervised.
"""

import contextlib
import math
import random
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load, save_file
from torch import nn
from torch.autograd.function import once_differentiable


def response_logits(
    model, input_ids: torch.Tensor, positions: torch.Tensor, start=contextlib.nullcontext
) -> torch.Tensor:
    """Logits at the positions that predict response tokens, row by row.

    Only these positions meet the vocabulary: a hook in front of the output embedding selects them,
    which is exact for every family, whatever the model does to its logits afterwards.

    Args:
        input_ids: (batch, length) long, padded on the right; a causal mask needs no other mask.
        positions: (n,) long, into the flattened batch.
        start: makes a context in which the model runs, see `FrozenPrefix.start`.

    Returns:
        (n, vocabulary) in the model's dtype.
    """
    hook = model.get_output_embeddings().register_forward_pre_hook(
        lambda _, args: (args[0].flatten(0, 1)[positions],)
    )
    try:
        with start():
            return model(input_ids=input_ids, use_cache=False).logits
    finally:
        hook.remove()


class _PickedLogProbs(torch.autograd.Function):
    """A few rows at a time, and the gradient takes the place of the logits.

    Nothing of the logits' size is made: no fp32 copy, no log-softmax, no zero-filled gradient.
    d log p_j / d x_i = ([i = j] - p_i) / temperature.
    """

    @staticmethod
    def forward(ctx, logits, ids, temperature):
        log_sums = [
            _scaled(rows, temperature).logsumexp(-1, keepdim=True)
            for rows in logits.split(_block(logits))
        ]
        log_sum = torch.cat(log_sums) if log_sums else logits[:, :1].float()
        ctx.save_for_backward(logits, ids, log_sum)
        ctx.temperature, ctx.is_leaf = temperature, logits.is_leaf
        return logits.gather(-1, ids).float() / temperature - log_sum

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        logits, ids, log_sum = ctx.saved_tensors
        result = logits.clone() if ctx.is_leaf else logits
        step = _block(logits)
        parts = (tensor.split(step) for tensor in (result, ids, log_sum, grad / ctx.temperature))
        for rows, of_ids, of_sum, of_grad in zip(*parts, strict=True):
            in_place = rows if rows.dtype == torch.float32 else None
            p = torch.sub(_scaled(rows, ctx.temperature), of_sum, out=in_place).exp_()
            p.mul_(-of_grad.sum(-1, keepdim=True)).scatter_add_(-1, of_ids, of_grad)
            if in_place is None:
                rows.copy_(p)
        return result, None, None


def _scaled(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    # Where nothing is to be done, no copy either.
    return logits.float() if temperature == 1 else logits.float() / temperature


def _block(logits: torch.Tensor) -> int:
    # Rows at a time. On a CPU they stay in the cache; on a GPU they are worth their launches.
    return max(1, (2**25 if logits.is_cuda else 2**20) // logits.shape[-1])


def picked_log_probs(
    logits: torch.Tensor, ids: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    """log softmax(logits / temperature) at `ids`, in nats.

    Args:
        logits: (n, vocabulary), any float dtype.
        ids: (n, k) long, each class at most once a row.

    Returns:
        (n, k) fp32. Its gradient can be taken once; unless `logits` is a leaf, that overwrites it.
    """
    return _PickedLogProbs.apply(logits, ids, temperature)


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """-log p(target), summed: (n, vocabulary) any float dtype, (n,) long -> a scalar, fp32.

    The backward overwrites `logits`, see `picked_log_probs`.
    """
    return -picked_log_probs(logits, targets[:, None]).sum()


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


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`tensor` on `device`, where it arrives in the order of the work there: nothing waits."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def kd_loss(
    logits: torch.Tensor,
    log_probs: torch.Tensor,
    ids: torch.Tensor,
    log_tail: torch.Tensor,
    temperature: float = 1.0,
) -> torch.Tensor:
    """KL(teacher || student) over the teacher's k classes and the tail, summed over positions.

    Exact for the two coarsened distributions, and the full KL where k is the vocabulary. A class
    without mass in the teacher contributes neither loss nor gradient. Scaled by temperature^2
    (Hinton et al. 2015, section 2).

    Args:
        logits: (n, vocabulary), the student's, any float dtype; the backward overwrites them, see
            `picked_log_probs`.
        log_probs, ids, log_tail: the teacher's `coarsen(...)` at the same temperature.

    Returns:
        A scalar, fp32, nats.
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
    return temperature**2 * torch.where(p == 0, 0.0, p * (log_p - log_q)).sum()


@contextlib.contextmanager
def evaluation(model: nn.Module):
    """Within the block `model` is in eval mode and no gradient is kept."""
    before = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, training in before.items():
            module.training = training


@contextlib.contextmanager
def dropout_off(model: nn.Module):
    """Within the block dropout modules pass everything on; the model keeps its mode.

    Putting the whole model in eval mode would switch gradient checkpointing off too.
    """
    dropouts = [m for m in model.modules() if isinstance(m, nn.Dropout) and m.training]
    try:
        for module in dropouts:
            module.training = False
        yield
    finally:
        for module in dropouts:
            module.training = True


@dataclass
class ProbeBuffer:
    """Probe samples with the teacher's answers: m probes, T tokens, N response tokens in all.

    Each probe carries its own tokens, so answers cannot be paired with another sample's. Rows of
    the answers follow the probes in order, and each probe's response tokens in order.
    """

    sample_ids: torch.Tensor  # (m, 32) uint8: the sha256 of the sample's text
    lengths: torch.Tensor  # (m,) int64: tokens of each probe
    response_lengths: torch.Tensor  # (m,) int64: response tokens of each probe, its last ones
    input_ids: torch.Tensor  # (T,) int32
    log_probs: torch.Tensor  # (N, k) fp16
    ids: torch.Tensor  # (N, k) int32
    log_tail: torch.Tensor  # (N,) fp32

    def __post_init__(self):
        self._starts = F.pad(self.lengths.cumsum(0), (1, 0)).tolist()
        self._response_starts = F.pad(self.response_lengths.cumsum(0), (1, 0)).tolist()

    @classmethod
    def build(cls, samples: list[dict], answers: list[tuple]) -> "ProbeBuffer":
        """From samples ("id" hex, "input_ids", "labels") and `compact(*coarsen(...))`."""
        labels = [sample["labels"] for sample in samples]
        log_probs, ids, log_tail = (torch.cat(parts) for parts in zip(*answers, strict=True))
        return cls(
            sample_ids=torch.tensor(
                [list(bytes.fromhex(s["id"])) for s in samples], dtype=torch.uint8
            ),
            lengths=torch.tensor([len(row) for row in labels]),
            response_lengths=torch.tensor([int((row != -100).sum()) for row in labels]),
            input_ids=torch.cat([s["input_ids"] for s in samples]).int(),
            log_probs=log_probs,
            ids=ids,
            log_tail=log_tail,
        )

    def __len__(self) -> int:
        return len(self.lengths)

    def sample(self, i: int) -> dict:
        """Probe i as "id" (hex), "input_ids" (t,) long and "labels" (t,) long."""
        input_ids = self.input_ids[self._starts[i] : self._starts[i + 1]].long()
        labels = input_ids.clone()
        labels[: len(labels) - int(self.response_lengths[i])] = -100
        return {
            "id": bytes(self.sample_ids[i].tolist()).hex(),
            "input_ids": input_ids,
            "labels": labels,
        }

    def answers(self, i: int):
        """The teacher's log_probs (n, k) fp32, ids (n, k) int64, log_tail (n,) fp32 of probe i."""
        rows = slice(self._response_starts[i], self._response_starts[i + 1])
        log_probs, log_tail = self.log_probs[rows].float(), self.log_tail[rows]
        # Stored in half precision they sum to 1 only nearly, which would bias the gradient.
        total = torch.cat([log_probs, log_tail[:, None]], dim=-1).logsumexp(-1)
        return log_probs - total[:, None], self.ids[rows].long(), log_tail - total

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file."""
        save_file(self.tensors(), path, metadata={"format": "pt"})

    def tensors(self) -> dict[str, torch.Tensor]:
        """The fields by name."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    @classmethod
    def load(cls, path: str | Path) -> "ProbeBuffer":
        """Reads what `save` wrote. Raises SafetensorError or TypeError on another file."""
        # Not mapped into memory: a file that changes underneath would kill the process.
        return cls(**load(Path(path).read_bytes()))


class SLSD:
    """The auxiliary loss of `train_slsd_seq.py`: distils the slow branch from the probe buffer.

    Life cycle: `begin_task` before a task, `aux_backward` before the supervised passes of each
    optimizer step, `end_task` after it.

    Args:
        model: the student; before a task's first step it is its own teacher.
        fast_params: parameters of the fast branch, which distillation must not move.
        make_passes: cuts this process's share of some samples into passes: yields (their indices,
            arguments of `response_logits`, target tokens).
        gather: returns what each process gave it.
        weight: lambda, of the distillation loss in the slow branch's loss.
        temperature, top_k: of the cached answers, see `coarsen`.
        batch_size, every: probes distilled, every so many optimizer steps.
        probe_size, pool_factor, threshold: the surest `probe_size` out of `pool_factor` times as
            many samples, with entropy of at most `threshold` nats per response token.
        seed: of the pool and of the order of distillation.
    """

    def __init__(
        self,
        model: nn.Module,
        fast_params: list[nn.Parameter],
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
    ):
        self.model, self.fast_params = model, fast_params
        self.make_passes, self.gather = make_passes, gather
        self.weight, self.temperature, self.top_k = weight, temperature, top_k
        self.batch_size, self.every = batch_size, every
        self.probe_size, self.pool_factor, self.threshold = probe_size, pool_factor, threshold
        self.seed = seed
        self.buffer: ProbeBuffer | None = None
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
        entropies, answers = {}, {}
        with evaluation(self.model):
            for indices, batch, _ in self.make_passes(pool):
                logits = response_logits(self.model, **batch)
                counts = [int((pool[i]["labels"] != -100).sum()) for i in indices]
                parts = [entropy(logits), *coarsen(logits, self.top_k, self.temperature)]
                of_samples = zip(*(part.cpu().split(counts) for part in parts), strict=True)
                for i, (entropy_of, *answer) in zip(indices, of_samples, strict=True):
                    entropies[i], answers[i] = entropy_of.mean().item(), compact(*answer)
        entropies = {i: s for part in self.gather(entropies) for i, s in part.items()}
        self.pool_entropies = [entropies[i] for i in range(len(pool))]
        chosen = choose_probes(self.pool_entropies, self.threshold, self.probe_size)
        # Every process holds the same buffer.
        own = {i: answers[i] for i in chosen if i in answers}
        answers = {i: answer for part in self.gather(own) for i, answer in part.items()}
        # Kept in the pool's random order, so that each distillation batch mixes sure and less sure.
        chosen.sort()
        self.buffer = None
        if chosen:
            self.buffer = ProbeBuffer.build([pool[i] for i in chosen], [answers[i] for i in chosen])

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
        if self.buffer is None or self.weight == 0 or step % self.every:
            return None
        # The buffer is read round and round, so that every probe is distilled equally often.
        start = step // self.every * self.batch_size
        size = min(self.batch_size, len(self.buffer))
        chosen = [(start + j) % len(self.buffer) for j in range(size)]
        tokens = sum(int(self.buffer.response_lengths[i]) for i in chosen)
        total = torch.zeros((), device=self.fast_params[0].device)
        with dropout_off(self.model):
            for indices, batch, _ in self.make_passes([self.buffer.sample(i) for i in chosen]):
                logits = response_logits(self.model, **batch)
                answers = zip(*(self.buffer.answers(chosen[i]) for i in indices), strict=True)
                teacher = [to_device(torch.cat(parts), logits.device) for parts in answers]
                loss = kd_loss(logits, *teacher, self.temperature)
                backward(self.weight / tokens * loss)
                total = total + loss.detach()
        # None, not zero: AdamW moves a parameter whose gradient is zero.
        for parameter in self.fast_params:
            parameter.grad = None
        return total, tokens

    def state(self) -> dict[str, torch.Tensor]:
        """What `restore` needs to go on inside a task."""
        return self.buffer.tensors() if self.buffer else {}

    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        """Takes the place of `begin_task` where a task goes on."""
        self.buffer = ProbeBuffer(**tensors) if tensors else None

    def end_task(self) -> None:
        """Forgets the buffer."""
        self.buffer = None
