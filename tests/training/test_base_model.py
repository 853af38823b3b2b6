"""Loading a model, without a hub."""

import copy
import json
import logging
import os
import shutil
from importlib.util import find_spec

import pytest
import torch
from helpers import make_model
from huggingface_hub.errors import GatedRepoError
from safetensors.torch import load, save_file
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from configs.command_line import UserError
from training import base_model
from training.base_model import (
    check_model,
    load_model,
    load_model_and_tokenizer,
    load_tokenizer,
    skeleton,
)
from training.identity import describe_base, hub_id_of_gguf

CPU = torch.device("cpu")


def test_bitsandbytes_says_a_thing_once(make_config, caplog, monkeypatch):
    logger = logging.getLogger("bitsandbytes.autograd._functions")
    monkeypatch.setattr(logger, "filters", [])
    monkeypatch.setattr(base_model, "_quantization", lambda *_: None)
    load_model(make_config(quantization="8bit"), CPU)
    for _ in range(3):
        logger.warning("inputs will be cast from %s to float16", "bfloat16")
    assert len(caplog.records) == 1


def test_a_folder_loads_in_the_dtype_asked_for(make_config, model_folder):
    model, tokenizer = load_model_and_tokenizer(make_config(), CPU)
    assert model.dtype == torch.float32 and not model.training
    assert tokenizer.pad_token_id == 2 and tokenizer.padding_side == "right"
    model, _ = load_model_and_tokenizer(make_config(dtype="bfloat16"), CPU)
    assert model.dtype == torch.bfloat16
    facts = describe_base(make_config())
    for files in ("weights", "config.json", "tokenizer"):
        assert len(facts.pop(files)) == 64
    assert facts == {
        "base_model": str(model_folder),
        "quantization": "none",
    }


def test_a_tokenizer_without_pad_gets_one_and_without_eos_is_refused(
    make_config, tokenizer, model_folder, tmp_path
):
    for file in model_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del settings["pad_token"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    cfg = make_config(model_name=str(tmp_path))
    assert load_model_and_tokenizer(cfg, CPU)[1].pad_token == "</s>"
    del settings["eos_token"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="no eos token"):
        load_model_and_tokenizer(cfg, CPU)


def test_a_pad_token_beyond_the_embeddings_is_not_used(make_config, tokenizer, tmp_path):
    save = copy.deepcopy(tokenizer)
    save.add_special_tokens({"pad_token": "<another>"})
    make_model().save_pretrained(tmp_path)
    save.save_pretrained(tmp_path)
    cfg = make_config(model_name=str(tmp_path))
    config = check_model(cfg)
    assert save.pad_token_id >= config.vocab_size
    assert load_tokenizer(cfg, config).pad_token == "</s>"
    save.eos_token = "<another>"
    save.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="eos token 320 beyond 320 embeddings"):
        load_tokenizer(cfg, config)


