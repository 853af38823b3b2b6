"""Norms that are replaced by torch's own, and those that are left alone."""

import pytest
import torch
from helpers import make_model, make_samples, passes
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from models.forward import response_logits
from models.fused import fuse_norms


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
