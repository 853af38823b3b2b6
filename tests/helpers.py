"""What several test modules need: tiny models, samples and rows, runs that die, what a run left."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

import train_slsd_seq
from configs.base_config import BaseConfig
from evaluation.matrix import summarise
from methods import find_method, run_config
from methods.method import Tools
from models.ds_lora import BRANCHES, branch_parameters, replace_with_ds_lora
from models.forward import IGNORE, response_tokens
from training import passes as passes_module
from training.journal import Journal
from training.passes import Passes, StopSignals, make_passes
from training.saving import RunState

ROOT = Path(__file__).resolve().parents[1]


def make_rows(task: str, number: int) -> list[dict]:
    """Short arithmetic rows; a task has its own wording, so that there is something to learn."""
    words = {"T1": "add", "T2": "sum", "T3": "def", "T4": "call", "T5": "please"}
    lead = words[task[:2]]
    return [
        {
            "instruction": f"{lead} {i} and {i + 1}",
            "input": "" if i % 3 else f"note {i}",
            "output": f"{lead} gives {2 * i + 1}",
        }
        for i in range(number)
    ]


def write_rows(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_model(**overrides) -> LlamaForCausalLM:
    """4 layers, 32 wide, always the same random weights, fp32."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 320,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        # Larger than usual, so that random weights give answers that differ.
        "initializer_range": 0.2,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **overrides})).eval()


def inject(model, frozen=2, **changes):
    options = {"r": 4, "alpha": 8, "dropout": 0.0, "num_frozen_layers": frozen}
    return replace_with_ds_lora(model, ("q_proj", "v_proj"), **{**options, **changes})


@torch.no_grad()
def randomise(model, seed=1):
    """Gives both branches an effect of about the size of the base's own."""
    generator = torch.Generator().manual_seed(seed)
    for branch in BRANCHES:
        for parameter in branch_parameters(model, branch):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def parameters(model) -> list:
    """Of both branches."""
    return [p for branch in BRANCHES for p in branch_parameters(model, branch)]


def mean_loss(model, samples):
    """Cross entropy per response token, sample by sample."""
    total = 0.0
    for sample in samples:
        logits = model(sample["input_ids"][None]).logits[0, :-1]
        total = total + F.cross_entropy(logits, sample["labels"][1:], reduction="sum")
    return total / sum(map(response_tokens, samples))


