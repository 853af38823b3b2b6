"""Tiny models of other families, made by their configurations: trained, saved, loaded by PEFT."""

import json

import pytest
import torch
import transformers
from helpers import errors, inject, make_rows, mean_loss, randomise, write_rows
from peft import PeftModel

import train_slsd_seq
from configs.command_line import UserError
from evaluation import report
from evaluation.likelihood import option_losses
from evaluation.readings import open_stage
from models.adapter import save_adapter
from models.ds_lora import ds_lora_layers, training_mode
from models.forward import IGNORE
from models.fused import take_onednn
from training.base_model import check_model

TASK = "T1_general"
IDS = torch.arange(3, 27).view(2, 12)
SIZES = {
    "vocab_size": 320,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
OLD = {"n_embd": 16, "n_layer": 4, "n_head": 2, "n_positions": 256}
# Sizes, flags of the run, and what is told on the way.
MOE = {"num_local_experts": 2, "num_experts_per_tok": 1}
FAMILIES = {
    "Llama": ({}, {}, ()),
    "Mistral": ({"sliding_window": 5}, {}, ()),
    "Qwen2": ({}, {}, ()),
    "Qwen3": ({}, {}, ()),
    "Gemma2": ({"sliding_window": 5}, {}, ()),
    "Gemma3Text": ({"sliding_window": 5}, {}, ()),
    "Phi3": ({}, {"lora_target_modules": ["qkv_proj"]}, ("branches beside 2 qkv_proj",)),
    "GPTJ": (OLD | {"rotary_dim": 4, "resid_pdrop": 0.5, "embd_pdrop": 0.5}, {}, ()),
    "GPTNeo": (
        {"num_layers": 4, "num_heads": 2, "attention_types": [[["global", "local"], 2]]},
        {},
        (),
    ),
    "OPT": (
        {"ffn_dim": 16, "word_embed_proj_dim": 16, "dropout": 0.5, "layerdrop": 0.5},
        {},
        (),
    ),
    "Mixtral": (MOE, {}, ()),
    "Phimoe": (MOE | {"input_jitter_noise": 0.3, "router_jitter_noise": 0.3}, {}, ()),
    "Qwen3Next": (
        {"num_hidden_layers": 4, "moe_intermediate_size": 16, "num_experts": 2}
        | {"num_experts_per_tok": 1, "shared_expert_intermediate_size": 16}
        | {"linear_num_value_heads": 2, "linear_num_key_heads": 2}
        | {"linear_key_head_dim": 8, "linear_value_head_dim": 8},
        {},
        ("branches beside 1 q_proj, 1 v_proj",),
    ),
    "Bamba": (
        {"attn_layer_indices": [3], "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1}
        | {"mamba_d_state": 8},
        {},
        ("branches beside 1 q_proj",),
    ),
    "Mamba": ({"state_size": 4}, {"lora_target_modules": ["x_proj"]}, ()),
    # Four streams of hidden states, keys and values shared between layers, a linear layer for a
    # decoder, a state: each tripped the prefix once.
    "Gemma3nText": (
        {
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 320,
            "laurel_rank": 4,
            "num_kv_shared_layers": 0,
            "intermediate_size": [16] * 4,
            "layer_types": ["full_attention"] * 4,
            "activation_sparsity_pattern": [0.0] * 4,
        },
        {},
        ("goes on without --prefix_cache_gib: ValueError", "is not read as routed: ValueError"),
    ),
    "Gemma4Text": (
        {
            "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 320,
            "global_head_dim": 8,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
        {"lora_target_modules": ["q_proj"]},
        ("goes on without --prefix_cache_gib: KeyError",),
    ),
    "ModernBertDecoder": ({}, {"lora_target_modules": ["q_proj"]}, ()),
    "Rwkv": (
        {"attention_hidden_size": 16, "context_length": 256},
        {"lora_target_modules": ["key"]},
        ("branches beside 4 key",),
    ),
}

# What these keep of a text is a state, which has no branches.
STATES = ("Mamba", "Rwkv", "Qwen3Next", "Bamba")
PROMPTS, OPTIONS = [[5, 6, 7, 8], [9, 10]], [[11, 12, 1], [13, 1]]


def option_sample(prompt: list[int], option: list[int]) -> dict:
    labels = torch.tensor([IGNORE] * len(prompt) + option)
    return {"input_ids": torch.tensor(prompt + option), "labels": labels}


@pytest.fixture(scope="module")
def rows_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    write_rows(folder / f"{TASK}.jsonl", make_rows(TASK, 16))
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_trains_and_stock_peft_gives_the_same_logits(
    family, flags, make_config, rows_folder, tokenizer, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(report, "ANSWER_TOKENS", 3)
    sizes, changes, told = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **sizes})
    folder = tmp_path / "model"
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    settings = {"model_name": str(folder), "data_dir": str(rows_folder), "task_order": [TASK]}
    settings |= {"max_steps_per_task": 2, "num_epochs": 2, "eval_samples_per_task": 2} | changes
    assert train_slsd_seq.main(flags(**settings)) == 0
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    for text in told:
        assert text in printed.out
    faults = sum("goes on without" in text or "not read as" in text for text in told)
    assert printed.out.count("goes on without") + printed.out.count("not read as") == faults
    checkpoint = tmp_path / "checkpoints" / f"seq_{TASK}"
    stage = open_stage(make_config(**settings | {"num_frozen_layers": 0}), str(checkpoint))
    assert stage.cfg.num_frozen_layers == 2
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    take_onednn(plain)  # as ours has, so that every bit is the same
    with torch.no_grad():
        ours, base = (m(IDS, use_cache=False).logits for m in (stage.passes.model, plain))
        theirs = PeftModel.from_pretrained(plain, checkpoint).eval()(IDS, use_cache=False).logits
    assert (ours - base).abs().max() > 0
    assert (ours - theirs).abs().max() == 0
    with torch.no_grad():
        expected = [
            [mean_loss(stage.passes.model, [option_sample(p, o)]) for o in OPTIONS] for p in PROMPTS
        ]
    found = option_losses(stage.passes, PROMPTS, OPTIONS)
    assert torch.allclose(found, torch.tensor(expected), rtol=1e-4)
    # As far as a window lets them see.
    assert stage.passes.branches_to(5) == (family not in STATES)
    if stage.passes.has_frozen_output:
        # Dropout and jitter of the frozen layers are off in training too.
        found = []
        for set_mode in (lambda: training_mode(stage.passes.model, 2), stage.passes.model.eval):
            set_mode()
            torch.manual_seed(0)
            found.append(stage.passes.prefix.run_bottom(IDS))
        assert torch.equal(*found)


def save_config(name: str, folder, **sizes) -> str:
    getattr(transformers, f"{name}Config")(**{**SIZES, **sizes}).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("family", ["T5", "Mistral3"])
def test_what_is_no_decoder_is_one_line(family, make_config, tmp_path):
    getattr(transformers, f"{family}Config")().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"{family}.* is no causal language model") as caught:
        check_model(make_config(model_name=str(tmp_path)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("family", "sizes", "changes", "message"),
    [
        ("GPT2", OLD, {}, "no linear layer of transformer.h is called q_proj, v_proj"),
        (
            "JetMoe",
            MOE | {"kv_channels": 8},
            {"lora_target_modules": ["kv_proj"], "gradient_checkpointing": True},
            "--gradient_checkpointing true: JetMoeForCausalLM does not support",
        ),
    ],
)
def test_what_does_not_fit_a_family_is_one_line(
    family, sizes, changes, message, flags, rows_folder, tokenizer, tmp_path, capsys
):
    """Before weights are looked for: the folder has none."""
    folder = save_config(family, tmp_path / "model", **sizes)
    tokenizer.save_pretrained(folder)
    settings = {"model_name": folder, "data_dir": str(rows_folder), "task_order": [TASK]}
    assert train_slsd_seq.main(flags(**settings | changes)) == 2
    (line,) = errors(capsys)
    assert message in line


def test_layers_of_another_tower_are_left_alone_by_peft(tmp_path):
    """A vision tower has q_proj and v_proj in numbered layers too: whole names tell them apart."""
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 4}
    tower |= {"num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    text = SIZES | {"sliding_window": 5, "vocab_size": 330, "hidden_size": 32}
    config = transformers.Gemma3Config(text_config=text, vision_config=tower, mm_tokens_per_image=4)

    def make():
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(config).eval()

    model = randomise(inject(make()))
    save_adapter(model, tmp_path, base_model="tiny")
    targets = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    assert targets == sorted(ds_lora_layers(model)) and not any("vision" in t for t in targets)
    peft = PeftModel.from_pretrained(make(), tmp_path)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, peft(IDS).logits)
    assert not [name for name, _ in peft.named_modules() if "vision" in name and "lora" in name]
