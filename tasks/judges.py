"""How replies to a task of the user's own are judged: by name, or by what its outputs look like."""

from tasks.choice import choice_task, is_choice, normal
from tasks.code import judge_code
from tasks.extract import flexible_number, same_number, strict_number
from tasks.general import judge_general
from tasks.task import Judge, Task
from tasks.tool import judge_calls


def judge_exact(row: dict, reply: str) -> dict[str, float]:
    """Equal but for case, white space and a final dot."""
    return {"exact": normal(reply) == normal(row["output"])} if normal(row["output"]) else {}


def judge_number(row: dict, reply: str) -> dict[str, float]:
    """The last number of the reply is the output's: that behind ####, else its last."""
    wanted = strict_number(row["output"])
    wanted = flexible_number(row["output"]) if wanted is None else wanted
    return {} if wanted is None else {"number": same_number(flexible_number(reply), wanted)}


# By the name that --task_judges takes, with the score that tells most; "choice" needs options.
JUDGES: dict[str, tuple[Judge, str]] = {
    "exact": (judge_exact, "exact"),
    "rouge_l": (judge_general, "rouge_l"),
    "number": (judge_number, "number"),
    "json_calls": (judge_calls, "exact"),
    "python": (judge_code, "syntax"),
}


def own_task(name: str, judge: str, outputs: list[str]) -> Task:
    """The task `name`, whose replies are judged by `judge`.

    "": by its training `outputs`, as a choice where they are few and short, else by ROUGE-L.
    """
    if judge == "choice" or (not judge and is_choice(outputs)):
        return choice_task(name, outputs)
    return Task(name, *JUDGES[judge or "rouge_l"])


def describe(task: Task) -> str:
    """How `task` is judged, in words."""
    if not task.options:
        return f"{task.name}: judged by {task.primary}"
    shown = ", ".join(task.options[:8]) + (", ..." if len(task.options) > 8 else "")
    return f"{task.name}: judged as a choice among {len(task.options)} ({shown})"
