"""The frozen bottom layers, run once: their output for a text never changes.

It is the same over epochs, stages, branches and seeds, so evaluation, probes and later epochs can
start from it and run the upper layers only.
"""

import contextlib
from functools import partial

import torch
from torch import nn

from models.ds_lora import find_decoder_layers
from models.forward import evaluation, response_logits


class _StandIn(nn.Module):
    """Takes the place of a decoder layer: returns `output` where given, else its own input.

    The list of layers keeps its length, since models choose masks by a layer's number; what else
    they read from a layer is answered by the one replaced.
    """

    def __init__(self, layer: nn.Module, returns_tuple: bool = False, output=None):
        super().__init__()
        self.returns_tuple, self.output = returns_tuple, output
        # Not as a submodule: its parameters are not to be found here.
        object.__setattr__(self, "_layer", layer)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "_layer"), name)

    def forward(self, hidden_states, *args, **kwargs):
        output = hidden_states if self.output is None else self.output
        return (output,) if self.returns_tuple else output


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
    """Keeps the output of the frozen bottom layers of `model` in host memory, sample by sample.

    Args:
        model: a decoder whose lowest `num_frozen_layers` layers never change.
        num_frozen_layers: 0: nothing is ever kept.
        room: bytes of host memory.

    Attributes:
        used: bytes of host memory in use.
    """

    def __init__(self, model: nn.Module, num_frozen_layers: int, room: int):
        self.model, self.num_frozen_layers = model, num_frozen_layers
        self.layers = find_decoder_layers(model)[1]
        self.room = room if num_frozen_layers else 0
        self.used = 0
        self._kept: dict[str, torch.Tensor] = {}
        self._returns_tuple = False
        self._bytes_per_token = 0

    def __contains__(self, sample_id: str) -> bool:
        return sample_id in self._kept

    @torch.no_grad()
    def run_bottom(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Output of the highest frozen layer, (batch, length, width) in the activations' dtype."""
        top, outputs = self.num_frozen_layers, []
        upper = {i: _StandIn(self.layers[i]) for i in range(top, len(self.layers))}
        hook = self.layers[top - 1].register_forward_hook(lambda *args: outputs.append(args[2]))
        try:
            with _replaced(self.layers, upper):
                self.model.get_decoder()(input_ids=input_ids, use_cache=False)
        finally:
            hook.remove()
        self._returns_tuple = isinstance(outputs[0], tuple)
        return outputs[0][0] if self._returns_tuple else outputs[0]

    @contextlib.contextmanager
    def resumed(self, hidden: torch.Tensor):
        """Within the block the model's forward starts above the frozen layers, from `hidden`.

        `hidden` is (batch, length, width) for the (batch, length) ids given to the model.
        """
        top = self.num_frozen_layers
        stand_ins = {
            i: _StandIn(self.layers[i], self._returns_tuple, hidden if i == top - 1 else None)
            for i in range(top)
        }
        with _replaced(self.layers, stand_ins):
            yield

    def keep(self, samples: list[dict], batch: dict) -> list[str]:
        """Runs the frozen layers over one pass and keeps their output; the ids that are new.

        Kept already, or no room left: nothing is run. A row's bits depend on the rows beside it,
        so the same samples must always come in the same passes.

        Raises ValueError where the first pass differs from the plain model's.

        Args:
            samples: {"id", "input_ids"} of each row.
            batch: "input_ids" (batch, length) and "positions", see `response_logits`.
        """
        # Samples of the same text have the same id.
        first = {sample["id"]: i for i, sample in reversed(list(enumerate(samples)))}
        new = sorted(i for sample_id, i in first.items() if sample_id not in self)
        lengths = {i: len(samples[i]["input_ids"]) for i in new}
        needed = sum(lengths.values()) * self._bytes_per_token
        if not new or self.room == 0 or self.used + needed > self.room:
            return []
        with evaluation(self.model):
            hidden = self.run_bottom(batch["input_ids"])
            if not self._bytes_per_token:
                self._check(batch, hidden)
        hidden = hidden.cpu()
        for i in new:
            # A copy: a view would hold the whole pass with its padding.
            self._kept[samples[i]["id"]] = hidden[i, : lengths[i]].clone()
            self.used += self._kept[samples[i]["id"]].nbytes
        return [samples[i]["id"] for i in new]

    def _check(self, batch: dict, hidden: torch.Tensor) -> None:
        plain = response_logits(self.model, **batch).float()
        resumed = response_logits(self.model, **batch, start=partial(self.resumed, hidden)).float()
        difference = (plain - resumed).abs().max() / plain.abs().max()
        # The same operations on the same shapes: what little may differ is the kernels' order.
        tolerance = 1e-4 if hidden.dtype == torch.float32 else 1e-2
        if not difference <= tolerance:
            raise ValueError(f"its upper layers alone differ by {float(difference):.0e}")
        self._bytes_per_token = hidden.shape[-1] * hidden.element_size()

    def drop(self, sample_ids: list[str]) -> None:
        """Forgets samples."""
        for sample_id in sample_ids:
            self.used -= self._kept.pop(sample_id).nbytes

    def start(self, samples: list[dict], input_ids: torch.Tensor):
        """What `response_logits` takes as `start` for a pass, or None where nothing of it is kept.

        Rows that are not kept are run through the frozen layers here.
        """
        if not any(sample["id"] in self for sample in samples):
            return None
        return partial(self.resumed, self.outputs(samples, input_ids))

    def outputs(self, samples: list[dict], input_ids: torch.Tensor) -> torch.Tensor:
        """Output of the highest frozen layer for a pass, (batch, length, width), kept or run."""
        rows = [self._kept.get(sample["id"]) for sample in samples]
        missing = [i for i, row in enumerate(rows) if row is None]
        with evaluation(self.model):
            if len(missing) == len(rows):
                return self.run_bottom(input_ids)
            on_gpu, found = input_ids.is_cuda, next(row for row in rows if row is not None)
            # Padding may hold anything finite. Pinned, so that the copy waits for nothing.
            size = (*input_ids.shape, found.shape[-1])
            host = torch.zeros(size, dtype=found.dtype, pin_memory=on_gpu)
            for i, row in enumerate(rows):
                if row is not None:
                    host[i, : len(row)] = row
            hidden = host.to(input_ids.device, non_blocking=on_gpu)
            if missing:
                hidden[missing] = self.run_bottom(input_ids[missing])
        return hidden