@pytest.mark.parametrize(
    "error",
    [
        ImportError("AutoTokenizer needs `mistral-common`: pip install it\nlong text"),
        ValueError("Kwargs ['split_special_tokens'] are not supported by `MistralCommonBackend`."),
    ],
)
def test_mistrals_own_tokenizer_is_one_line(make_config, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(base_model.AutoTokenizer, "from_pretrained", fail)
    with pytest.raises(UserError, match="tekken.*give a version.*tokenizer.json") as caught:
        load_tokenizer(make_config(), make_model().config)
    assert "\n" not in str(caught.value)


HUB = "https://huggingface.co/"


@pytest.mark.parametrize(
    ("file", "header", "wanted"),
    [
        (
            "SmolLM2-135M-Instruct.Q4_1.gguf",
            {"general.organization": "Owner", "general.finetune": "8k"},
            "Owner/SmolLM2-135M-Instruct",
        ),
        (
            "llama-3.1-8b-q4_k_m.gguf",
            {"general.base_model.0.repo_url": f"{HUB}meta-llama/Llama-3.1-8B"},
            "meta-llama/Llama-3.1-8B",
        ),
        (
            "Meta-Llama-3.1-8B-Instruct-Q4_K_M.gguf",
            {
                "general.organization": "Meta Llama",
                "general.finetune": "Instruct",
                "general.base_model.0.repo_url": f"{HUB}meta-llama/Meta-Llama-3.1-8B",
            },
            "meta-llama/Meta-Llama-3.1-8B-Instruct",
        ),
        (
            "Tuned-1.5B.IQ3_XS.gguf",
            {
                "general.organization": "Someone",
                "general.finetune": "Tuned",
                "general.base_model.0.repo_url": f"{HUB}Big/Base-1.5B",
            },
            "Someone/Tuned-1.5B",
        ),
        ("m-f16.gguf", {"general.organization": "Two Words"}, None),
    ],
)
def test_the_hub_id_of_a_gguf(file, header, wanted):
    assert hub_id_of_gguf(file, header) == wanted


def test_what_is_missing_is_named_with_its_cure(make_config, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="there is no such file"):
        check_model(make_config(model_name=str(tmp_path / "m.gguf")))
    with pytest.raises(UserError, match="hub cannot be reached.*HF_ENDPOINT.*--config smollm2"):
        check_model(make_config(model_name="owner/name"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty") as caught:
        check_model(make_config(model_name=str(tmp_path / "empty")))
    assert "\n" not in str(caught.value)

    hidden = {"bitsandbytes", "gguf"}
    monkeypatch.setattr(
        base_model.importlib.util,
        "find_spec",
        lambda name: None if name in hidden else find_spec(name),
    )
    with pytest.raises(UserError, match="pip install bitsandbytes"):
        check_model(make_config(quantization="4bit"))
    (tmp_path / "m.gguf").write_bytes(b"")
    with pytest.raises(UserError, match="pip install gguf"):
        check_model(make_config(model_name=str(tmp_path / "m.gguf")))


def test_a_model_too_small_for_the_settings_is_refused_before_it_is_loaded(make_config):
    with pytest.raises(UserError) as caught:
        check_model(make_config(num_frozen_layers=4, max_seq_len=257))
    layers, positions = str(caught.value).splitlines()
    assert "--num_frozen_layers 4: give 0 to 3" in layers
    assert "--max_seq_len 257: give at most 256" in positions


def test_a_folder_that_lacks_a_part_or_is_no_causal_model_is_one_line(
    make_config, model_folder, tmp_path
):
    def without(*names, name="model"):
        folder = tmp_path / name
        shutil.copytree(model_folder, folder)
        for file in names:
            (folder / file).unlink()
        return make_config(model_name=str(folder))

    for number, (names, named) in enumerate(
        [
            (["model.safetensors"], "model.safetensors"),
            (["tokenizer.json", "tokenizer_config.json"], "tokenizer"),
        ]
    ):
        with pytest.raises(UserError, match=named) as caught:
            load_model_and_tokenizer(without(*names, name=str(number)), CPU)
        assert "\n" not in str(caught.value)

    cfg = without(name="classifier")
    config = json.loads((tmp_path / "classifier" / "config.json").read_text())
    config["architectures"] = ["LlamaForSequenceClassification"]
    (tmp_path / "classifier" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="is no causal language model"):
        check_model(cfg)


def test_four_bits_on_a_cpu_are_refused(make_config):
    with pytest.raises(UserError, match="4bit needs a GPU"):
        load_model(make_config(quantization="4bit"), CPU)


def test_a_gguf_is_not_quantised_again(make_config):
    with pytest.raises(UserError, match="8bit: a .gguf file is held in full"):
        check_model(make_config(quantization="8bit", model_name="m.gguf"))


def test_weights_cut_short_and_a_gpu_too_small_are_one_line(
    make_config, model_folder, tmp_path, monkeypatch
):
    shutil.copytree(model_folder, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    cfg = make_config(model_name=str(tmp_path / "model"))
    with pytest.raises(UserError, match="its weights cannot be read.*get them anew"):
        load_model(cfg, CPU)

    def too_small(**_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(base_model.AutoModelForCausalLM, "from_pretrained", too_small)
    with pytest.raises(UserError, match="does not fit cpu: give --quantization 4bit"):
        load_model(cfg, CPU)


def test_missing_weights_are_never_made_up(make_config, model_folder, tmp_path):
    shutil.copytree(model_folder, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    weights = load(file.read_bytes())
    weights.pop("model.norm.weight")
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match="1 weights, such as model.norm.weight, are missing"):
        load_model(make_config(model_name=str(tmp_path / "model")), CPU)


def test_a_gated_model_is_told_from_an_unreachable_one(make_config, monkeypatch):
    class Response:
        headers, request, status_code = {}, None, 403

    def gated(*_, **__):
        try:
            raise GatedRepoError("403", response=Response())
        except GatedRepoError as error:
            raise OSError("You are trying to access a gated repo.\nlong text") from error

    monkeypatch.setattr(base_model, "_ask_hub", lambda _: None)
    monkeypatch.setattr(base_model.AutoConfig, "from_pretrained", gated)
    with pytest.raises(
        UserError, match=r"request access at https://huggingface.co/owner/name"
    ) as caught:
        check_model(make_config(model_name="owner/name"))
    assert "hf auth login" in str(caught.value) and "\n" not in str(caught.value)


def settings(name, **changes):
    def change(folder):
        found = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**found, **changes}))

    return change


def text(name, content):
    return lambda folder: (folder / name).write_text(content)


def instead_of_weights(make):
    def change(folder):
        (folder / "model.safetensors").unlink()
        make(folder)

    return change


def weights(new):
    def change(folder):
        path = folder / "model.safetensors"
        found = load(path.read_bytes())
        save_file({key: new(key, value) for key, value in found.items()}, path)

    return change


def add_tokens(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["word0", "word1"])
    tokenizer.save_pretrained(folder)


def two_words(folder):
    of_words = Tokenizer(models.WordLevel({"</s>": 0, "hello": 1}, unk_token=None))
    PreTrainedTokenizerFast(tokenizer_object=of_words, eos_token="</s>").save_pretrained(folder)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


WEIGHTS = "model.safetensors"
TEMPLATE = {"name": "../../x", "template": "b"}
DAMAGED = {
    "config null": (text("config.json", "null"), "no JSON object"),
    "config deep": (text("config.json", '{"a":' * 100_000), "nested too deeply"),
    "heads 0": (settings("config.json", num_attention_heads=0), "ZeroDivisionError"),
    "size text": (settings("config.json", hidden_size="abc"), "hidden_size"),
    "layers text": (settings("config.json", num_hidden_layers="four"), "num_hidden_layers"),
    "another size": (settings("config.json", hidden_size=64), "not the shapes"),
    "fewer tokens": (settings("config.json", vocab_size=300), "does not know"),
    "activation": (settings("config.json", hidden_act="nonsense"), "nonsense"),
    "dtype": (settings("config.json", dtype="float7"), "float7"),
    "architectures": (settings("config.json", architectures=[1]), "no causal"),
    "gptq": (settings("config.json", quantization_config={"quant_method": "gptq"}), "quantised"),
    "quantisation list": (settings("config.json", quantization_config=[]), "cannot be used"),
    "kernels": (settings("config.json", _attn_implementation="owner/kernel"), "owner/kernel"),
    "dangling": (
        instead_of_weights(lambda folder: (folder / WEIGHTS).symlink_to("/nowhere/blob")),
        "a link to /nowhere/blob, which is not there",
    ),
    "folder": (instead_of_weights(lambda folder: (folder / WEIGHTS).mkdir()), "is no file"),
    "pipe": (instead_of_weights(lambda folder: os.mkfifo(folder / WEIGHTS)), "is no file"),
    "other pipe": (lambda folder: os.mkfifo(folder / "training_args.bin"), "is no file"),
    "pickle": (
        instead_of_weights(
            lambda folder: torch.save({"x": Evil()}, folder / "pytorch_model.bin"),
        ),
        "hold more than numbers",
    ),
    "index null": (
        instead_of_weights(text("model.safetensors.index.json", "null")),
        "no JSON object",
    ),
    "int8": (weights(lambda _, t: t.to(torch.int8)), "no floating-point number"),
    "transposed": (
        weights(lambda key, t: t.T.contiguous() if "down_proj" in key else t),
        "not the shapes",
    ),
    "generation list": (text("generation_config.json", "[]"), "no JSON object"),
    "tokenizer {}": (text("tokenizer.json", "{}"), "cannot be used"),
    "tokenizer null": (text("tokenizer.json", "null"), "no JSON object"),
    "tokenizer_config list": (text("tokenizer_config.json", "[]"), "no JSON object"),
    "special tokens": (text("special_tokens_map.json", '{"eos_token": ["a"]}'), "eos_token"),
    "more tokens": (add_tokens, "2 tokens, such as 'word0', that the model does not know"),
    "new eos": (settings("tokenizer_config.json", eos_token="<new>"), "'<new>'"),
    "two words": (two_words, "ordinary text"),
    "template": (settings("tokenizer_config.json", chat_template=[TEMPLATE]), "can be no file"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGED.values(), ids=DAMAGED)
def test_a_model_folder_that_cannot_be_used_is_one_line(
    make_config, model_folder, tmp_path, damage, message, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model_folder, tmp_path / "model")
    damage(tmp_path / "model")
    cfg = make_config(model_name=str(tmp_path / "model"))
    with pytest.raises(UserError, match=message) as caught:
        config = check_model(cfg)
        load_tokenizer(cfg, config)
        skeleton(cfg, config)
        load_model(cfg, CPU)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize("name", ["x" * 5000, "x" * 5000 + ".gguf", "a/b/c", "\0"])
def test_a_name_that_no_model_can_have_is_one_line(make_config, name):
    with pytest.raises(UserError) as caught:
        check_model(make_config(model_name=name))
    assert "\n" not in str(caught.value)


def test_a_padding_that_was_added_later_does_no_harm(make_config, model_folder, tmp_path):
    """As many fine-tuned LLaMAs have it, beyond the embeddings: another token pads then."""
    shutil.copytree(model_folder, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(tmp_path / "model")
    assert tokenizer.pad_token_id == 320
    cfg = make_config(model_name=str(tmp_path / "model"))
    assert load_model_and_tokenizer(cfg, CPU)[1].pad_token_id == 1


def test_our_own_faults_are_no_faults_of_the_model(make_config, monkeypatch):
    monkeypatch.setattr(base_model, "check_folder", lambda: None)
    with pytest.raises(TypeError):
        check_model(make_config())
