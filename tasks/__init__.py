"""The tasks by name: each file here that holds a TASK is one."""

import dataclasses
import importlib
import pkgutil

from tasks.judges import own_task
from tasks.task import Task


def _tasks_here() -> dict[str, Task]:
    names = sorted(found.name for found in pkgutil.iter_modules(__path__))
    modules = [importlib.import_module(f"tasks.{name}") for name in names]
    tasks = [module.TASK for module in modules if hasattr(module, "TASK")]
    return {task.name: task for task in sorted(tasks, key=lambda task: task.name)}


TASKS = _tasks_here()


def find_task(name: str) -> Task:
    """The task `name`; one that has no file here is judged as general instructions are."""
    own = Task(name, TASKS["T1_general"].judge, TASKS["T1_general"].primary)
    return TASKS.get(name, own)


def judged_task(name: str, judge: str, outputs: list[str]) -> Task:
    """The task `name`; one of those here is judged as its file says, unless `judge` is given.

    `outputs` of its training rows decide how another one is judged where `judge` is "".
    """
    if name not in TASKS:
        return own_task(name, judge, outputs)
    if not judge:
        return TASKS[name]
    own = own_task(name, judge, outputs)
    changes = {"judge": own.judge, "primary": own.primary, "options": own.options}
    return dataclasses.replace(TASKS[name], **changes)
