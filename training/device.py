"""Which device a run takes, and what torch is told about it."""

import os
import subprocess
import sys
import warnings
from itertools import takewhile

import torch

from configs.command_line import UserError, is_first, local_rank, num_processes, processes_here

QUERY = "uuid,index,memory.free,mig.mode.current,name"


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
    listed, fault = _listed_gpus()
    if wanted == "auto" and not several and (freest := _freest(listed)):
        os.environ["CUDA_VISIBLE_DEVICES"] = freest
    count, fault = _usable_gpus(fault if fault or listed else "")
    if wanted == "auto" and not count:
        if fault and is_first():
            print(f"warning: {fault}; going on on the CPU", file=sys.stderr)
        return torch.device("cpu")
    if several and count < processes_here():
        raise UserError(
            f"{processes_here()} processes for {count} GPUs: start at most one process a GPU"
        )
    number = local_rank() if several else torch.device(wanted).index or 0 if wanted != "auto" else 0
    if number >= count:
        raise UserError(
            f"--device {wanted}: {fault or f'torch sees {count} GPUs'}; give auto, cpu or one of "
            "them"
        )
    device = torch.device("cuda", number)
    # What is asked of "the GPU" from here on, its name or bf16, is asked of this one.
    torch.cuda.set_device(device)
    return device


def _usable_gpus(fault: str) -> tuple[int, str]:
    """(GPUs that torch can use, why none where there seems to be one)."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count:
        return count, ""
    if said:
        # A driver that is too old, in many lines.
        fault = str(said[0].message).partition("\n")[0]
    return 0, fault


def _listed_gpus() -> tuple[list[list[str]], str]:
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
        entries = [entry.strip() for entry in visible.split(",")]
        of_entries = [_named(entry, gpus) for entry in entries]
        gpus = list(takewhile(bool, of_entries))
    built = "built without CUDA" if torch.version.cuda is None else "not made for its driver"
    return gpus, f"torch {torch.__version__} cannot use the GPU here: it is {built}" if gpus else ""


def _named(entry: str, gpus: list[list[str]]) -> list[str] | None:
    """The GPU that an entry of CUDA_VISIBLE_DEVICES stands for."""
    for fields in gpus:
        if entry and (entry == fields[1] or fields[0].startswith(entry)):
            return fields
    return None


def _freest(gpus: list[list[str]]) -> str | None:
    """UUID of the GPU with the most free memory; None where the choice is CUDA's or the user's."""
    entries = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    # CUDA counts the fastest first, nvidia-smi by their slots.
    by_slot = os.environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID"
    is_ambiguous = any(entry.strip().isdigit() for entry in entries) and not by_slot
    names = {name for *_, name in gpus}
    if "CUDA_VISIBLE_DEVICES" in os.environ and (
        len(entries) == 1 or (is_ambiguous and len(names) > 1)
    ):
        return None
    # A GPU cut into MIG instances runs nothing by itself.
    free = {uuid: memory for uuid, _, memory, mig, _ in gpus if mig != "Enabled"}
    numbers = {uuid: int(memory) for uuid, memory in free.items() if memory.isdigit()}
    return max(numbers, key=numbers.get) if numbers else None


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch, or a library beneath it, found no room on the device."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    # cuBLAS and cuDNN allocate behind torch's back, and torch raises what they return.
    return any(sign in str(error) for sign in ("STATUS_ALLOC_FAILED", "CUDA error: out of memory"))
