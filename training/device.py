"""Which device a run takes, in which dtype it computes there, and what spares it work."""

import ctypes
import os
import subprocess
import sys
import warnings
from itertools import takewhile

import torch
from transformers import masking_utils

from configs.command_line import UserError, is_first, local_rank, num_processes, processes_here
from models.fused import fuse_norms

QUERY = "uuid,index,memory.free,mig.mode.current,name"
# Of glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def select_device(wanted: str = "auto") -> torch.device:
    """`wanted`, or for "auto" the GPU with the most free memory, and the CPU where there is none.

    Asks nvidia-smi, since a CUDA query would leave a context of some 500 MB on every GPU it asks.
    Makes the chosen GPU the only visible one, or the current one where it was named, so call it
    before anything else touches CUDA. Says so in a line where there is a GPU that torch cannot use,
    and raises `UserError` where a GPU is wanted that is not there.
    """
    if wanted == "cpu":
        return torch.device("cpu")
    several = num_processes() > 1
    if several and wanted not in ("auto", "cuda"):
        raise UserError(f"--device {wanted}: with several processes give auto, cuda or cpu")
    gpus, fault = _visible_gpus()
    if wanted == "auto" and not several and (entries := _by_free_memory(gpus)):
        os.environ["CUDA_VISIBLE_DEVICES"] = entries[0]
    count, fault = _usable_gpus(fault)
    if wanted == "auto" and not count:
        if fault and is_first():
            print(f"warning: {fault}; going on on the CPU", file=sys.stderr)
        return torch.device("cpu")
    if several and count < processes_here():
        raise UserError(
            f"{processes_here()} processes for {count} GPUs: start at most one process a GPU"
        )
    named = 0 if wanted == "auto" else torch.device(wanted).index or 0
    number = local_rank() if several else named
    if number >= count:
        reason = fault or f"torch sees {count} GPUs"
        raise UserError(f"--device {wanted}: {reason}; give auto, cpu or one of them")
    device = torch.device("cuda", number)
    # What is asked of "the GPU" from here on, its name or bf16, is asked of this one.
    torch.cuda.set_device(device)
    return device


def gpus_by_free_memory() -> list[str]:
    """What CUDA_VISIBLE_DEVICES may be set to for one GPU each, the freest first."""
    return _by_free_memory(_visible_gpus()[0])


def _usable_gpus(fault: str) -> tuple[int, str]:
    """(GPUs that torch can use, why none: what torch says, else `fault`)."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    # A driver that is too old is told in many lines.
    return count, "" if count else str(said[0].message).partition("\n")[0] if said else fault


def _visible_gpus() -> tuple[list[list[str]], str]:
    """(QUERY's fields of each GPU that CUDA_VISIBLE_DEVICES leaves, why torch may not use them)."""
    query = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.SubprocessError):
        return [], ""
    if answer.returncode:
        lines = (answer.stdout + answer.stderr).strip().splitlines() or [""]
        return [], f"nvidia-smi fails ({lines[0].strip()}): mend the driver"
    parts = ([part.strip() for part in line.split(",")] for line in answer.stdout.splitlines())
    # Whatever else it says, about lost GPUs or none, has other fields.
    gpus = [fields for fields in parts if len(fields) == 5 and fields[0].startswith("GPU-")]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        # CUDA stops at the first entry that it does not know.
        entries = (_named(entry.strip(), gpus) for entry in visible.split(","))
        gpus = list(takewhile(bool, entries))
    built = "built without CUDA" if torch.version.cuda is None else "not made for its driver"
    return gpus, f"torch {torch.__version__} cannot use the GPU here: it is {built}" if gpus else ""


def _named(entry: str, gpus: list[list[str]]) -> list[str] | None:
    """The GPU that an entry of CUDA_VISIBLE_DEVICES stands for."""
    named = (gpu for gpu in gpus if entry and (entry == gpu[1] or gpu[0].startswith(entry)))
    return next(named, None)


def _by_free_memory(gpus: list[list[str]]) -> list[str]:
    """UUIDs of `gpus`, those with the most free memory first.

    Where it is not known which ones CUDA_VISIBLE_DEVICES means, or it means one: as it says.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    entries = [entry.strip() for entry in visible.split(",") if entry.strip()]
    # CUDA counts the fastest first, nvidia-smi by their slots.
    by_slot = os.environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID"
    is_ambiguous = any(map(str.isdigit, entries)) and not by_slot
    is_mixed = len({name for *_, name in gpus}) > 1
    if entries and (len(entries) == 1 or not gpus or (is_ambiguous and is_mixed)):
        return entries
    # One that is cut into MIG instances runs nothing by itself, and one that is lost has no number.
    free = {
        uuid: int(memory)
        for uuid, _, memory, mig, _ in gpus
        if mig != "Enabled" and memory.isdigit()
    }
    return sorted(free, key=free.get, reverse=True)


def model_dtype(cfg, device: torch.device) -> torch.dtype:
    """The dtype of the base model on `device`."""
    if cfg.dtype != "auto":
        return getattr(torch, cfg.dtype)
    if device.type == "cpu":
        return torch.float32
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_bf16 else torch.float16


def spare_the_gpu(model: torch.nn.Module) -> None:
    """What has the host wait for a GPU, or a GPU for the host, and changes no result, goes."""
    # It plans anew for every shape: tens of milliseconds, and a decoded token is a new shape.
    torch.backends.cuda.enable_cudnn_sdp(False)
    # It asks the device in every pass whether a row holds several samples: here none does.
    masking_utils.find_packed_sequence_indices = lambda *_, **__: None
    fuse_norms(model)


def spare_the_cpu() -> None:
    """Has glibc keep large freed blocks: mapping them anew in each pass takes a CPU a tenth."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        for threshold in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
            mallopt(threshold, 2**30)
