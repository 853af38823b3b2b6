"""The README.md of a checkpoint: a model card in the hub's format."""

import re
import sys
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import ModelCardData

from methods import find_method
from tasks import TASKS
from tasks.source import Source

BRANCHES = """It holds two branches stacked as one adapter in PEFT's format: *slow*, which all tasks
share, and *fast*, that of the last task. `ds_lora.json` says how to take them apart.
"""
LOAD = """```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained("{base}", dtype="auto")
model = PeftModel.from_pretrained(base, "PATH")  # this folder, or its repository
tokenizer = AutoTokenizer.from_pretrained("PATH")  # its chat template is the prompt of training
```"""


def model_card(cfg, base_model: str, tasks: list[str], losses: list[dict]) -> str:
    """The card of a model that has learned `tasks`, in their order.

    Nothing in it depends on when, where or how fast it was trained.

    Args:
        base_model: hub id, folder or file of the base model.
        losses: lines {"stage", "eval_task", "branches", "loss"} of the log so far.
    """
    method = find_method(cfg.method)
    about = (sys.modules[method.__module__].__doc__ or "").strip().partition("\n")[0].rstrip(".")
    sources = {task: _sources(cfg, task) for task in tasks}
    data = ModelCardData(
        # A folder is no name on the hub.
        base_model=base_model if is_hub_id(base_model) else None,
        library_name="peft",
        pipeline_tag="text-generation",
        tags=["lora", "continual-learning", "ds-lora", method.name],
        # Of several choices the one that was made is not known here.
        datasets=[
            source.hub_id
            for choices in sources.values()
            if len(choices) == 1
            for source in choices[0]
        ]
        or None,
    )
    parts = [
        f"---\n{data.to_yaml()}\n---\n\n# {' → '.join(tasks)}\n",
        f"A LoRA adapter of `{base_model}` that has learned {_listed(tasks)}, by the method "
        f"`{method.name}`{f' ({about})' if about else ''}.\n",
        "" if method.is_one_lora else BRANCHES,
        "## Use\n\n" + LOAD.format(base=base_model) + "\n",
        _data_part(sources),
        _losses_part(tasks, losses),
    ]
    return "\n".join(part for part in parts if part)


def is_hub_id(name: str) -> bool:
    """Whether `name` is OWNER/NAME and no folder."""
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name)) and not Path(name).exists()


def _listed(tasks: list[str]) -> str:
    return (
        tasks[0] if len(tasks) == 1 else f"{', '.join(tasks[:-1])} and {tasks[-1]}, in this order"
    )


def _sources(cfg, task: str) -> list[list[Source]]:
    """The choices of sets that the rows of `task` may come from; none where it has other files."""
    is_usual = cfg.data_paths[task].get("full") == f"{{data_dir}}/full/{task}_full.jsonl"
    if cfg.use_toy_data or not is_usual or task not in TASKS:
        return []
    return list(TASKS[task].sources.values())


def _data_part(sources: dict[str, list[Source]]) -> str:
    """What each task was learned from; what the licences of sets mean for a model is not said."""

    def told(choices: list[list[Source]], of: Callable[[Source], str]) -> str:
        return " or ".join(", ".join(map(of, choice)) for choice in choices)

    rows = [
        f"| {task} | {told(choices, lambda s: s.hub_id) or 'files of its own'} "
        f"| {told(choices, lambda s: s.license or 'not known') or 'not known'} |"
        for task, choices in sources.items()
    ]
    head = "## Data\n\n| task | from (as `prepare_datasets.py` writes it) | licence of the set |"
    return "\n".join([head, "|---|---|---|", *rows]) + "\n"


def _losses_part(tasks: list[str], losses: list[dict]) -> str:
    """A row for each stage and reading, a column for each task learned."""
    rows: dict[tuple[str, str], dict[str, float]] = {}
    for line in losses:
        rows.setdefault((line["stage"], line["branches"]), {})[line["eval_task"]] = line["loss"]
    if not rows:
        return ""
    lines = [
        "## Held-out loss\n",
        "Nats per response token, lower is better; `base` is the untouched model.\n",
        f"| after | read as | {' | '.join(tasks)} |",
        "|" + "---|" * (2 + len(tasks)),
    ]
    for (stage, reading), of_row in rows.items():
        cells = (f"{of_row[task]:.3f}" if task in of_row else "" for task in tasks)
        lines.append(f"| {stage} | {reading} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
