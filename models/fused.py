"""Faster kernels for what a model computes, of the same result but for the last rounding."""

import copy

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

# Elements up to which oneDNN multiplies by a weight: it copies it into an order of its own.
ONEDNN_WEIGHT = 2**24


def fuse_norms(model: nn.Module) -> int:
    """Puts `nn.RMSNorm` in the place of every norm of `model` whose result it equals.

    One kernel where the model's own code takes many: for a GPU, which waits for launches.
    Tried out on each: some families scale by 1 + weight, or have a bias; on the meta device with
    random weights. Equal is to the last rounding of the dtype, as the fused kernel rounds once
    where the model's own code rounds twice. Returns how many were replaced.
    """
    found = [
        (name, norm)
        for name, norm in model.named_modules()
        if type(norm).__name__.endswith("RMSNorm") and not isinstance(norm, nn.RMSNorm)
    ]
    replaced = 0
    for name, norm in found:
        fused = _fused(norm)
        if fused is not None:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, fused)
            replaced += 1
    return replaced


@torch.no_grad()
def _fused(norm: nn.Module) -> nn.RMSNorm | None:
    """`norm` as `nn.RMSNorm` with the same weight, or None where the two differ."""
    weight = getattr(norm, "weight", None)
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    if weight is None or not isinstance(eps, float) or [*norm.parameters()] != [weight]:
        return None
    fused = nn.RMSNorm(weight.shape, eps, device="meta").train(norm.training)
    fused.weight = weight
    generator = torch.Generator().manual_seed(0)
    if weight.is_meta:
        norm = copy.deepcopy(norm).to_empty(device="cpu")
        weight = norm.weight.uniform_(0.5, 2, generator=generator)
    # Rows of all sizes: those about the root of epsilon tell where it is added.
    sizes = torch.tensor([1e-3, 1e-2, 1.0, 100.0])
    x = sizes[:, None] * torch.randn(4, weight.numel(), generator=generator)
    x = x.to(weight.device, weight.dtype)
    expected, found = norm(x).float(), F.rms_norm(x, weight.shape, weight, eps).float()
    tolerance = 2 * torch.finfo(weight.dtype).eps * expected.abs() + 1e-6
    return fused if bool(((found - expected).abs() <= tolerance).all()) else None


class _FrozenProduct(torch.autograd.Function):
    """x W^T + b by oneDNN, which torch itself takes for bf16 only; without gradients of W and b."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(weight)
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (weight,) = ctx.saved_tensors
        grad_x = torch.ops.mkldnn._linear_pointwise(grad, weight.t(), None, "none", [], "")
        return grad_x, None, None


class FrozenLinear(nn.Linear):
    """A linear layer on a CPU whose weights get no gradient."""

    def forward(self, x):
        if self.weight.dtype != torch.float32:  # the model was cast after it was loaded
            return super().forward(x)
        return _FrozenProduct.apply(x, self.weight, self.bias)


def take_onednn(model: nn.Module) -> int:
    """Has oneDNN multiply in the fp32 linear layers of `model`, which is to stay frozen.

    Only on a CPU with AVX-512, where a step of training is a tenth faster than with MKL (measured
    on an AMD EPYC, Zen 4). Not in a large output embedding. Returns the number of layers.
    """
    has_avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
    if not (has_avx512 and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return 0
    found = [
        module
        for module in model.modules()
        if type(module) is nn.Linear
        and module.weight.dtype == torch.float32
        and module.weight.numel() <= ONEDNN_WEIGHT
    ]
    for module in found:
        module.__class__ = FrozenLinear
    return len(found)
