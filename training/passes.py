"""How samples reach the model: cut into passes, from the kept prefix, until the run is to stop."""

import contextlib
import functools
import gc
import os
import signal
import threading
from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from tqdm import tqdm

from configs.command_line import Stopped, UserError, num_processes, rank, shows_progress
from configs.ending import STOPPING, is_out_of_memory
from models.forward import IGNORE, are_close, evaluation, response_logits, to_device
from models.frozen_prefix import FrozenPrefix
from tasks.prompt import PromptTemplate
from training.memory import PASS_WITHOUT_GRADIENTS, Shapes
from training.plan import prefix_room
from training.processes import gather
from utils_data import collate_fn

PREFIX_TOKENS = 2048
# What a pass costs beside its tokens, in tokens: measured on two CPU cores, where 32 to 128 are
# alike. On a GPU the launches of a pass take as long as some 500 tokens at LLaMA-2-7B's width.
PASS_COST = {"cpu": 64, "cuda": 512}

# Of a configuration: how many tokens its layers see, whatever mask they are given.
SIGHTS = ("sliding_window", "attention_chunk_size", "window_size", "max_position_embeddings")


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
    """Turns Ctrl-C, SIGTERM or SIGHUP into `Stopped` at the next `check()`.

    Another Ctrl-C kills. The others may come twice: a scheduler tells a run and what started it.

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
        # Not print: a handler may interrupt one. A terminal that closed takes nothing.
        with contextlib.suppress(OSError):
            os.write(2, b"\nstopping after this pass; Ctrl-C stops at once\n")
        signal.signal(signal.SIGINT, signal.default_int_handler)

    @contextlib.contextmanager
    def installed(self):
        """Within the block signals are kept for `check()`."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {
            number: signal.signal(number, self._receive)
            for number in (signal.SIGINT, *STOPPING)
            # What is ignored, as by nohup, stays so.
            if signal.getsignal(number) is not signal.SIG_IGN
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
    long): where in the flattened batch a response token is predicted, and which. Samples that
    branch have their "parents" there too, see `told_of_branches`.

    A pass holds at most `tokens_per_pass` tokens, padding included, or one sample. The longest
    come first: what does not fit into memory shows at once. There is no attention mask but for
    samples that branch: under a causal mask padding on the right changes nothing, and a mask loses
    the fast kernels.

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
        labels, parents = batch["labels"], batch.get("parents")
        rows, tokens = (labels[:, 1:] != IGNORE).nonzero(as_tuple=True)
        before = tokens if parents is None else parents[rows, tokens + 1]
        found = {"input_ids": batch["input_ids"], "positions": rows * labels.shape[1] + before}
        if parents is not None:
            found["parents"] = parents
        found = {name: to_device(tensor, device) for name, tensor in found.items()}
        yield indices, found, to_device(labels[rows, tokens + 1], device)


def _in_one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


