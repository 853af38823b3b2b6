"""Norms and linear layers that take faster kernels, and those that are left alone."""

import copy

import pytest
import torch
from helpers import make_model, make_samples, passes
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from models.forward import response_logits
from models.fused import FrozenLinear, fuse_norms, take_onednn


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_norms_give_the_models_own_results(dtype):
    model = make_model().to(dtype)
    with torch.no_grad():
        for module in model.modules():
            if type(module).__name__ == "LlamaRMSNorm":
                module.weight.normal_()
    ((_, batch, _),) = passes(make_samples([9, 14, 5]), 1000)
    before = response_logits(model, **batch)
    names = set(model.state_dict())
    assert fuse_norms(model) == 9 and set(model.state_dict()) == names
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype]
    after = response_logits(model, **batch)
    assert (after - before).abs().max() <= tolerance * before.abs().max()


def test_norms_without_weights_yet_are_told_apart_alike():
    with torch.device("meta"):
        norms = nn.ModuleList([LlamaRMSNorm(32), GemmaRMSNorm(32)])
    assert fuse_norms(norms) == 1
    assert isinstance(norms[0], nn.RMSNorm) and norms[0].weight.is_meta


def test_another_norm_stays():
    """Gemma scales by 1 + weight; the other adds epsilon to the root."""

    class OtherRMSNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(32)), 1e-3

        def forward(self, x):
            return self.weight * x / (x.square().mean(-1, keepdim=True).sqrt() + self.eps)

    assert fuse_norms(nn.ModuleList([GemmaRMSNorm(32), OtherRMSNorm()])) == 0


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512", reason="it is taken with AVX-512 only"
)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (3, 17)])
def test_onednn_gives_the_products_and_the_gradients_of_a_linear_layer(bias, shape):
    generator = torch.Generator().manual_seed(0)
    plain = nn.Linear(48, 80, bias=bias).requires_grad_(False)
    taken = copy.deepcopy(plain)
    assert take_onednn(taken) == 1 and isinstance(taken, FrozenLinear)
    x, of_output = (torch.randn(*shape, size, generator=generator) for size in (48, 80))
    found = {}
    for layer in (plain, taken):
        given = x.clone().requires_grad_()
        output = layer(given)
        output.backward(of_output)
        assert layer.weight.grad is None
        found[layer] = (output.detach(), given.grad)
    for expected, of_taken in zip(found[plain], found[taken], strict=True):
        assert torch.allclose(of_taken, expected, rtol=1e-5, atol=1e-5)
    assert taken.state_dict().keys() == plain.state_dict().keys()
    assert torch.equal(taken.double()(x.double()), plain.double()(x.double()))


def test_onednn_is_not_taken_for_another_dtype_or_a_large_weight(monkeypatch):
    monkeypatch.setattr("models.fused.ONEDNN_WEIGHT", 48 * 80)
    layers = [nn.Linear(48, 80).bfloat16(), nn.Linear(48, 81), nn.Bilinear(4, 4, 4)]
    assert take_onednn(nn.ModuleList(layers)) == 0
