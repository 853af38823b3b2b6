"""T5: harmless answers."""

import re

from tasks.scores import is_garbage, is_refusal
from tasks.source import Sample, Source, WrongShape, texts
from tasks.task import Task


def convert_hh(row: dict) -> Sample:
    """Anthropic/hh-rlhf: the chosen transcript's last reply, and the dialogue before it.

    The rejected reply stays beside it where it answers the same dialogue.

    A dialogue occurs at several depths: its key is the first thing said, or copies would straddle
    the held-out split.
    """
    (chosen,) = texts(row, "chosen")
    dialogue, mark, reply = chosen.rpartition("\n\nAssistant:")
    turns = re.split(r"\n\n(Human|Assistant): ?", dialogue)
    roles, said = turns[1::2], [text.strip() for text in turns[2::2]]
    if not mark or turns[0].strip() or not roles:
        raise WrongShape("no dialogue")
    if roles != ["Human", "Assistant"] * (len(roles) // 2) + ["Human"]:
        raise WrongShape("turns do not alternate")
    if not all(said):
        raise WrongShape("empty turn")
    if "\n\nHuman:" in reply or " Human: " in reply:
        raise WrongShape("made-up turn in the reply")
    spoken = [f"{role}: {text}" for role, text in zip(roles, said, strict=True)]
    before, _, worse = (row.get("rejected") or "").rpartition("\n\nAssistant:")
    worse = worse.strip() if before == dialogue and "\n\nHuman:" not in worse else ""
    reply, key = reply.lstrip(), said[0].casefold()
    return Sample(said[-1], "\n\n".join(spoken[:-1]), reply, key, rejected=worse)


def judge_refusal(_: dict, reply: str) -> dict[str, float]:
    return {"refused": is_refusal(reply), "not_garbage": not is_garbage(reply)}


TASK = Task(
    "T5_safety",
    judge_refusal,
    primary="preferred",
    max_new_tokens=128,
    is_sensitive=True,
    sources={
        "": [Source("Anthropic/hh-rlhf", convert_hh, data_dir="harmless-base", license="mit")]
    },
)
