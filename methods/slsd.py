"""DS-LoRA with SLSD, Stability-aware Lightweight Self-Distillation: the specification's method.

Before task t the model as task t-1 left it, theta(t-1), reads a pool of task t's samples once.
Those it is surest about become the probe buffer, with its answers; distilling them during task t
moves the slow branch only:  L_slow = L_supervised + lambda L_KD,  L_fast = L_supervised.
"""

import contextlib
import math
import random

import torch

from methods.folding import ConsolidationKnobs, Folding
from methods.memory import answer_bytes, teacher_bytes
from methods.method import Method
from models.answers import (
    ProbeBuffer,
    everywhere,
    kd_loss,
    pack,
    read_answers,
    teacher_of_pass,
    unpack,
)
from models.ds_lora import branch_off, branch_parameters, reset_branch
from models.forward import dropout_off, response_logits

REPLAYED = {"use_slsd": True, "kd_probes": "replay"}


def choose_probes(entropies: list[float], threshold: float, size: int) -> list[int]:
    """Indices of the samples with entropy <= `threshold` nats, lowest first, at most `size`."""
    order = sorted(range(len(entropies)), key=lambda i: (entropies[i], i))
    return [i for i in order if entropies[i] <= threshold][:size]


class SLSD(Method):
    """Before a task's first step the student is its own teacher: no second model.

    Attributes:
        buffer: the probes of this task, or None.
        earlier: those of each earlier task, with `kd_probes` "replay".
        pool_entropies: of the samples that were read before this task, nats per response token.
    """

    name = "ds_lora"
    knobs = (ConsolidationKnobs,)
    uses = (
        *("lr_slow", "lr_fast", "fast_init", "use_slsd", "kd_lambda", "kd_temperature"),
        *("kd_top_k", "kd_batch_size", "kd_every", "kd_branches", "kd_forward", "kd_probes"),
        *("probe_choice", "probe_size_per_task", "probe_pool_factor", "entropy_threshold"),
    )
    is_one_lora = False
    readings = ("latest", "own", "slow", "fast", "stage", "routed")
    needs_several_tasks = False
    variants = {
        "ds_lora": {"use_slsd": False},
        "slsd": {"use_slsd": True},
        # The probes of the earlier tasks too, for the slow branch or for both.
        "slsd_replay": REPLAYED,
        "slsd_replay_all": {**REPLAYED, "kd_branches": "all"},
        # Nothing of the old data is kept.
        "consolidated": {"use_slsd": False, "consolidate": "gram"},
    }

    def __init__(self, cfg, tools):
        super().__init__(cfg, tools)
        self.fast_params = branch_parameters(self.model, "fast")
        self.folding = Folding(cfg, tools)
        self.buffer: ProbeBuffer | None = None
        self.earlier: list[ProbeBuffer] = []
        self.pool_entropies: list[float] = []

    @classmethod
    def kept_bytes(cls, cfg, model, sizes):
        probes = [min(cfg.probe_size_per_task, size) for size in sizes] if cfg.use_slsd else [0]
        at_once = sum(probes) if cfg.kd_probes == "replay" else max(probes)
        return answer_bytes(cfg, model, at_once) + Folding.kept_bytes(cfg, model)

    @classmethod
    def device_bytes(cls, cfg, model, positions):
        answers = teacher_bytes(cfg, model, positions) if cfg.use_slsd else 0
        return answers + Folding.kept_bytes(cfg, model)

    @property
    def distils(self) -> bool:
        """Whether something that distillation moves is trained."""
        return self.cfg.use_slsd and (not self.folding.is_on or self.cfg.kd_branches == "all")

    @property
    def num_kept(self):
        return sum(map(len, self.earlier))

    @property
    def probes(self):
        return self.buffer

    def read_task(self, task, samples, previous):
        if not previous or not self.distils:
            return ""
        self.read_pool(task, samples)
        return self.describe(task)

    def begin_task(self, task, samples, previous):
        self.folding.begin_task(task, previous)
        if self.cfg.fast_init == "fresh":
            # After the probes were read: their teacher is the whole model of the last stage.
            reset_branch(self.model, "fast", self.cfg.seed, task, "fast branch")

    def read_pool(self, task: str, samples) -> None:
        """The model as it is now reads the pool once; the surest samples become the buffer."""
        order = random.Random(f"{self.cfg.seed}/{task}/probes")
        shuffled = order.sample(range(len(samples)), len(samples))
        size, threshold = self.cfg.probe_size_per_task, math.inf
        pool_size = size
        if self.cfg.probe_choice == "entropy":
            pool_size, threshold = size * self.cfg.probe_pool_factor, self.cfg.entropy_threshold
        pool = [samples[i] for i in shuffled[:pool_size]]
        entropies, answers = self._read(pool)
        entropies = everywhere(self.tools.gather, entropies)
        self.pool_entropies = [entropies[i] for i in range(len(pool))]
        chosen = choose_probes(self.pool_entropies, threshold, size)
        # Every process holds the same buffer.
        answers = everywhere(self.tools.gather, {i: answers[i] for i in chosen if i in answers})
        self.buffer = None
        if chosen:
            self.buffer = ProbeBuffer.of([pool[i] for i in chosen], [answers[i] for i in chosen])

    def describe(self, task: str) -> str:
        """How many probes were chosen, or a warning that no sample was sure enough."""
        seen = self.pool_entropies
        if self.buffer is None:
            return (
                f"warning: {task} trains without distillation: its surest sample has an entropy of "
                f"{min(seen):.2f} nats per token, above --entropy_threshold "
                f"{self.cfg.entropy_threshold}"
            )
        return (
            f"{task}: {len(self.buffer)} probes out of {len(seen)} samples of entropy "
            f"{min(seen):.2f} to {max(seen):.2f} nats per token"
        )

    def _read(self, samples):
        cfg, make_passes = self.cfg, self.tools.make_passes
        return self.tools.with_less_memory(
            lambda: read_answers(self.model, make_passes, samples, cfg.kd_top_k, cfg.kd_temperature)
        )

    def _probes(self) -> list[tuple[ProbeBuffer, int]]:
        """Every probe, in the order of distillation: sure and less sure, old and new mixed."""
        buffers = [*self.earlier, *([self.buffer] if self.buffer else [])]
        probes = [(buffer, i) for buffer in buffers for i in range(len(buffer))]
        random.Random(f"{self.cfg.seed}/{len(probes)}").shuffle(probes)
        return probes

    def auxiliary_samples(self):
        return [buffer[i] for buffer, i in self._probes()]

    def aux_backward(self, step, backward):
        """Leaves the gradient of lambda L_KD on the slow branch, and none on the fast branch.

        L_KD is the mean over the response tokens of this step's probes. Detaching the fast branch's
        output instead would be wrong: slow gradients of lower layers flow through it.
        """
        cfg, probes = self.cfg, self._probes()
        if cfg.kd_lambda == 0 or step % cfg.kd_every or not probes:
            return None
        # Read round and round, so that every probe is distilled equally often.
        start = step // cfg.kd_every * cfg.kd_batch_size
        size = min(cfg.kd_batch_size, len(probes))
        chosen = [probes[(start + j) % len(probes)] for j in range(size)]
        tokens = sum(int(buffer.response_lengths[i]) for buffer, i in chosen)
        total = torch.zeros((), device=self.fast_params[0].device)
        with contextlib.ExitStack() as stack:
            stack.enter_context(dropout_off(self.model))
            if cfg.kd_forward == "slow":
                stack.enter_context(branch_off(self.model, "fast"))
            for indices, batch, _ in self.tools.make_passes([buffer[i] for buffer, i in chosen]):
                logits = response_logits(self.model, **batch)
                teacher = teacher_of_pass([chosen[j] for j in indices], logits.device)
                loss = kd_loss(logits, *teacher, cfg.kd_temperature)
                backward(cfg.kd_lambda / tokens * loss)
                total = total + loss.detach()
        if cfg.kd_branches == "slow":
            # None, not zero: AdamW moves a parameter whose gradient is zero.
            for parameter in self.fast_params:
                parameter.grad = None
        return total, tokens

    def end_task(self, task, samples, is_last):
        """Folds fast into slow where that is asked for, and forgets the buffer.

        Or keeps its probes with the answers of the model as it is now.
        """
        self.folding.end_task(task, samples)
        if self.distils and self.cfg.kd_probes == "replay" and not is_last:
            if self.buffer:
                probes = [self.buffer[i] for i in range(len(self.buffer))]
                answers = everywhere(self.tools.gather, self._read(probes)[1])
                self.buffer = ProbeBuffer.of(probes, [answers[i] for i in range(len(probes))])
            else:
                # No model before this one was asked, or none was sure enough: this one chooses.
                self.read_pool(task, samples)
            self.earlier += [self.buffer] if self.buffer else []
        self.buffer = None

    def state(self):
        buffers = {f"earlier_{n:04d}": buffer for n, buffer in enumerate(self.earlier)}
        if self.buffer:
            buffers["now"] = self.buffer
        return {**pack(buffers), **self.folding.state()}

    def restore(self, tensors):
        buffers = unpack(self.folding.restore(tensors))
        self.buffer = buffers.pop("now", None)
        self.earlier = [buffers[name] for name in sorted(buffers)]
