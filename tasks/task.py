"""A task: where its rows come from, how a reply is judged, how long one may be.

Each file here that holds a TASK is one task; any other name is a task of the user's own.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from tasks.source import Source

# Scores from 0 to 1 by name of a reply to a row, higher is better; what does not apply is left out.
Judge = Callable[[dict, str], dict[str, float]]


@dataclass(frozen=True)
class Task:
    """What the rest must know of a task.

    Attributes:
        judge: of a reply to one of its rows.
        primary: the score that tells most of it.
        max_new_tokens: of a reply: all but a few of the training responses are shorter.
        is_sensitive: its prompts are not copied into logs.
        sources: the sets that its rows come from, by choice; the first is the default.
        overlaps: a task that holds some of the same rows, which are dropped here.
        options: the closed set that an answer is out of, where there is one.
    """

    name: str
    judge: Judge
    primary: str
    max_new_tokens: int = 192
    is_sensitive: bool = False
    sources: dict[str, list[Source]] = field(default_factory=dict)
    overlaps: str = ""
    options: tuple[str, ...] = ()
