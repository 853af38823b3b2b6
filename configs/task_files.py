"""The tasks of a configuration: their names and the files that they are read from."""

import dataclasses
import re

from configs.command_line import default_of

TASKS = ("T1_general", "T2_math", "T3_code", "T4_tool", "T5_safety")
# Files and folders are named by tasks.
TASK_NAME = r"[A-Za-z0-9_][A-Za-z0-9_-]{0,63}"
# Stages that are no task, and a folder beside those of the tasks.
NO_TASK = ("base", "joint", "state")
JUDGES = ("exact", "choice", "rouge_l", "number", "json_calls", "python")


def suite_paths(suite: str, tasks: list[str]) -> dict[str, dict[str, str]]:
    """`data_paths` of tasks that `prepare_datasets.py --suite` wrote, each with its test file."""
    folder = f"{{data_dir}}/full/{suite}"
    return {
        task: {
            **dict.fromkeys(("toy", "full"), f"{folder}/{task}.jsonl"),
            "test": f"{folder}/{task}_test.jsonl",
        }
        for task in tasks
    }


def with_task_data(data_paths: dict, task_data: list[str]) -> dict[str, dict[str, str]]:
    """`data_paths` with the entries of --task_data; what is malformed is left to the problems."""
    paths = dict(data_paths)
    entries = (str(entry).partition("=") for entry in task_data)
    # Training files first: one that replaces a task's has no part in its old test file.
    for name, _, path in sorted(entries, key=lambda entry: entry[0].endswith(".test")):
        task = name.removesuffix(".test")
        is_test = task != name
        changes = {"test": path} if is_test else dict.fromkeys(("toy", "full"), path)
        paths[task] = {**paths.get(task, {}), **changes} if is_test else changes
    return paths


def paths_with_those_of_then(cfg, then: dict) -> dict[str, dict[str, str]]:
    """`data_paths` of `cfg`, and `then`, those that a checkpoint was trained with.

    Where both name a task, its entry in `cfg` counts only where somebody gave it: what is merely
    the default would have it judged on what it was trained on. `--task_data` is applied anew as the
    configuration is made.
    """
    # What a run file or the knobs of a method make of a configuration has no name of its own.
    named = next(kind for kind in type(cfg).__mro__ if "config_name" in vars(kind))
    (field,) = (field for field in dataclasses.fields(named) if field.name == "data_paths")
    by_default = default_of(field)
    anew = {entry.partition("=")[0].removesuffix(".test") for entry in cfg.task_data}
    given = {
        task: paths
        for task, paths in cfg.data_paths.items()
        if paths != by_default.get(task) and task not in anew
    }
    return {**cfg.data_paths, **then, **given}


def judges_of(task_judges: list[str], tasks) -> list[str]:
    """Those of `task_judges` that judge one of `tasks`."""
    return [entry for entry in task_judges if entry.partition("=")[0] in tasks]


def task_problems(cfg) -> list[str]:
    """What is wrong with the tasks of `cfg`, their names, files and judges."""
    found = []
    for entry in cfg.task_data:
        if not re.fullmatch(rf"{TASK_NAME}(\.test)?=.+", entry, re.DOTALL):
            found.append(
                f"--task_data {entry}: give NAME=FILE or NAME.test=FILE; a name has letters, "
                "digits, - and _"
            )
    for entry in cfg.task_judges:
        task, _, judge = entry.partition("=")
        if judge not in JUDGES or task not in cfg.data_paths:
            found.append(
                f"--task_judges {entry}: give TASK=JUDGE, a task of the configuration and one "
                f"of {', '.join(JUDGES)}"
            )
    order, known = cfg.task_order, cfg.data_paths
    if set(order) - set(known) or len(set(order)) < len(order):
        found.append(
            f"task_order is {order!r}: give each task once, out of {', '.join(known)}; "
            "--task_data NAME=FILE adds one"
        )
    for task, paths in known.items():
        if not re.fullmatch(TASK_NAME, str(task)) or task in NO_TASK:
            found.append(
                f"task {task!r}: name it with up to 64 letters, digits, - and _, and not "
                f"{', '.join(NO_TASK)}"
            )
        if not isinstance(paths, dict) or not paths.keys() >= {"toy", "full"}:
            found.append(f'data_paths of {task} is {paths!r}: give {{"toy": ..., "full": ...}}')
    return found
