"""Talks to a stage checkpoint, or to the base model, one prompt at a time.

/latest  /slow  /own TASK  /fast TASK  /routed   how the branches are read from now on
/stage TASK                                      goes to another stage of the run
/quit                                            or Ctrl-D

With --serve PORT it answers OpenAI's clients instead.
"""

import sys
from dataclasses import dataclass

from configs.command_line import Knobs, UserError, knob, num_processes
from configs.ending import command_line, printable
from evaluation.generate import (
    Voice,
    answer_room,
    continue_prompt,
    prompt_ids,
    prompt_samples,
)
from evaluation.readings import BASE, LATEST, READINGS, Stage, open_stage, read_as, sources_of
from methods import parse_config


@dataclass
class Chat(Knobs):
    checkpoint: str = knob(BASE, "a stage checkpoint, such as checkpoints/seq_TASK; or base")
    max_new_tokens: int = knob(256, "tokens of an answer at most", at_least=1, at_most=10**5)
    serve: int = knob(
        0, "port of an OpenAI-compatible address; 0: talk here", at_least=0, at_most=65535
    )
    host: str = knob(
        "127.0.0.1", "address of --serve; with 0.0.0.0 other machines reach it", not_empty=True
    )


@command_line
def main(argv=None):
    cfg, wanted = parse_config(argv, Chat, description=__doc__)
    if num_processes() > 1:
        raise UserError(
            "a chat is one process: start it without torchrun, or `unset RANK WORLD_SIZE`"
        )
    if wanted.serve:
        return serve(cfg, wanted)
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
            print(printable(f"error: {error}"), file=sys.stderr)


def serve(cfg, wanted: Chat) -> None:
    """Answers requests instead of prompts that are typed."""
    try:
        # Needed by nothing else.
        from evaluation import server
    except ImportError as error:
        raise UserError(f"--serve needs {error.name}: pip install starlette uvicorn") from error
    with server.listening(wanted.host, wanted.serve) as place:
        server.serve(open_stage(cfg, wanted.checkpoint), place, wanted.max_new_tokens)


def obey(stage: Stage, line: str, reading: str, source: str) -> tuple[str, str]:
    """The reading after the command `line`, and the task whose branches it takes ("" for none)."""
    command, _, task = line[1:].partition(" ")
    if command == "stage":
        stage.take_up(stage.folder_of(task))
        return reading, source
    if command not in stage.readings:
        names = ", ".join("/" + name for name in stage.readings)
        raise UserError(f"/{command}: give {names}, /stage")
    needs_task = READINGS[command].own and not READINGS[command].is_routed
    if needs_task:
        # Tried now, so that a wrong name is told at once.
        with read_as(stage, command, task):
            pass
    elif READINGS[command].is_routed and not stage.router.tasks:
        raise UserError("/routed: the checkpoint has no router.safetensors")
    return command, task if needs_task else ""


def say(stage: Stage, reading: str, source: str, text: str, max_new_tokens: int) -> None:
    """Prints the answer to `text` token by token."""
    row = {"instruction": text, "input": ""}
    room, limit = answer_room(stage, max_new_tokens)
    prompts = prompt_ids(stage.passes.template, [row], room)
    (source,) = sources_of(stage, reading, source, prompt_samples(prompts))
    if READINGS[reading].is_routed:
        print(printable(f"({source})"))
    with read_as(stage, reading, source):
        voice = Voice(stage.passes.tokenizer)
        continue_prompt(stage.passes, prompts[0], limit, voice)


if __name__ == "__main__":
    sys.exit(main())
