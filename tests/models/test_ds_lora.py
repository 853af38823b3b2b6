"""The branches: what they compute, where they go, how they are saved."""

import json

import pytest
import torch
import torch.nn.functional as F
from helpers import inject, make_model, make_samples, mean_loss, parameters, randomise
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from safetensors.torch import load, load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    MixtralConfig,
    Qwen2Config,
)
from transformers import Gemma2Config as Gemma2

from models.adapter import load_adapter, save_adapter
from models.ds_lora import (
    ALL_LINEAR,
    BRANCHES,
    DSLoRALinear,
    InputDropout,
    branch_off,
    branch_parameters,
    branches_restored,
    ds_lora_layers,
    find_decoder_layers,
    get_ds_lora_param_groups,
    get_lora_param_groups,
    replace_with_ds_lora,
    reset_branch,
)

IDS = torch.arange(3, 43).view(2, 20)


def test_a_new_branch_changes_no_bit():
    model = make_model()
    with torch.no_grad():
        before = model(IDS).logits
        after = inject(model, dropout=0.5).train()(IDS).logits
    assert torch.equal(before, after)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_forward_against_the_equation(dtype):
    torch.manual_seed(0)
    layer = DSLoRALinear(nn.Linear(6, 5).to(dtype), r=2, alpha=6)
    x = torch.randn(3, 6, dtype=dtype)
    with torch.no_grad():
        for parameter in (layer.lora_B_slow, layer.lora_B_fast):
            parameter.normal_()
    A_s, B_s = layer.lora_A_slow.double(), layer.lora_B_slow.double()
    A_f, B_f = layer.lora_A_fast.double(), layer.lora_B_fast.double()
    weight = layer.weight.double() + 3 * (B_s @ A_s + B_f @ A_f)
    y = layer(x)
    assert y.dtype == dtype
    assert all(p.dtype == torch.float32 for p in (layer.lora_A_slow, layer.lora_B_fast))
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(
        y.double(),
        F.linear(x.double(), weight, layer.bias.double()),
        atol=tolerance,
        rtol=tolerance,
    )
    y.float().sum().backward()
    assert layer.lora_A_slow.grad.dtype == torch.float32


def test_the_base_layer_is_the_same_object():
    base = nn.Linear(4, 4)
    layer = DSLoRALinear(base, r=2, alpha=4)
    assert layer.base_layer is base and layer.weight is base.weight and layer.bias is base.bias
    assert layer.scaling == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_keeps_the_mean_and_off_it_changes_nothing(dtype):
    dropout = InputDropout(0.25)
    x = torch.full((400, 500), 3.0, dtype=dtype, requires_grad=True)
    torch.manual_seed(0)
    y = dropout(x)
    assert y.dtype == dtype and set(y.unique().tolist()) == {0.0, 4.0}
    assert (y == 0).float().mean().item() == pytest.approx(0.25, abs=0.005)
    y.sum().backward()
    assert torch.equal(x.grad * 3, y)
    assert torch.equal(dropout.eval()(x), x) and torch.equal(InputDropout(0.0)(x), x)


def test_dropout_acts_on_the_branches_only():
    layer = DSLoRALinear(nn.Linear(4, 4), r=2, alpha=4, dropout=0.9).train()
    x = torch.randn(5, 4)
    torch.testing.assert_close(layer(x), layer.base_layer(x))
    nn.init.normal_(layer.lora_B_slow)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_only_targets_of_upper_layers_are_replaced_and_only_branches_train():
    model = inject(make_model(), frozen=3)
    assert sorted(ds_lora_layers(model)) == [
        "model.layers.3.self_attn.q_proj",
        "model.layers.3.self_attn.v_proj",
    ]
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable == {n for n, _ in model.named_parameters() if "lora_" in n}


def test_no_gradient_reaches_the_frozen_layers():
    model = inject(make_model())
    seen = {}
    for i, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda m, a, out, i=i: seen.update({i: out.requires_grad}))
    model(IDS)
    assert seen == {0: False, 1: False, 2: True, 3: True}


