"""The tasks by name: each file here that holds a TASK is one."""

import importlib
import pkgutil

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
