"""How samples reach the model: cut into passes, from the kept prefix, until the run is to stop."""

import contextlib
import gc
import os
import signal
import threading
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from configs.command_line import Stopped, UserError, num_processes, rank, shows_progress
from models.forward import IGNORE, to_device
from models.frozen_prefix import FrozenPrefix
from training.device import is_out_of_memory
from training.memory import PASS_WITHOUT_GRADIENTS, Shapes
from training.plan import prefix_room
from utils_data import collate_fn

PREFIX_TOKENS = 2048
# What a pass costs beside its tokens, in tokens: measured on two CPU cores, where 32 to 128 are
# alike. On a GPU the launches of a pass take as long as some 500 tokens at LLaMA-2-7B's width.
PASS_COST = {"cpu": 64, "cuda": 512}


def progress_bar(total: int, description: str, unit: str) -> tqdm:
    """A bar over this process's share of `total`, which goes when it is full."""
    return tqdm(
        total=total // num_processes(),
        desc=description,
        unit=unit,
        leave=False,
        disable=not shows_progress(),
    )


class StopSignals:
    """Turns the first Ctrl-C or SIGTERM into `Stopped` at the next `check()`; a second kills.

    Attributes:
        received: number of the signal that came last, or 0.
    """

    def __init__(self):
        self.received = 0

    def check(self) -> None:
        """Raises `Stopped` where a signal has come.

        With several processes the training loop asks all of them once a step instead.
        """
        if self.received and num_processes() == 1:
            raise Stopped(self.received)

    def _receive(self, number, _frame) -> None:
        self.received = number
        if num_processes() > 1:
            # torchrun passes on what the terminal has sent already, and kills after 30 seconds.
            return
        # Not print: a handler may interrupt one.
        os.write(2, b"\nstopping after this pass; a second signal stops at once\n")
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    @contextlib.contextmanager
    def installed(self):
        """Within the block signals are kept for `check()`."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {
            number: signal.signal(number, self._receive)
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def cut_lengths(lengths: list[int], tokens_per_pass: int, pass_cost: int):
    """Yields (start, end) of each pass over falling `lengths`, at the least cost in all.

    A pass costs its tokens, padding included, and `pass_cost`. Dynamic programming from the end.
    """
    cheapest, ends = [0] * (len(lengths) + 1), [0] * len(lengths)
    for start in reversed(range(len(lengths))):
        longest = lengths[start]
        most = max(1, tokens_per_pass // longest)
        costs = (
            (size * longest + pass_cost + cheapest[start + size], start + size)
            for size in range(1, min(most, len(lengths) - start) + 1)
        )
        cheapest[start], ends[start] = min(costs)
    start = 0
    while start < len(lengths):
        yield start, ends[start]
        start = ends[start]


def make_passes(samples, tokens_per_pass: int, pad_token_id: int, device, share=(0, 1)):
    """Cuts `samples` into passes of like length.

    Yields (indices, {"input_ids": (batch, length) long, "positions": (n,) long}, targets (n,)
    long): where in the flattened batch a response token is predicted, and which.

    A pass holds at most `tokens_per_pass` tokens, padding included, or one sample. The longest
    come first: what does not fit into memory shows at once. There is no attention mask: under a
    causal mask padding on the right changes nothing, and a mask loses the fast kernels.

    Args:
        share: (i, n) takes the i-th of n shares of the samples, of about as many tokens each.
    """
    lengths = [len(sample["input_ids"]) for sample in samples]
    order = sorted(range(len(samples)), key=lambda i: (-lengths[i], i))[share[0] :: share[1]]
    falling = [lengths[i] for i in order]
    for start, end in cut_lengths(falling, tokens_per_pass, PASS_COST[device.type]):
        indices = order[start:end]
        batch = collate_fn([samples[i] for i in indices], pad_token_id)
        # Found here and not on the GPU, which would have to answer before the host goes on.
        following = F.pad(batch["labels"], (0, 1), value=IGNORE)[:, 1:].flatten()
        positions = (following != IGNORE).nonzero().squeeze(1)
        tensors = (batch["input_ids"], positions, following[positions])
        input_ids, positions, targets = (to_device(tensor, device) for tensor in tensors)
        yield indices, {"input_ids": input_ids, "positions": positions}, targets


class Passes:
    """The model on its device, and how samples reach it.

    Attributes:
        tokens_per_pass: of a pass with gradients; halved where memory runs out.
        divisor: of the tokens of work without gradients; doubled where memory runs out there.
        prefix: the kept output of the frozen layers.
    """

    def __init__(self, cfg, model: nn.Module, tokenizer, device: torch.device, stop: StopSignals):
        self.model, self.tokenizer, self.device, self.stop = model, tokenizer, device, stop
        self.tokens_per_pass, self.divisor = cfg.tokens_per_pass, 1
        self.checkpointing = cfg.gradient_checkpointing
        self._samples_in_pass, self._has_gradients = 0, False
        self.prefix = FrozenPrefix(model, cfg.num_frozen_layers, prefix_room(cfg))

    def make(self, samples):
        """Cuts this process's share of `samples` into passes, see `make_passes`.

        They start from the frozen layers' output where it is kept. Without gradients they are
        larger. Raises `Stopped` between passes where the run is to stop.
        """
        for indices, batch, targets in self._checked(samples):
            start = self.prefix.start([samples[i] for i in indices], batch["input_ids"])
            yield indices, {**batch, "start": start} if start else batch, targets

    def frozen_outputs(self, samples):
        """Yields (indices, output of the frozen layers (batch, length, width)) by pass."""
        for indices, batch, _ in self._checked(samples):
            of_pass = [samples[i] for i in indices]
            yield indices, self.prefix.outputs(of_pass, batch["input_ids"])

    def begin(self, num_samples: int) -> None:
        """Before each pass of so many samples: raises `Stopped` where the run is to stop."""
        self.stop.check()
        self._samples_in_pass, self._has_gradients = num_samples, torch.is_grad_enabled()

    @property
    def tokens_in_cache(self) -> int:
        """Tokens, answers included, that are generated at a time: they take a pass's memory."""
        shapes = Shapes.of(self.model, self.model.dtype, self.device)
        tokens = shapes.tokens_in_cache(self.tokens_per_pass, self.checkpointing)
        return max(1, tokens // self.divisor)

    def _checked(self, samples):
        tokens = self.tokens_per_pass
        if not torch.is_grad_enabled():
            more = PASS_WITHOUT_GRADIENTS if self.device.type == "cuda" else 1
            tokens = max(1, tokens * more // self.divisor)
        for one_pass in self._cut(samples, tokens):
            self.begin(len(one_pass[0]))
            yield one_pass

    def _cut(self, samples, tokens: int):
        pad, share = self.tokenizer.pad_token_id, (rank(), num_processes())
        return make_passes(samples, tokens, pad, self.device, share)

    def keep_prefix(self, samples, description: str) -> list[str]:
        """Runs the frozen layers over this process's share of `samples` and keeps their output.

        As far as there is room. Returns what `prefix.drop` takes.
        """
        kept = []
        if not self.prefix.room:
            return kept
        try:
            with progress_bar(len(samples), description, "sample") as progress:
                # Passes of a fixed size: what is kept depends on the samples alone.
                for indices, batch, _ in self._cut(samples, PREFIX_TOKENS):
                    self.stop.check()
                    kept += self.prefix.keep([samples[i] for i in indices], batch)
                    progress.update(len(indices))
        except (ValueError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not is_out_of_memory(error):
                raise
            reason = str(error).partition("\n")[0]
            print(f"{type(self.model).__name__} goes on without --prefix_cache_gib: {reason}")
            self.prefix.room = 0
        return kept

    @contextlib.contextmanager
    def kept_prefix(self):
        """Yields `keep_prefix`; at the end of the block what it kept is dropped."""
        kept = []
        try:
            yield lambda *args: kept.extend(self.keep_prefix(*args))
        finally:
            self.prefix.drop(kept)

    def with_less_memory(self, work: Callable):
        """`work()`; where it runs out of GPU memory, again with passes of half the tokens.

        Passes with gradients and those without are halved each by themselves: training goes on
        with the passes, and the dropout masks, that it had. Raises `UserError` where a single
        sample is too much.
        """
        while True:
            try:
                return work()
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
            # Outside the handler, whose traceback holds the tensors of the failed pass.
            self.model.zero_grad()
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            if self._samples_in_pass <= 1:
                raise UserError(
                    "out of GPU memory with one sample a pass: give --gradient_checkpointing true, "
                    "a smaller --max_seq_len, --quantization 4bit, or a larger --num_frozen_layers"
                )
            if self._has_gradients:
                self.tokens_per_pass = max(1, self.tokens_per_pass // 2)
                print(f"out of GPU memory: going on with --tokens_per_pass {self.tokens_per_pass}")
            else:
                self.divisor *= 2
                print(
                    f"out of GPU memory: reading and answering go on with 1/{self.divisor} of the "
                    "tokens a pass; training is as before"
                )
