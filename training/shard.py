"""The frozen base shared out: each process holds an n-th of every weight (FSDP2).

The weights of a layer are gathered from all processes where one of them runs it, forward or
backward, and let go again. The branches stay whole in each process.

A gathering takes all processes, and these do not run the same layers: they have more or fewer
passes, start from the kept prefix or not, end their answers sooner or later, run out of memory one
by one. So each gathering is agreed on just before it. Every process says which weights it wants
next, or that it waits where all are to meet; the wish of the one that is furthest behind is chosen,
and whoever wished for something else hands out its share too, and asks again. Nothing else in the
program knows of it, and no order of layers or number of passes is counted on.
"""

import json
from pathlib import Path

import torch
import torch.distributed as dist
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from configs.command_line import UserError, num_processes, rank
from models.ds_lora import find_decoder_layers
from models.forward import evaluation
from training.processes import least_of_all, sharers

# What a process wishes for that wants no weights: it comes after every other.
NOTHING = 2**63 - 1
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def units_of(model: nn.Module) -> list[nn.Module]:
    """The parts of `model` whose weights are gathered together, in the order of the forward.

    The first is `model` itself, for all that is in no other: the last norm, and embeddings that
    both ends share.
    """
    first, last = model.get_input_embeddings(), model.get_output_embeddings()
    layers = list(find_decoder_layers(model)[1])
    is_tied = first.weight is last.weight
    return [model, *layers] if is_tied else [model, first, *layers, last]


def parameters_of(units: list[nn.Module]) -> list[list[nn.Parameter]]:
    """The parameters of each unit, without those of the others inside it."""
    inner = {id(p) for unit in units[1:] for p in unit.parameters()}
    own = [p for p in units[0].parameters() if id(p) not in inner]
    return [own, *(list(unit.parameters()) for unit in units[1:])]


def weight_files(cfg) -> list[Path]:
    """The safetensors files of the base model, on this machine; `UserError` where it has none."""
    folder = Path(cfg.model_name)
    if not folder.is_dir():
        folder = Path(
            snapshot_download(cfg.model_name, allow_patterns=[SINGLE, "model*-of-*", INDEX])
        )
    files = [folder / SINGLE]
    if (folder / INDEX).exists() and not files[0].exists():
        of_weights = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        files = [folder / Path(name).name for name in sorted(set(of_weights.values()))]
    if absent := [path.name for path in files if not path.exists()]:
        raise UserError(
            f"--shard true: {cfg.model_name} has no {absent[0]}, of which each process could read "
            "its share; give a whole model with .safetensors, or --shard false"
        )
    return files


def share_out(model: nn.Module, files: list[Path], device: torch.device) -> nn.Module:
    """`model`, which is on the meta device, with this process's share of its weights on `device`.

    Of each weight it reads its rows from the mapped `files`, and nothing else. `begin` comes next.
    Raises `UserError` where they do not hold the weights by the model's own names and shapes.
    """
    # Before there are units: they gather what is to be trained as something that has a gradient.
    model.requires_grad_(False)
    _make_buffers(model, device)
    units, mesh = units_of(model), init_device_mesh(device.type, (num_processes(),))
    for unit in reversed(units):
        fully_shard(unit, mesh=mesh, reshard_after_forward=True)
    model._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t)
    _read_shares(model, files)
    return model


def begin(model: nn.Module, device: torch.device) -> nn.Module:
    """`model`, which all processes have shared out, ready to be run."""
    units = units_of(model)
    turns = _Turns(units)
    for number, unit in enumerate(units):
        unit.set_custom_all_gather(_Gathering(turns, number))
    # FSDP learns its units in the first forward, which must hold them all.
    with evaluation(model):
        model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=device), use_cache=False)
    model.register_forward_pre_hook(turns.begin_forward, prepend=True)
    model.register_forward_hook(turns.end_forward)
    sharers.append(turns)
    return model


def _make_buffers(model: nn.Module, device: torch.device) -> None:
    """Puts the buffers on `device`, as the family's own code makes them; no file holds them."""
    for module in model.modules():
        module._is_hf_initialized = False
        for name, buffer in module._buffers.items():
            if buffer is not None:
                empty = torch.empty_like(buffer, device=device)
                filler = float("nan") if buffer.is_floating_point() else 0
                module._buffers[name] = empty.fill_(filler)
    # On the meta device, where the weights still are, this does nothing.
    model.initialize_weights()


