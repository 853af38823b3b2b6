"""The frozen bottom layers, run once: their output for a text never changes.

It is the same over epochs, stages, branches and seeds, so evaluation, probes and later epochs can
start from it and run the upper layers only.
"""

import contextlib
from collections.abc import Iterable
from functools import partial

import torch
from torch import nn

from models.ds_lora import find_decoder_layers
from models.forward import are_close, evaluation, response_logits, told_of_branches


class _Reached(Exception):
    """The forward has come to the end of the frozen layers: the rest need not be run."""


class _StandIn(nn.Module):
    """Takes the place of a decoder layer: returns `output` where given, else its own input.

    The list of layers keeps its length, since models choose masks by a layer's number; what else
    they read from a layer is answered by the one replaced.

    Args:
        returned: of the tuple that the layer returns how many, 0 where it returns a tensor alone.
    """

    def __init__(self, layer: nn.Module, returned: int = 0, output=None):
        super().__init__()
        self.returned, self.output = returned, output
        # Not as a submodule: its parameters are not to be found here.
        object.__setattr__(self, "_layer", layer)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "_layer"), name)

    def forward(self, hidden_states, *args, **kwargs):
        output = hidden_states if self.output is None else self.output
        return (output, *[None] * (self.returned - 1)) if self.returned else output


@contextlib.contextmanager
def _replaced(layers: nn.ModuleList, new: dict[int, nn.Module]):
    old = {i: layers[i] for i in new}
    try:
        for i, module in new.items():
            layers[i] = module
        yield
    finally:
        for i, module in old.items():
            layers[i] = module