def read(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def errors(capsys):
    """Lines on stderr; asserts that each is one `error: ...` and none a traceback."""
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines and all(line.startswith("error: ") for line in lines)
    return lines


def contents(folder):
    """Bytes and time of change of every file but the locks."""
    files = (path for path in folder.rglob("[!.]*") if path.is_file())
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def command(*argv, cwd=ROOT, **env):
    return subprocess.run(
        [sys.executable, *argv],
        cwd=cwd,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=120,
    )


def make_samples(lengths, seed=0):
    """Random samples; the second half of each is the response."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for i, length in enumerate(lengths):
        ids = torch.randint(3, 300, (length,), generator=generator)
        labels = ids.clone()
        labels[: length // 2] = IGNORE
        samples.append({"id": f"{i:064x}", "input_ids": ids, "labels": labels})
    return samples


def passes(samples, tokens_per_pass=40):
    return make_passes(samples, tokens_per_pass, pad_token_id=2, device=torch.device("cpu"))


def alone(value) -> list:
    """What `gather` returns in a single process."""
    return [value]


def make_method(name: str, model, **changes):
    """The method `name` for `model`, with small settings."""
    settings = {
        **({"kd_top_k": 16, "kd_batch_size": 2, "kd_every": 1, "probe_size_per_task": 4}),
        **({"probe_pool_factor": 2, "entropy_threshold": 100.0, "seed": 0}),
    }
    tools = Tools(
        model, passes, alone, lambda tensor: tensor, most_steps=changes.pop("most_steps", 1)
    )
    method = find_method(name)
    cfg = run_config(BaseConfig, method)(method=name, **{**settings, **changes})
    return method(cfg, tools)


def make_journal(cfg, model, tokenizer) -> Journal:
    """That of a run of `model` on the CPU, with its passes; the states are in `save_dir`."""
    of_run = Passes(cfg, model, tokenizer, torch.device("cpu"), StopSignals())
    state = RunState(Path(cfg.save_dir) / "state")
    return Journal(cfg, of_run, {"base_model": "tiny"}, state, {})


CLOCK = (
    "tokens_per_second",
    "train_seconds",
    "evaluate_seconds",
    "log_dir",
    "save_dir",
    "prefix_store",
)


def without_clock(value):
    if isinstance(value, dict):
        return {k: without_clock(v) for k, v in value.items() if k not in CLOCK}
    return value


def outcome(folder: Path) -> dict:
    """Everything a run leaves but the clock: adapters as bytes, logs and summary as values."""
    found = {}
    for path in sorted(folder.rglob("[!.]*")):
        name = str(path.relative_to(folder))
        if path.is_dir() or "_state/" in name:
            continue
        if path.suffix == ".jsonl":
            found[name] = [without_clock(line) for line in read(path)]
        elif name.endswith("summary.json"):
            found[name] = without_clock(json.loads(path.read_text()))
        elif name.endswith("config.yaml"):
            found[name] = without_clock(yaml.safe_load(path.read_text()))
        else:
            found[name] = path.read_bytes()
    left = [path for path in folder.rglob(".*") if path.suffix != ".lock"]
    assert not left, left
    return found


class Killed(BaseException):
    """Nothing in the program catches this."""


def fail_at(monkeypatch, module, name, number, error=Killed):
    """Makes the `number`-th call of module.name fail, from 0."""
    original, calls = getattr(module, name), []

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == number + 1:
            raise error
        return original(*args, **kwargs)

    monkeypatch.setattr(module, name, failing)
    return calls


def die_in_a_pass(monkeypatch, number, argv, script=train_slsd_seq):
    """Runs the script until its `number`-th cutting of passes, which kills it."""
    with monkeypatch.context() as patch:
        fail_at(patch, passes_module, "make_passes", number)
        with pytest.raises(Killed):
            script.main(argv)


def write_run(
    folder,
    matrix,
    drift=(),
    readings=None,
    is_one_model=True,
    tasks=None,
    accuracy=None,
    costs=(),
    **config,
):
    """The log folder of a finished run over the tasks A, B, ...; `accuracy` is a matrix too."""
    tasks = tasks or [chr(ord("A") + i) for i in range(len(matrix[0]))]
    cells, right = (
        [[None if math.isnan(x) else x for x in row] for row in rows]
        for rows in (matrix, accuracy or [])
    )
    metrics = {k: None if math.isnan(v) else v for k, v in summarise(matrix).items()}
    stages = {task: {"train_seconds": 60.0, "evaluate_seconds": 30.0} for task in tasks}
    config = {"seed": 1, "method": "ds_lora", "log_dir": str(folder), **config}
    folder.mkdir(parents=True)
    summary = {"tasks": tasks, "matrix": cells, **metrics, "stages": stages, "config": config}
    summary["is_one_model"] = is_one_model
    summary["accuracy"] = {"matrix": right} if right else {}
    for task, of_stage in zip(tasks, costs, strict=False):
        stages[task].update(of_stage)
    (folder / "seq_summary.json").write_text(json.dumps(summary))
    rows = [
        {"stage": s, "eval_task": task, "branches": "latest", "loss": cells[t][i]}
        for t, s in enumerate(["base", *tasks])
        for i, task in enumerate(tasks)
        if cells[t][i] is not None
    ]
    rows += [
        {"stage": tasks[-1], "eval_task": task, "branches": name, "loss": loss}
        for name, loss in (readings or {}).items()
        for task in tasks
    ]
    (folder / "seq_eval_loss.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "seq_drift.jsonl").write_text("".join(json.dumps(r) + "\n" for r in drift))
    return str(folder)
