"""Dual-Speed LoRA: two low-rank branches, slow and fast, beside each target linear layer.

y = base(x) + (alpha / r) (B_s A_s + B_f A_f) dropout(x), after LoRA (Hu et al. 2021, eq. 3).
Slow is shared by all tasks and learns at a small rate; fast follows the task at hand. rsLoRA
(Kalajdzievski 2023) has alpha / sqrt(r) in place of alpha / r.
"""

import contextlib
import math

import torch
import torch.nn.functional as F
from torch import nn

from models.forward import seed_torch

BRANCHES = ("slow", "fast")
# As a target: every linear layer of the decoder layers, as PEFT has it.
ALL_LINEAR = "all-linear"


class InputDropout(nn.Dropout):
    """`nn.Dropout`; on a CPU with 16 random bits a number, a quarter of Bernoulli's time."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.device.type != "cpu" or not self.training or self.p == 0:
            return super().forward(x)
        words = torch.empty(x.numel() // 4 + 1, dtype=torch.int64).random_(-(2**63), None)
        bits = words.view(torch.int16)[: x.numel()].view(x.shape)
        kept = bits >= round(self.p * 2**16) - 2**15
        return x * kept.to(x.dtype).mul_(1 / (1 - self.p))


class DSLoRALinear(nn.Module):
    """A frozen linear layer with a slow and a fast LoRA branch.

    The base layer stays a child module and is only ever called, so that quantised layers work.
    A is kaiming-uniform and B zero: a new branch changes nothing.

    Args:
        base_layer: an `nn.Linear` or a subclass of it.
        r: rank of each branch.
        alpha: each branch's output is scaled by alpha / r.
        dropout: probability, on the input of the branches.
        use_rslora: the scale is alpha / sqrt(r).
    """

    def __init__(
        self,
        base_layer: nn.Linear,
        r: int,
        alpha: float,
        dropout: float = 0.0,
        use_rslora: bool = False,
    ):
        super().__init__()
        self.base_layer = base_layer
        self.r, self.alpha, self.use_rslora = r, alpha, use_rslora
        self.scaling = alpha / (math.sqrt(r) if use_rslora else r)
        self.dropout = InputDropout(dropout)
        self.active = BRANCHES
        device = base_layer.weight.device
        for branch in BRANCHES:
            # fp32 whatever the base: in bf16 most updates at these rates round to nothing.
            A = torch.empty(r, base_layer.in_features, dtype=torch.float32, device=device)
            B = torch.empty(base_layer.out_features, r, dtype=torch.float32, device=device)
            self.register_parameter(f"lora_A_{branch}", nn.Parameter(A))
            self.register_parameter(f"lora_B_{branch}", nn.Parameter(B))
            self.reset_branch(branch)

    @property
    def weight(self):
        """The base layer's weight, frozen."""
        return self.base_layer.weight

    @property
    def bias(self):
        """The base layer's bias, frozen, or None."""
        return self.base_layer.bias

    @torch.no_grad()
    def reset_branch(self, branch: str) -> None:
        """Makes `branch` new: it adds nothing until it is trained."""
        A, B = self.branch(branch)
        # Drawn on the CPU, so that a seed means the same weights on every device.
        A.copy_(nn.init.kaiming_uniform_(torch.empty(A.shape), a=math.sqrt(5)))
        B.zero_()

    def branch(self, name: str) -> tuple[nn.Parameter, nn.Parameter]:
        """(A (r, in_features), B (out_features, r)) of the branch "slow" or "fast", fp32."""
        return getattr(self, f"lora_A_{name}"), getattr(self, f"lora_B_{name}")

    @torch.no_grad()
    def set_branch(self, name: str, A: torch.Tensor, B: torch.Tensor) -> None:
        """Gives the branch the values A (rank, in_features) and B (out_features, rank).

        Another rank makes new parameters: an optimizer that holds the old ones is of no use then.
        """
        for matrix, value in (("A", A), ("B", B)):
            old = getattr(self, f"lora_{matrix}_{name}")
            if old.shape == value.shape:
                old.copy_(value)
            else:
                new = nn.Parameter(value.to(old).clone(), requires_grad=old.requires_grad)
                setattr(self, f"lora_{matrix}_{name}", new)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., in_features) in fp32, bf16 or fp16 -> (..., out_features) in the same dtype."""
        y = self.base_layer(x)
        if not self.active:
            return y
        # One pair of products for both branches. The small parameters are cast down: casting the
        # input up would keep an fp32 copy of it for the backward.
        A_parts, B_parts = zip(*(self.branch(name) for name in self.active), strict=True)
        A = torch.cat(A_parts).to(x.dtype)
        B = torch.cat(B_parts, dim=1).to(x.dtype)
        return y + F.linear(F.linear(self.dropout(x), A) * self.scaling, B)


@torch.no_grad()
def merge_branches(model: nn.Module) -> nn.Module:
    """Adds what the branches that are on do to the base's weights, and takes the branches out.

    In place: W + scale (B_s A_s + B_f A_f), summed in fp32 and rounded to the base's dtype once.
    The base must not be quantised.
    """
    for name, layer in ds_lora_layers(model).items():
        weight = layer.weight.float()
        for branch in layer.active:
            A, B = layer.branch(branch)
            weight = weight + layer.scaling * (B @ A)
        layer.weight.copy_(weight)
        parent_name, _, child_name = name.rpartition(".")
        setattr(model.get_submodule(parent_name), child_name, layer.base_layer)
    return model


def find_decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """(name, layers) of the decoder stack: the module list that holds the most parameters.

    Raises ValueError where the model has no module list.
    """
    stacks = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
    if not stacks:
        raise ValueError(f"{type(model).__name__} has no list of decoder layers")
    return max(stacks.items(), key=lambda item: sum(p.numel() for p in item[1].parameters()))


def ds_lora_layers(model: nn.Module) -> dict[str, DSLoRALinear]:
    """Name -> layer of every `DSLoRALinear` in `model`, bottom up."""
    return {name: m for name, m in model.named_modules() if isinstance(m, DSLoRALinear)}


def replace_with_ds_lora(
    model: nn.Module,
    target_modules=("q_proj", "v_proj"),
    r: int = 8,
    alpha: float = 32,
    dropout: float = 0.05,
    num_frozen_layers: int = 16,
    use_rslora: bool = False,
) -> nn.Module:
    """Freezes `model` and gives its upper decoder layers slow and fast branches, in place.

    A linear layer whose name inside a decoder layer of index >= `num_frozen_layers` is, or ends
    with, one of `target_modules` ("q_proj", "self_attn.q_proj") becomes a `DSLoRALinear`, and every
    one with ALL_LINEAR; only the branches are trainable afterwards.

    Raises ValueError where a target matches nothing, where no layer is left to train, or where the
    model has branches already.
    """
    if ds_lora_layers(model):
        raise ValueError("the model has DS-LoRA branches already")
    stack_name, layers = find_decoder_layers(model)
    if not 0 <= num_frozen_layers < len(layers):
        raise ValueError(
            f"num_frozen_layers is {num_frozen_layers}, but {stack_name} has {len(layers)} layers: "
            f"give 0 to {len(layers) - 1}"
        )
    linears = [
        (layer, name, module)
        for layer in layers[num_frozen_layers:]
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear)
    ]
    # Whole names: v_proj is no part of a fused qkv_proj.
    matched = {
        name: {
            target
            for target in target_modules
            if target == ALL_LINEAR or f".{name}".endswith(f".{target}")
        }
        for _, name, _ in linears
    }
    if unmatched := set(target_modules) - set().union(*matched.values()):
        raise ValueError(
            f"no linear layer of {stack_name} is called {', '.join(sorted(unmatched))}; there are "
            f"{', '.join(sorted({name for _, name, _ in linears})) or 'none'}"
        )
    chosen = [place for place in linears if matched[place[1]]]
    model.requires_grad_(False)
    for layer, name, linear in chosen:
        parent_name, _, child_name = name.rpartition(".")
        new = DSLoRALinear(linear, r, alpha, dropout, use_rslora).train(linear.training)
        setattr(layer.get_submodule(parent_name), child_name, new)
    return model


def training_mode(model: nn.Module, num_frozen_layers: int) -> None:
    """Train mode for the layers above the frozen ones, eval mode for all below and around them.

    The base's own dropout, layer drop and router jitter are off there, so what the frozen layers
    make of a text is the same in training, evaluation and the kept prefix.
    """
    model.eval()
    for layer in find_decoder_layers(model)[1][num_frozen_layers:]:
        layer.train()


def branch_parameters(model: nn.Module, branch: str) -> list[nn.Parameter]:
    """All parameters of the branch "slow" or "fast", bottom up, A before B."""
    return [p for layer in ds_lora_layers(model).values() for p in layer.branch(branch)]


def get_ds_lora_param_groups(model: nn.Module, lr_slow: float, lr_fast: float, weight_decay: float):
    """(optim_groups, slow_params, fast_params) for one AdamW with two rates.

    The groups are disjoint and together hold every trainable parameter; a branch that is not
    trained has none. Each keeps its own rate under "base_lr" too, for a schedule to multiply.
    """
    slow, fast = (
        [p for p in branch_parameters(model, branch) if p.requires_grad] for branch in BRANCHES
    )
    grouped = {id(p) for p in slow} | {id(p) for p in fast}
    assert len(grouped) == len(slow) + len(fast), "a parameter is in both groups"
    assert grouped == {id(p) for p in model.parameters() if p.requires_grad}, (
        "trainable parameters outside the branches"
    )
    groups = [
        {"name": name, "params": params, "lr": lr, "base_lr": lr, "weight_decay": weight_decay}
        for name, params, lr in (("slow", slow, lr_slow), ("fast", fast, lr_fast))
        if params
    ]
    return groups, slow, fast


def get_lora_param_groups(model: nn.Module, lr: float, weight_decay: float) -> list[dict]:
    """What is trained of both branches as one AdamW group.

    At one rate they are a single LoRA of rank 2r: each is scaled by alpha / r, and AdamW treats
    every number by itself.
    """
    groups, slow, fast = get_ds_lora_param_groups(model, lr, lr, weight_decay)
    return [{**groups[0], "name": "lora", "params": slow + fast}]


def freeze_branch(model: nn.Module, branch: str) -> None:
    """Leaves the branch "slow" or "fast" as it is: nothing of it is trained."""
    for parameter in branch_parameters(model, branch):
        parameter.requires_grad_(False)


def reset_branch(model: nn.Module, branch: str, *seed) -> None:
    """Makes the branch "slow" or "fast" new in every layer; `seed`: see `seed_torch`."""
    seed_torch(*seed)
    for layer in ds_lora_layers(model).values():
        layer.reset_branch(branch)


def branch_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of both branches on the CPU, "branch.number" -> tensor, bottom up, A before B."""
    return {
        f"{branch}.{i:04d}": parameter.detach().cpu().clone()
        for branch in BRANCHES
        for i, parameter in enumerate(branch_parameters(model, branch))
    }


def set_branch_tensors(model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Takes up what `branch_tensors` gave, whatever its ranks."""
    for i, layer in enumerate(ds_lora_layers(model).values()):
        for branch in BRANCHES:
            parts = (tensors[f"{branch}.{number:04d}"] for number in (2 * i, 2 * i + 1))
            layer.set_branch(branch, *parts)


@contextlib.contextmanager
def branches_restored(model: nn.Module):
    """Within the block the branches may be written to; afterwards they are what they were."""
    before = branch_tensors(model)
    # The parameters themselves too: a branch of another rank takes the place of one.
    parameters = {
        (layer, name): parameter
        for layer in ds_lora_layers(model).values()
        for name, parameter in layer.named_parameters(recurse=False)
    }
    try:
        yield
    finally:
        for (layer, name), parameter in parameters.items():
            setattr(layer, name, parameter)
        set_branch_tensors(model, before)


@contextlib.contextmanager
def branch_off(model: nn.Module, branch: str):
    """Within the block the branch "slow" or "fast" adds nothing."""
    before = {layer: layer.active for layer in ds_lora_layers(model).values()}
    try:
        for layer in before:
            layer.active = tuple(name for name in layer.active if name != branch)
        yield
    finally:
        for layer, active in before.items():
            layer.active = active
