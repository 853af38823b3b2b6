"""Choosing a device, with a pretended nvidia-smi, and what spares one."""

import os
import stat

import pytest
import torch
from helpers import make_model
from transformers import masking_utils

from configs.command_line import UserError
from configs.ending import is_out_of_memory
from training import device
from training.device import gpus_by_free_memory, select_device, spare_the_gpu

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
        ("GPU-aa", "GPU-aa"),
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
        (MIXED, "0,2", "0"),
        (THREE, "MIG-1234,MIG-5678", "MIG-1234"),
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


def test_several_runs_get_a_gpu_each(smi, monkeypatch):
    smi(THREE)
    assert gpus_by_free_memory() == ["GPU-bbb", "GPU-ccc", "GPU-aaa"]
    smi(MIXED)
    for visible in ("2,0", "MIG-1234,MIG-5678"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert gpus_by_free_memory() == visible.split(",")


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
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access"))


def test_on_a_gpu_packed_samples_are_not_looked_for_and_the_results_are_the_same(monkeypatch):
    asked = []
    monkeypatch.setattr(
        masking_utils, "find_packed_sequence_indices", lambda ids: asked.append(ids)
    )
    monkeypatch.setattr(device, "fuse_norms", lambda _: None)
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


def test_a_gpu_that_is_not_there_is_an_error(smi):
    smi(THREE)
    with pytest.raises(UserError, match="torch sees 1 GPUs"):
        select_device("cuda:1")
    assert select_device("cuda") == torch.device("cuda:0")