class Passes:
    """The model on its device, and how samples reach it.

    Args:
        store: a `PrefixStore`; None: the frozen layers' output is kept in host memory.

    Attributes:
        tokens_per_pass: of a pass with gradients; halved where memory runs out.
        divisor: of the tokens of work without gradients; doubled where memory runs out there.
        samples_read: samples of all passes of this process, with a backward and without.
        prefix: the kept output of the frozen layers.
        template: what stands around the samples' texts.
    """

    def __init__(
        self, cfg, model: nn.Module, tokenizer, device: torch.device, stop: StopSignals, store=None
    ):
        self.model, self.tokenizer, self.device, self.stop = model, tokenizer, device, stop
        self.template = PromptTemplate(tokenizer, cfg.prompt_template)
        self.tokens_per_pass, self.divisor = cfg.tokens_per_pass, 1
        self.checkpointing = cfg.gradient_checkpointing
        self._samples_in_pass, self._has_gradients = 0, False
        self.samples_read = {"backward": 0, "forward": 0}
        room = store.room if store else prefix_room(cfg)
        self.prefix = FrozenPrefix(model, cfg.num_frozen_layers, room, store)

    def make(self, samples):
        """Cuts this process's share of `samples` into passes, see `make_passes`.

        They start from the frozen layers' output where it is kept. Without gradients they are
        larger. Raises `Stopped` between passes where the run is to stop.
        """
        for indices, batch, targets in self._checked(samples):
            start = self.prefix.start([samples[i] for i in indices], batch)
            self.samples_read["backward" if torch.is_grad_enabled() else "forward"] += len(indices)
            yield indices, {**batch, "start": start} if start else batch, targets

    def samples_read_by_all(self) -> dict[str, int]:
        """`samples_read`, summed over all processes."""
        of_each = gather(self.samples_read)
        return {kind: sum(read[kind] for read in of_each) for kind in self.samples_read}

    def frozen_outputs(self, samples):
        """Yields (indices, output of the frozen layers (batch, length, width)) by pass."""
        for indices, batch, _ in self._checked(samples):
            of_pass = [samples[i] for i in indices]
            yield indices, self.prefix.outputs(of_pass, batch)

    def begin(self, num_samples: int) -> None:
        """Before each pass of so many samples: raises `Stopped` where the run is to stop."""
        self.stop.check()
        self._samples_in_pass, self._has_gradients = num_samples, torch.is_grad_enabled()

    def batches(self, lengths: list[int]):
        """Yields the numbers of this process's share of the sequences to be answered, by batch.

        The longest come first; the cache of a batch takes no more memory than a training pass.
        Raises `Stopped` between batches where the run is to stop.

        Args:
            lengths: tokens that each sequence takes in the cache, its answer included.
        """
        order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
        mine = order[rank() :: num_processes()]
        shapes, start = Shapes.of(self.model, self.model.dtype, self.device), 0
        room = shapes.tokens_in_cache(self.tokens_per_pass, self.checkpointing) // self.divisor
        while start < len(mine):
            batch = mine[start : start + max(1, room // lengths[mine[start]])]
            self.begin(len(batch))
            yield batch
            start += len(batch)

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
        except Stopped:
            raise
        except Exception as error:
            # Whatever a family's own code makes of being run in parts: the plain model still runs.
            print(f"{self._family} goes on without --prefix_cache_gib: {_in_one_line(error)}")
            self.prefix.room = 0
        return kept

    @functools.cached_property
    def has_frozen_output(self) -> bool:
        """Whether the frozen layers' output can be had, which routing needs; where not, says so."""
        if not self.prefix.num_frozen_layers:
            return False
        ids = torch.tensor([[self.tokenizer.eos_token_id] * 2], device=self.device)
        try:
            with evaluation(self.model):
                self.prefix.run_bottom(ids)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            print(f"{self._family} is not read as routed: {_in_one_line(error)}")
            return False
        return True

    def branches_to(self, length: int) -> bool:
        """Whether the model reads rows of so many tokens that branch.

        It must take masks and positions, and see as far as the mask lets it.
        """
        config = self.model.config.get_text_config()
        sights = (getattr(config, name, None) for name in SIGHTS)
        return self._reads_branches and all(not sight or length <= sight for sight in sights)

    @functools.cached_property
    def _reads_branches(self) -> bool:
        if self.model.config._attn_implementation not in ("eager", "sdpa"):
            return False
        # Three tokens, and another way on from the second of them.
        ids = torch.tensor([[self.tokenizer.eos_token_id, 0, 1, 2, 0]], device=self.device)
        parents = torch.tensor([[0, 0, 1, 1, 3]], device=self.device)
        ways, read = ([0, 1, 2], [0, 1, 3, 4]), partial(response_logits, self.model)
        with evaluation(self.model):
            plain = [read(ids[:, way], torch.tensor([len(way) - 1])) for way in ways]
            try:
                found = read(ids, torch.tensor([2, 4]), parents=parents)
            except Exception as error:
                # Whatever a family's own code makes of a mask that is not its own.
                if is_out_of_memory(error):
                    raise
                return False
        return are_close(found, torch.cat(plain))

    @property
    def _family(self) -> str:
        return type(self.model).__name__

    @contextlib.contextmanager
    def kept_prefix(self):
        """At the end of the block what `keep_prefix` kept in it is dropped."""
        before = self.prefix.sample_ids()
        try:
            yield
        finally:
            self.prefix.drop(self.prefix.sample_ids() - before)

    def with_less_memory(self, work: Callable):
        """`work()`; where it runs out of memory, again with passes of half the tokens.

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
                    "out of memory with one sample a pass: give --gradient_checkpointing true, "
                    "a smaller --max_seq_len, --quantization 4bit, or a larger --num_frozen_layers"
                )
            if self._has_gradients:
                self.tokens_per_pass = max(1, self.tokens_per_pass // 2)
                print(f"out of memory: going on with --tokens_per_pass {self.tokens_per_pass}")
            else:
                self.divisor *= 2
                print(
                    f"out of memory: reading and answering go on with 1/{self.divisor} of the "
                    "tokens a pass; training is as before"
                )
