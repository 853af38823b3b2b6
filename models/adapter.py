"""Both branches on disk, as one LoRA in PEFT's format."""

import json
import math
import re
from pathlib import Path

import torch
from safetensors.torch import save
from torch import nn

from models.ds_lora import BRANCHES, DSLoRALinear, ds_lora_layers, find_decoder_layers
from models.reading import read_json, read_safetensors, tensor_problems

# Most that a slow branch grows over.
MOST_TASKS = 1000


def save_adapter(model: nn.Module, folder: str | Path, base_model: str, **base_facts) -> None:
    """Writes both branches into `folder` as one PEFT LoRA of rank 2r, or more where slow has grown.

    `ds_lora.json` says how to cut them back and what the base was.

    Args:
        base_model: hub id, folder or file of the base model.
        base_facts: what else identifies the base (JSON values), such as its quantisation.
    """
    save_peft(model, folder, base_model)
    first = next(iter(ds_lora_layers(model).values()))
    ds_lora = {
        "layout": "lora_A rows and lora_B columns: slow is the first r_slow, fast the last r",
        "r": first.r,
        "r_slow": len(first.lora_A_slow),
        "alpha": first.alpha,
        "use_rslora": first.use_rslora,
        "num_layers": len(find_decoder_layers(model)[1]),
        "base_model": base_model,
        **base_facts,
    }
    _write_json(Path(folder) / "ds_lora.json", ds_lora)


def save_peft(model: nn.Module, folder: str | Path, base_model: str, branches=BRANCHES) -> None:
    """Writes `branches` into `folder` as one LoRA in PEFT's format.

    A = [A_s; A_f], B = [B_s, B_f], lora_alpha = scale rank: PEFT's lora_alpha / rank is our scale.
    So it is with rsLoRA: its own field is left out, which not every program reads.
    """
    folder, layers, tensors = Path(folder), ds_lora_layers(model), {}
    for name, layer in layers.items():
        A_parts, B_parts = zip(*(layer.branch(branch) for branch in branches), strict=True)
        tensors[_key(name, "A")] = torch.cat(A_parts).detach().cpu()
        tensors[_key(name, "B")] = torch.cat(B_parts, dim=1).detach().cpu()
    # A second metadata key would make the bytes differ from save to save. Not `save_file`, which
    # hides that the disk is full in an error of its own.
    (folder / "adapter_model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))
    first = next(iter(layers.values()))
    rank = sum(len(first.branch(branch)[0]) for branch in branches)
    peft_config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": _whole(first.scaling * rank),
        **_places(model),
        "bias": "none",
        "lora_dropout": 0.0,
        "inference_mode": True,
    }
    _write_json(folder / "adapter_config.json", peft_config)


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _whole(number: float) -> int | float:
    """`number` as an int where it is one up to rounding: some programs take no other."""
    return round(number) if math.isclose(number, round(number), rel_tol=1e-12) else number


def _places(model: nn.Module) -> dict:
    """PEFT's words for where the branches are: short names and layer numbers where these are exact.

    Where they would find other layers too, such as those of a vision tower, whole names.
    """
    stack_name, names = find_decoder_layers(model)[0], set(ds_lora_layers(model))
    short = sorted({name.rsplit(".", 1)[-1] for name in names})
    pattern = stack_name.rsplit(".", 1)[-1]
    indices = sorted({int(name.removeprefix(stack_name + ".").split(".")[0]) for name in names})
    # PEFT's rule: the name's end, and the first number behind the list's name.
    number = re.compile(rf"(?:^|.*?\.){re.escape(pattern)}\.(\d+)\.")
    found = {
        name
        for name, _ in model.named_modules()
        if name.rsplit(".", 1)[-1] in short
        and (match := number.match(name))
        and int(match[1]) in indices
    }
    exact = {"layers_to_transform": indices, "layers_pattern": pattern}
    return (
        {"target_modules": short, **exact} if found == names else {"target_modules": sorted(names)}
    )


@torch.no_grad()
def load_adapter(model: nn.Module, folder: str | Path, branches=BRANCHES) -> None:
    """Reads what `save_adapter` wrote into `branches` of `model`.

    The slow branch gets the rank that was saved. Raises ValueError, before anything is changed,
    where a file is missing or damaged, or where rank, scale, layers or shapes are not those of
    `model`.
    """
    folder, layers = Path(folder), ds_lora_layers(model)
    r_slow = _slow_rank(folder, next(iter(layers.values())))
    shapes = {}
    for name, layer in layers.items():
        shapes[_key(name, "A")] = (r_slow + layer.r, layer.base_layer.in_features)
        shapes[_key(name, "B")] = (layer.base_layer.out_features, r_slow + layer.r)
    try:
        most = sum(map(math.prod, shapes.values()))
        tensors = read_safetensors(folder / "adapter_model.safetensors", most)
    except ValueError as error:
        raise ValueError(f"{folder} is not a whole DS-LoRA checkpoint: {error}") from error
    if problems := tensor_problems(tensors, shapes):
        raise ValueError(f"{folder} does not fit the model: {'; '.join(problems)}")
    for name, layer in layers.items():
        A, B = tensors[_key(name, "A")], tensors[_key(name, "B")]
        for branch, part in (("slow", slice(r_slow)), ("fast", slice(r_slow, None))):
            if branch in branches:
                layer.set_branch(branch, A[part], B[:, part])


def _slow_rank(folder: Path, layer: DSLoRALinear) -> int:
    """The rank of the slow branch in a checkpoint, whose r and alpha must be those of `layer`."""
    try:
        settings = read_json(folder / "ds_lora.json")
        found = {"r": settings["r"], "alpha": settings["alpha"]}
        found["use_rslora"] = settings.get("use_rslora", False)
        r_slow = settings.get("r_slow", settings["r"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder} is not a whole DS-LoRA checkpoint: {error!r}") from error
    problems = [
        f"its {key} is {value}, the model's {getattr(layer, key)}"
        for key, value in found.items()
        if value != getattr(layer, key)
    ]
    # Slow grows by r a task at most.
    if type(r_slow) is not int or not 1 <= r_slow <= MOST_TASKS * layer.r:
        problems.append(f"its r_slow is {r_slow}, and no rank from 1 to {MOST_TASKS * layer.r}")
    if problems:
        raise ValueError(f"{folder} does not fit the model: {'; '.join(problems)}")
    return r_slow


def _key(layer_name: str, matrix: str) -> str:
    return f"base_model.model.{layer_name}.lora_{matrix}.weight"