FAMILIES = {
    "qwen2": Qwen2Config,
    "gemma2": Gemma2,
    "mixtral": MixtralConfig,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_decoder_layers_are_found_in_other_families(family):
    config = FAMILIES[family](
        vocab_size=64,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    model = AutoModelForCausalLM.from_config(config)
    name, layers = find_decoder_layers(model)
    assert (name, len(layers)) == ("model.layers", 3)
    inject(model, frozen=1)
    assert len(ds_lora_layers(model)) == 4


def test_what_cannot_be_is_said():
    with pytest.raises(ValueError, match="model.layers has 4 layers: give 0 to 3"):
        inject(make_model(), frozen=4)
    with pytest.raises(ValueError, match="no linear layer.*self_attn.k_proj"):
        replace_with_ds_lora(make_model(), ("nothing",), num_frozen_layers=0)
    with pytest.raises(ValueError, match="already"):
        inject(inject(make_model()))
    gpt2 = AutoModelForCausalLM.from_config(
        GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2)
    )
    with pytest.raises(ValueError, match="there are none"):
        replace_with_ds_lora(gpt2, num_frozen_layers=0)


def test_an_impossible_request_leaves_the_model_trainable():
    model = make_model()
    with pytest.raises(ValueError):
        inject(model, frozen=99)
    assert all(p.requires_grad for p in model.parameters())


def test_param_groups_are_disjoint_and_complete():
    model = inject(make_model())
    groups, slow, fast = get_ds_lora_param_groups(model, 1e-5, 5e-5, 0.01)
    assert [(g["lr"], g["weight_decay"]) for g in groups] == [(1e-5, 0.01), (5e-5, 0.01)]
    assert not {id(p) for p in slow} & {id(p) for p in fast}
    assert len(slow) == len(fast) == 8
    model.lm_head.requires_grad_(True)
    with pytest.raises(AssertionError, match="outside the branches"):
        get_ds_lora_param_groups(model, 1e-5, 5e-5, 0.01)


def test_a_branch_off_is_a_branch_of_zeros_and_comes_back():
    model, zeroed = randomise(inject(make_model())), randomise(inject(make_model()))
    for layer in ds_lora_layers(zeroed).values():
        nn.init.zeros_(layer.lora_B_fast)
    with torch.no_grad():
        both = model(IDS).logits
        with pytest.raises(KeyError), branch_off(model, "fast"):
            torch.testing.assert_close(model(IDS).logits, zeroed(IDS).logits)
            raise KeyError
        assert torch.equal(model(IDS).logits, both)
        with branch_off(model, "fast"), branch_off(model, "slow"):
            assert torch.equal(model(IDS).logits, make_model()(IDS).logits)


def test_a_fresh_branch_adds_nothing_and_spares_the_other():
    model = randomise(inject(make_model()))
    slow = [p.clone() for p in branch_parameters(model, "slow")]
    with torch.no_grad(), branch_off(model, "fast"):
        without = model(IDS).logits
    reset_branch(model, "fast", 0)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, without)
    assert all(map(torch.equal, slow, branch_parameters(model, "slow")))
    assert all(layer.lora_A_fast.abs().sum() > 0 for layer in ds_lora_layers(model).values())


def inner(model) -> set[str]:
    """Names of the linear layers in which PEFT puts its LoRA."""
    return {name for name, module in model.named_modules() if isinstance(module, LoraLinear)}


def test_all_linear_is_what_peft_has_of_the_upper_layers():
    places = [
        set(ds_lora_layers(replace_with_ds_lora(make_model(), (ALL_LINEAR,), num_frozen_layers=n)))
        for n in (0, 2)
    ]
    peft = get_peft_model(make_model(), LoraConfig(target_modules=ALL_LINEAR))
    theirs = {name.removeprefix("base_model.model.") for name in inner(peft)}
    assert places[0] == theirs and len(theirs) == 4 * 7
    assert places[1] == {name for name in theirs if name.split(".")[2] in "23"}


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize(("alpha", "slow_rank"), [(8, 4), (9, 7)])
def test_all_linear_and_rslora_are_exact_in_pefts_format(tmp_path, use_rslora, alpha, slow_rank):
    """A slow branch that has grown, and a scale that is no whole number, included."""
    model = replace_with_ds_lora(make_model(), (ALL_LINEAR,), 4, alpha, 0.0, 2, use_rslora)
    for layer in ds_lora_layers(model).values():
        base = layer.base_layer
        A, B = torch.zeros(slow_rank, base.in_features), torch.zeros(base.out_features, slow_rank)
        layer.set_branch("slow", A, B)
    randomise(model)
    save_adapter(model, tmp_path, base_model="b")
    peft = PeftModel.from_pretrained(make_model(), tmp_path).double()
    with torch.no_grad():
        ours, theirs = model.double()(IDS).logits, peft(IDS).logits
        base = make_model().double()(IDS).logits
    assert (ours - base).abs().max() > 0.1
    torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=0)
    scale = alpha / (2 if use_rslora else 4)
    for name in inner(peft):
        assert peft.get_submodule(name).scaling["default"] == pytest.approx(scale, rel=1e-12)


def test_peft_loads_a_checkpoint_and_gives_the_same_logits(tmp_path):
    model = randomise(inject(make_model()))
    save_adapter(model, tmp_path, base_model="owner/name", quantization="none")
    peft = PeftModel.from_pretrained(make_model(), tmp_path)
    with torch.no_grad():
        ours, theirs, base = model(IDS).logits, peft(IDS).logits, make_model()(IDS).logits
    assert (ours - base).abs().max() > 0.1
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    expected = set(load_file(tmp_path / "adapter_model.safetensors"))
    assert {n for n in peft.state_dict() if "lora_" in n} == {
        n.replace(".weight", ".default.weight") for n in expected
    }
    assert json.loads((tmp_path / "ds_lora.json").read_text())["base_model"] == "owner/name"


