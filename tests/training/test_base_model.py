"""Choosing a device and loading a model, with a pretended nvidia-smi and no hub."""

import json
import logging
import os
import shutil
import stat
from importlib.util import find_spec

import pytest
import torch
from helpers import make_model
from huggingface_hub.errors import GatedRepoError
from safetensors.torch import load, save_file
from transformers import masking_utils

from configs.command_line import UserError
from training import base_model
from training.base_model import (
    check_model,
    describe_base,
    load_model,
    load_model_and_tokenizer,
    spare_the_gpu,
)
from training.device import is_out_of_memory, select_device

CPU = torch.device("cpu")


@pytest.fixture
def smi(tmp_path, monkeypatch):
    """Puts an nvidia-smi that prints `answer` first in PATH."""

    def install(answer: str, code: int = 0):
        script = tmp_path / "nvidia-smi"
        script.write_text(f"#!/bin/sh\ncat <<'END'\n{answer}\nEND\nexit {code}\n")
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return install


THREE = "\n".join(
    f"GPU-{uuid}, {number}, {free}, Disabled, NVIDIA H100"
    for number, (uuid, free) in enumerate([("aaa", 1000), ("bbb", 9000), ("ccc", 5000)])
)


@pytest.mark.parametrize(
    ("visible", "chosen"),
    [
        (None, "GPU-bbb"),
        ("0,2", "GPU-ccc"),
        ("GPU-aaa", "GPU-aaa"),
        (" 0 , GPU-b", "GPU-bbb"),
    ],
)
def test_the_gpu_with_most_free_memory_becomes_the_only_visible_one(
    smi, monkeypatch, visible, chosen
):
    smi(THREE)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert select_device() == torch.device("cuda:0")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == chosen


def test_hidden_gpus_stay_hidden(smi, monkeypatch):
    smi(THREE)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert select_device() == CPU
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


def test_no_gpu_or_a_failing_driver_means_cpu(smi, monkeypatch):
    smi("NVIDIA-SMI has failed", code=9)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert select_device() == CPU
    monkeypatch.setenv("PATH", "")
    assert select_device() == select_device("cpu") == CPU


MIXED = THREE.replace("2, 5000, Disabled, NVIDIA H100", "2, 5000, Disabled, NVIDIA L4")


@pytest.mark.parametrize(
    ("answer", "visible", "chosen"),
    [
        # Lines of other fields, and a GPU that is lost.
        ("Unable to determine\n\nGPU-x, 0\n" + THREE, None, "GPU-bbb"),
        ("No devices were found", None, None),
        (THREE.replace("9000", "[GPU is lost]"), None, "GPU-ccc"),
        # The second is cut into MIG instances.
        (THREE.replace("9000, Disabled", "9000, Enabled"), None, "GPU-ccc"),
        # The choice is the user's, or CUDA's, whose numbers are not nvidia-smi's.
        (THREE, "0", "0"),
        (MIXED, "0,2", "0,2"),
        (THREE, "MIG-1234,MIG-5678", "MIG-1234,MIG-5678"),
        # CUDA stops at what it does not know.
        (THREE, "2,-1,1", "GPU-ccc"),
    ],
)
def test_what_nvidia_smi_says_is_taken_with_care(smi, monkeypatch, answer, visible, chosen):
    smi(answer)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert select_device() == torch.device("cuda:0")
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == chosen


def test_numbers_count_where_cuda_numbers_by_slot(smi, monkeypatch):
    smi(MIXED)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,2")
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    select_device()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "GPU-ccc"


def test_a_gpu_that_torch_cannot_use_is_told_in_a_line(smi, monkeypatch, capsys):
    smi(THREE)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert select_device() == CPU
    (line,) = capsys.readouterr().err.splitlines()
    assert "cannot use the GPU here" in line and "going on on the CPU" in line
    with pytest.raises(UserError, match="cannot use the GPU here"):
        select_device("cuda")


def test_the_gpu_that_is_named_is_the_current_one(smi, monkeypatch):
    smi(THREE)
    current = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert select_device("cuda:1") == torch.device("cuda", 1) == current[0]


def test_libraries_that_find_no_room_are_out_of_memory_too():
    for text in ("cuBLAS: CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED"):
        assert is_out_of_memory(RuntimeError(f"CUDA error: {text} when calling"))
    assert is_out_of_memory(torch.OutOfMemoryError("")) and not is_out_of_memory(RuntimeError("x"))


def test_on_a_gpu_packed_samples_are_not_looked_for_and_the_results_are_the_same(monkeypatch):
    asked = []
    monkeypatch.setattr(
        masking_utils, "find_packed_sequence_indices", lambda ids: asked.append(ids)
    )
    monkeypatch.setattr(base_model, "fuse_norms", lambda _: None)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    model, ids = make_model(), torch.randint(3, 300, (2, 9))
    plain = model(input_ids=ids, use_cache=False).logits
    assert asked
    asked.clear()
    try:
        spare_the_gpu(model)
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
    assert torch.equal(model(input_ids=ids, use_cache=False).logits, plain) and not asked


def test_bitsandbytes_says_a_thing_once(make_config, caplog, monkeypatch):
    logger = logging.getLogger("bitsandbytes.autograd._functions")
    monkeypatch.setattr(logger, "filters", [])
    monkeypatch.setattr(base_model, "_quantization", lambda *_: None)
    load_model(make_config(quantization="8bit"), CPU)
    for _ in range(3):
        logger.warning("inputs will be cast from %s to float16", "bfloat16")
    assert len(caplog.records) == 1


def test_a_gpu_that_is_not_there_is_an_error(smi):
    smi(THREE)
    with pytest.raises(UserError, match="torch sees 1 GPUs"):
        select_device("cuda:1")
    assert select_device("cuda") == torch.device("cuda:0")


def test_a_folder_loads_in_the_dtype_asked_for(make_config, model_folder):
    model, tokenizer = load_model_and_tokenizer(make_config(), CPU)
    assert model.dtype == torch.float32 and not model.training
    assert tokenizer.pad_token_id == 2 and tokenizer.padding_side == "right"
    model, _ = load_model_and_tokenizer(make_config(dtype="bfloat16"), CPU)
    assert model.dtype == torch.bfloat16
    facts = describe_base(make_config())
    assert facts.pop("weights") and facts == {
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
