"""Talks to a stage checkpoint, or to the base model, one prompt at a time.

/latest  /slow  /own TASK  /fast TASK  /routed   how the branches are read from now on
/stage TASK                                      goes to another stage of the run
/quit                                            or Ctrl-D
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import TextStreamer

from configs.base_config import UserError, command_line, knob, parse_config
from models.forward import evaluation
from utils_data import IGNORE
from evaluation.generate import greedy, left_padded, prompt_ids
from evaluation.readings import (
    BASE,
    LATEST,
    READINGS,
    Stage,
    open_stage,
    read_as,
    readings_of,
    sources_of,
)


@dataclass
class Chat:
    checkpoint: str = knob(BASE, "a stage checkpoint, such as checkpoints/seq_T5_safety; or base")
    max_new_tokens: int = knob(256, "tokens of an answer at most")

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise UserError(f"--max_new_tokens {self.max_new_tokens}: give 1 or more")


@command_line
def main(argv=None):
    cfg, wanted = parse_config(argv, Chat, description=__doc__)
    stage, reading, source = open_stage(cfg, wanted.checkpoint), LATEST, ""
    print(__doc__)
    while True:
        try:
            line = input(f"{stage.name} {reading} {source}".strip() + "> ").strip()
            line.encode()
        except EOFError:
            print()
            return
        except UnicodeError:
            print("error: what was typed is not UTF-8", file=sys.stderr)
            continue
        if line == "/quit":
            return
        try:
            if line.startswith("/"):
                reading, source = obey(stage, line, reading, source)
            elif line:
                say(stage, reading, source, line, wanted.max_new_tokens)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)


def obey(stage: Stage, line: str, reading: str, source: str) -> tuple[str, str]:
    """The reading after the command `line`, and the task whose branches it takes ("" for none)."""
    command, _, task = line[1:].partition(" ")
    if command == "stage":
        stage.take_up(Path(stage.session.cfg.save_dir) / f"seq_{task}")
        return reading, source
    possible = readings_of(stage.method, stage.session.cfg.num_frozen_layers)
    if command not in possible:
        raise UserError(f"/{command}: give {', '.join('/' + name for name in possible)}, /stage")
    needs_task = READINGS[command].own and not READINGS[command].is_routed
    if needs_task:
        # Tried now, so that a wrong name is told at once.
        with read_as(stage.session, stage.method, command, task):
            pass
    elif READINGS[command].is_routed and not stage.router.tasks:
        raise UserError("/routed: the checkpoint has no router.safetensors")
    return command, task if needs_task else ""


def say(stage: Stage, reading: str, source: str, text: str, max_new_tokens: int) -> None:
    """Prints the answer to `text` token by token."""
    session = stage.session
    row = {"instruction": text, "input": ""}
    (prompt,) = prompt_ids(session.tokenizer, [row], session.cfg.max_seq_len)
    ids = torch.tensor(prompt)
    sample = {"id": "", "input_ids": ids, "labels": torch.full_like(ids, IGNORE)}
    (source,) = sources_of(session, reading, source, [sample], stage.router)
    if READINGS[reading].is_routed:
        print(f"({source})")
    streamer = TextStreamer(session.tokenizer, skip_prompt=True, skip_special_tokens=True)
    with (
        read_as(session, stage.method, reading, source),
        evaluation(session.model),
        greedy(session.model, session.tokenizer, max_new_tokens),
    ):
        inputs = left_padded([prompt], session.tokenizer.pad_token_id, session.device)
        session.model.generate(**inputs, streamer=streamer)


if __name__ == "__main__":
    sys.exit(main())