class FrozenPrefix:
    """Keeps the output of the frozen bottom layers of `model` for the run, sample by sample.

    Args:
        model: a decoder whose lowest `num_frozen_layers` layers never change.
        num_frozen_layers: 0: nothing is ever kept.
        room: bytes of host memory, or of the store.
        store: where passes are looked up before they are run, and left for others: `load(samples)`
            gives the rows of a pass or None, `save(samples, rows)` takes them.

    Attributes:
        used: bytes in use.
    """

    def __init__(self, model: nn.Module, num_frozen_layers: int, room: int, store=None):
        self.model, self.num_frozen_layers = model, num_frozen_layers
        self.layers = find_decoder_layers(model)[1]
        self.room = room if num_frozen_layers else 0
        self.store, self.used = store, 0
        self._kept: dict[str, torch.Tensor] = {}
        self._returned, self._bytes_per_token, self._is_checked = 0, 0, False

    def __contains__(self, sample_id: str) -> bool:
        return sample_id in self._kept

    def sample_ids(self) -> set[str]:
        """Of all that is kept."""
        return set(self._kept)

    @torch.no_grad()
    def run_bottom(
        self, input_ids: torch.Tensor, parents: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Output of the highest frozen layer, (batch, length, width) in the activations' dtype.

        `parents`: see `told_of_branches`. Raises ValueError where the layers give something else.
        """
        outputs = []

        def stop(_layer, _args, output):
            outputs.append(output)
            raise _Reached

        hook = self.layers[self.num_frozen_layers - 1].register_forward_hook(stop)
        try:
            told = told_of_branches(self.model, parents)
            self.model(input_ids=input_ids, use_cache=False, **told)
        except _Reached:
            pass
        finally:
            hook.remove()
        (output,) = outputs
        self._returned = len(output) if isinstance(output, tuple) else 0
        hidden = output[0] if self._returned else output
        if hidden.shape[:-1] != input_ids.shape:
            shape = tuple(hidden.shape)
            raise ValueError(f"its layers give {shape} for {tuple(input_ids.shape)} tokens")
        return hidden

    @contextlib.contextmanager
    def resumed(self, hidden: torch.Tensor):
        """Within the block the model's forward starts above the frozen layers, from `hidden`.

        `hidden` is (batch, length, width) for the (batch, length) ids given to the model.
        """
        top = self.num_frozen_layers
        stand_ins = {
            i: _StandIn(self.layers[i], self._returned, hidden if i == top - 1 else None)
            for i in range(top)
        }
        with _replaced(self.layers, stand_ins):
            yield

    def keep(self, samples: list[dict], batch: dict) -> list[str]:
        """Runs the frozen layers over one pass and keeps their output; the ids that are new.

        Kept already, or no room left: nothing is run. A row's bits depend on the rows beside it,
        so the same samples must always come in the same passes.

        Raises ValueError where the first pass differs from the plain model's, and whatever a
        model raises that cannot be run in parts.

        Args:
            samples: {"id", "input_ids"} of each row.
            batch: "input_ids" (batch, length), "positions" and, where rows branch, "parents", see
                `response_logits`.
        """
        # Samples of the same text have the same id.
        first = {sample["id"]: i for i, sample in reversed(list(enumerate(samples)))}
        new = sorted(i for sample_id, i in first.items() if sample_id not in self)
        if not new or self.room == 0:
            return []
        with evaluation(self.model):
            needed = sum(len(samples[i]["input_ids"]) for i in new) * self._token_bytes(batch)
            if self.used + needed > self.room:
                return []
            rows = self._rows(samples, batch)
        for i in new:
            self._kept[samples[i]["id"]] = rows[i]
            self.used += rows[i].nbytes
        return [samples[i]["id"] for i in new]

    def _token_bytes(self, batch: dict) -> int:
        if not self._bytes_per_token:
            hidden = self.run_bottom(batch["input_ids"][:1, :1])
            self._bytes_per_token = hidden.shape[-1] * hidden.element_size()
        return self._bytes_per_token

    def _rows(self, samples: list[dict], batch: dict) -> list[torch.Tensor]:
        """(length, width) of each row of a pass, stored or run."""
        rows = self.store.load(samples) if self.store else None
        if rows is None:
            hidden = self.run_bottom(batch["input_ids"], batch.get("parents"))
            if not self._is_checked:
                self._check(batch, hidden)
            pairs = zip(hidden.cpu(), samples, strict=True)
            # A copy: a view would hold the whole pass with its padding.
            rows = [row[: len(sample["input_ids"])].clone() for row, sample in pairs]
            if self.store:
                self.store.save(samples, rows)
                # Mapped, they take no memory that others want.
                rows = self.store.load(samples) or rows
        return rows

    def _check(self, batch: dict, hidden: torch.Tensor) -> None:
        plain = response_logits(self.model, **batch)
        resumed = response_logits(self.model, **batch, start=partial(self.resumed, hidden))
        # The same operations on the same shapes: what little may differ is the kernels' order.
        if not are_close(resumed, plain):
            difference = float((plain - resumed).abs().max() / plain.abs().max())
            raise ValueError(f"its upper layers alone differ by {difference:.0e}")
        self._is_checked = True

    def drop(self, sample_ids: Iterable[str]) -> None:
        """Forgets samples."""
        for sample_id in sample_ids:
            self.used -= self._kept.pop(sample_id).nbytes

    def start(self, samples: list[dict], batch: dict):
        """What `response_logits` takes as `start` for a pass, or None where nothing of it is kept.

        Rows that are not kept are run through the frozen layers here.
        """
        if not any(sample["id"] in self for sample in samples):
            return None
        return partial(self.resumed, self.outputs(samples, batch))

    def outputs(self, samples: list[dict], batch: dict) -> torch.Tensor:
        """Output of the highest frozen layer for a pass, (batch, length, width), kept or run."""
        input_ids, parents = batch["input_ids"], batch.get("parents")
        rows = [self._kept.get(sample["id"]) for sample in samples]
        missing = [i for i, row in enumerate(rows) if row is None]
        with evaluation(self.model):
            if len(missing) == len(rows):
                return self.run_bottom(input_ids, parents)
            on_gpu, found = input_ids.is_cuda, next(row for row in rows if row is not None)
            # Padding may hold anything finite. Pinned, so that the copy waits for nothing.
            size = (*input_ids.shape, found.shape[-1])
            host = torch.zeros(size, dtype=found.dtype, pin_memory=on_gpu)
            for i, row in enumerate(rows):
                if row is not None:
                    host[i, : len(row)] = row
            hidden = host.to(input_ids.device, non_blocking=on_gpu)
            if missing:
                of_missing = None if parents is None else parents[missing]
                hidden[missing] = self.run_bottom(input_ids[missing], of_missing)
        return hidden