@torch.no_grad()
def _read_shares(model: nn.Module, files: list[Path]) -> None:
    wanted = dict(model.named_parameters(remove_duplicate=False))
    persistent = model.state_dict().keys() - wanted.keys()
    wanted |= {name: buffer for name, buffer in model.named_buffers() if name in persistent}
    read = set()
    for path in files:
        with safe_open(path, "pt") as file:
            for name in wanted.keys() & set(file.keys()):
                rows, whole = file.get_slice(name), wanted[name]
                if tuple(rows.get_shape()) != tuple(whole.shape):
                    raise UserError(
                        f"{path}: its {name} is {tuple(rows.get_shape())}, the model's "
                        f"{tuple(whole.shape)}"
                    )
                read.add(id(whole))
                if not isinstance(whole, DTensor):
                    whole.copy_(rows[:])
                    continue
                mine = whole.to_local()
                start = rank() * -(-len(whole) // num_processes())
                if len(mine):
                    mine.copy_(rows[start : start + len(mine)])
    missing = sorted(name for name, tensor in wanted.items() if id(tensor) not in read)
    missing += [
        name
        for name, buffer in model.named_buffers()
        if buffer.is_floating_point() and buffer.isnan().any() and name not in missing
    ]
    if missing:
        raise UserError(
            f"--shard true: {len(missing)} weights, such as {missing[0]}, are not in the model's "
            "files by that name, and can be read whole only: give --shard false"
        )


class _Turns:
    """Whose wish is next.

    Args:
        units: see `units_of`, shared out.

    Attributes:
        params: of each unit, this process's shares of its weights.
        sizes: numbers of each unit that a process hands out.
    """

    def __init__(self, units: list[FSDPModule]):
        self.units, self.params = units, parameters_of(units)
        self.sizes = [sum(map(_share_size, of_unit)) for of_unit in self.params]
        self.forwards, self.is_backward = 0, False
        example = self.params[-1][0].to_local()
        # Here before it is needed: memory must not run out in the middle of a gathering.
        self._unread = example.new_empty(max(self.sizes) * num_processes())
        self._written: torch.Event | None = None
        # FSDP's own: another group of the same processes would be another queue.
        self.group: dist.ProcessGroup | None = None

    def begin_forward(self, model: nn.Module, _args) -> None:
        # A pass that was stopped on its way, or ran out of memory, left some weights gathered.
        model.reset_iter_state()
        self.forwards, self.is_backward = self.forwards + 1, False

    def end_forward(self, *_) -> None:
        """What is gathered from here to the next forward is for the backward."""
        self.is_backward = True

    def share(self, number: int, out: torch.Tensor) -> torch.Tensor:
        """This process's part in gathering the unit `number`: `out`, as FSDP lays it out."""
        start = 0
        for parameter in self.params[number]:
            local = parameter.to_local().flatten()
            out[start : start + len(local)] = local
            start += _share_size(parameter)
        return out

    def wait(self) -> None:
        """Returns when no process wants weights before all meet."""
        self.until(None)
        self.forwards = 0

    def leave(self) -> None:
        """Lets go of the group: the threads of one that is still held can abort the process."""
        self.group = None
        for unit in self.units:
            for group in unit._get_fsdp_state()._fsdp_param_groups:
                group.mesh_info.shard_process_group = None
                group.mesh_info.mesh._pg_registry.clear()

    def until(self, number: int | None) -> None:
        """Returns when the unit `number` is gathered next in all processes; None: when none is."""
        wish = NOTHING if number is None else self._wish(number)
        while (chosen := least_of_all(wish)) != NOTHING:
            # The unit stands in the lowest bits.
            if chosen & 0xFFFF == number:
                return
            self._help(chosen & 0xFFFF)

    def _wish(self, number: int) -> int:
        """Smaller for who is further behind: by forwards, and in them from unit to unit."""
        place = len(self.params) - number if self.is_backward else number
        return ((2 * self.forwards + self.is_backward) << 32) + (place << 16) + number

    @torch.no_grad()
    def _help(self, number: int) -> None:
        size = self.sizes[number]
        gathered = self._unread[: size * num_processes()]
        # FSDP gathers in a stream of its own: what was asked before may still be on its way.
        if self._written:
            torch.cuda.current_stream().wait_event(self._written)
        own = self.share(number, gathered[rank() * size :][:size])
        dist.all_gather_into_tensor(gathered, own, self.group)
        if gathered.is_cuda:
            self._written = torch.cuda.current_stream().record_event()


def _share_size(parameter: DTensor) -> int:
    """Numbers of the largest share of `parameter`, to which FSDP pads the others."""
    return -(-len(parameter) // num_processes()) * (parameter.numel() // len(parameter))


class _Gathering:
    """FSDP's all-gather of one unit, when it is its turn."""

    def __init__(self, turns: _Turns, number: int):
        self.turns, self.number, self._is_checked = turns, number, False

    def allocate(self, size, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor, input_tensor, group, async_op: bool = False):
        if not self._is_checked:
            # What the others are given in help is what FSDP itself gives.
            own = self.turns.share(self.number, torch.zeros_like(input_tensor))
            assert torch.equal(input_tensor, own)
            self._is_checked = True
        self.turns.group = group
        self.turns.until(self.number)
        return dist.all_gather_into_tensor(output_tensor, input_tensor, group, async_op)