def test_save_and_load_is_the_identity(tmp_path):
    model, other = randomise(inject(make_model())), randomise(inject(make_model()), seed=2)
    save_adapter(model, tmp_path, base_model="b")
    first = (tmp_path / "adapter_model.safetensors").read_bytes()
    load_adapter(other, tmp_path)
    for branch in BRANCHES:
        pairs = zip(branch_parameters(model, branch), branch_parameters(other, branch), strict=True)
        assert all(torch.equal(*pair) for pair in pairs)
    save_adapter(other, tmp_path, base_model="b")
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == first


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 2}, "its r is 4, the model's 2"),
        ({"alpha": 3}, "its alpha is 8, the model's 3"),
        ({"use_rslora": True}, "its use_rslora is False, the model's True"),
        ({"frozen": 3}, "4 tensors unexpected"),
        ({"frozen": 1}, "4 tensors missing"),
        ({"hidden_size": 64}, "the model's"),
    ],
)
def test_another_shape_is_refused_and_nothing_changed(tmp_path, changes, message):
    save_adapter(randomise(inject(make_model())), tmp_path, base_model="b")
    width = {"hidden_size": changes.pop("hidden_size")} if "hidden_size" in changes else {}
    other = inject(make_model(**width), **changes)
    before = [p.clone() for p in branch_parameters(other, "slow")]
    with pytest.raises(ValueError, match=message):
        load_adapter(other, tmp_path)
    assert all(map(torch.equal, before, branch_parameters(other, "slow")))


def test_a_damaged_checkpoint_is_refused(tmp_path):
    model = inject(make_model())
    with pytest.raises(ValueError, match="not a whole DS-LoRA checkpoint"):
        load_adapter(model, tmp_path)
    save_adapter(model, tmp_path, base_model="b")
    file = tmp_path / "adapter_model.safetensors"
    whole = file.read_bytes()
    tensors = load(whole)
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="not a whole DS-LoRA checkpoint"):
        load_adapter(model, tmp_path)
    tensors.pop(min(tensors))
    save_file(tensors, file)
    with pytest.raises(ValueError, match="1 tensors missing"):
        load_adapter(model, tmp_path)
    (tmp_path / "ds_lora.json").write_text("[]")
    with pytest.raises(ValueError, match="not a whole DS-LoRA checkpoint"):
        load_adapter(model, tmp_path)


def step(model, groups, samples):
    optimizer = torch.optim.AdamW(groups)
    for _ in range(3):
        optimizer.zero_grad()
        mean_loss(model, samples).backward()
        optimizer.step()


def test_both_branches_at_one_rate_are_one_lora_of_twice_the_rank(tmp_path):
    """Three AdamW steps of ours and of PEFT's LoRA of rank 8 give the same product B A."""
    ours, samples = randomise(inject(make_model(), r=4, alpha=8)), make_samples([9, 14])
    options = {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [2, 3]}
    peft = get_peft_model(make_model(), LoraConfig(r=8, lora_alpha=16, **options))
    for name, layer in ds_lora_layers(ours).items():
        theirs = peft.get_submodule(f"base_model.model.{name}")
        (A_slow, B_slow), (A_fast, B_fast) = layer.branch("slow"), layer.branch("fast")
        theirs.lora_A.default.weight.data = torch.cat([A_slow, A_fast]).detach().clone()
        theirs.lora_B.default.weight.data = torch.cat([B_slow, B_fast], 1).detach().clone()
    step(ours, get_lora_param_groups(ours, 1e-2, 0.01), samples)
    trained = [p for p in peft.parameters() if p.requires_grad]
    step(peft, [{"params": trained, "lr": 1e-2, "weight_decay": 0.01}], samples)
    for name, layer in ds_lora_layers(ours).items():
        theirs = peft.get_submodule(f"base_model.model.{name}")
        B = torch.cat([layer.branch("slow")[1], layer.branch("fast")[1]], 1)
        torch.testing.assert_close(B, theirs.lora_B.default.weight, atol=1e-5, rtol=1e-4)


def test_one_branch_is_loaded_and_the_other_stays_and_all_comes_back(tmp_path):
    model = randomise(inject(make_model()), seed=1)
    save_adapter(model, tmp_path, "base")
    saved = [p.clone() for p in parameters(model)]
    randomise(model, seed=2)
    before = [p.clone() for p in parameters(model)]
    half = len(saved) // 2
    with branches_restored(model):
        load_adapter(model, tmp_path, ("fast",))
        now = parameters(model)
        assert all(torch.equal(a, b) for a, b in zip(now[:half], before[:half], strict=True))
        assert all(torch.equal(a, b) for a, b in zip(now[half:], saved[half:], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(parameters(model), before, strict=True))


def test_branches_are_drawn_bottom_up_whatever_the_order_of_the_targets():
    """A seed means the same weights however the targets are listed."""
    drawn = []
    for targets in (("q_proj", "v_proj"), ("v_proj", "q_proj")):
        model = make_model()
        torch.manual_seed(0)
        replace_with_ds_lora(model, targets, 4, 8, 0.0, 2)
        drawn.append([layer.lora_A_slow for layer in ds_lora_layers(model).values()])
    assert all(map(torch.equal, *drawn))
