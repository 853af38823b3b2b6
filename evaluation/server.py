"""A stage checkpoint at an address of this machine, as OpenAI's clients ask for chat completions.

The model's name in a request is the reading: `routed`, `latest`, `slow`, `own:TASK`, `fast:TASK`;
the answer's says whose branches gave it. Replies are greedy and come whole. One prompt is answered
at a time, so that the branches of two are never mixed.
"""

import asyncio
import json
import socket
import time
import uuid

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.routing import Route

from configs.command_line import UserError
from evaluation.generate import continue_prompt, prompt_samples
from evaluation.readings import READINGS, Stage, read_as, sources_of
from tasks.own import OwnFile
from tasks.source import Drop

MOST_BYTES = 2**20
# What a client may say beside these is about sampling, tools or formats: refused, not ignored.
KNOWN = {"model", "messages", "max_tokens", "max_completion_tokens", "stream", "n", "user"}
GREEDY = {"temperature": (0,), "top_p": (1,), "n": (1,), "stream": (False,)}


def names_of(stage: Stage) -> list[str]:
    """What a request may give as "model", the default first."""
    names = []
    for reading in stage.readings:
        of_reading = READINGS[reading]
        if of_reading.is_routed:
            names = [reading, *names] if stage.router.tasks else names
        elif of_reading.own:
            names += [f"{reading}:{task}" for task in stage.seen]
        else:
            names.append(reading)
    return names


def _row(messages) -> dict[str, str]:
    """The conversation as one prompt, as `prepare_datasets.py --own` makes it of such rows."""
    if isinstance(messages, list) and messages:
        said = [*messages, {"role": "assistant", "content": "-"}]
        try:
            return OwnFile("", "", read={"messages": "messages"}).convert({"messages": said}).row()
        except Drop as drop:
            raise HTTPException(400, f"messages: {drop}; the last one must be a user's") from drop
    raise HTTPException(400, "messages: give a list of {role, content}")


def _checked(stage: Stage, asked, most: int) -> tuple[str, str, list[int], int]:
    """(reading, task whose branches it takes, ids of the prompt, new tokens at most)."""
    if not isinstance(asked, dict):
        raise HTTPException(400, "the body is no JSON object")
    if unknown := sorted(asked.keys() - KNOWN - GREEDY.keys()):
        raise HTTPException(400, f"not known here: {', '.join(unknown)}")
    for name, allowed in GREEDY.items():
        if asked.get(name) not in (None, *allowed):
            raise HTTPException(400, f"{name}: replies are greedy, one and whole; leave it out")
    names = names_of(stage)
    name = asked.get("model") or names[0]
    if name not in names:
        raise HTTPException(404, f"model: give one of {', '.join(names)}")
    limit = asked.get("max_completion_tokens") or asked.get("max_tokens") or most
    if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
        raise HTTPException(400, "max_tokens: give a whole number from 1 on")
    template, room = stage.passes.template, stage.cfg.max_seq_len
    prompt = template.join(template.prompts([_row(asked.get("messages"))])[0], 10**9)
    if len(prompt) > room:
        raise HTTPException(400, f"messages: {len(prompt)} tokens; at most {room} can be read")
    reading, _, task = name.partition(":")
    return reading, task, prompt, min(limit, most)


def reply_to(stage: Stage, asked, most: int) -> dict:
    """The answer to the request `asked`; `HTTPException` where it asks for what there is not."""
    reading, task, prompt, limit = _checked(stage, asked, most)
    (source,) = sources_of(stage, reading, task, prompt_samples([prompt]))
    with read_as(stage, reading, source):
        ids = continue_prompt(stage.passes, prompt, limit)
    text = stage.passes.tokenizer.decode(ids, skip_special_tokens=True).strip()
    ended = bool(ids) and ids[-1] in stage.passes.template.stop
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": f"{reading}:{source}" if source else reading,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": text},
                "finish_reason": "stop" if ended else "length",
            }
        ],
        "usage": {
            "prompt_tokens": len(prompt),
            "completion_tokens": len(ids),
            "total_tokens": len(prompt) + len(ids),
        },
    }


def make_app(stage: Stage, most: int) -> Starlette:
    """`most`: new tokens of a reply, whatever a request asks for."""
    one_at_a_time = asyncio.Lock()

    async def completions(request):
        parts, size = [], 0
        async for part in request.stream():
            size += len(part)
            if size > MOST_BYTES:
                raise HTTPException(413, f"the body is larger than {MOST_BYTES} bytes")
            parts.append(part)
        try:
            asked = json.loads(b"".join(parts))
        except (ValueError, RecursionError):
            raise HTTPException(400, "the body is no JSON") from None
        async with one_at_a_time:
            try:
                return JSONResponse(await run_in_threadpool(reply_to, stage, asked, most))
            except UserError as error:
                # A checkpoint that is gone, say: nothing that the client could mend.
                raise HTTPException(500, str(error)) from error

    async def models(request):
        listed = [{"id": name, "object": "model", "owned_by": "local"} for name in names_of(stage)]
        return JSONResponse({"object": "list", "data": listed})

    async def refused(request, error):
        fault = {"message": error.detail, "type": "invalid_request_error", "code": None}
        return JSONResponse({"error": fault}, error.status_code)

    return Starlette(
        routes=[
            Route("/v1/chat/completions", completions, methods=["POST"]),
            Route("/v1/models", models),
        ],
        exception_handlers={HTTPException: refused},
    )


def listening(host: str, port: int) -> socket.socket:
    """A socket at this address; `UserError` where it cannot be had."""
    try:
        return socket.create_server((host, port))
    except OSError as error:
        fault = f"--serve {port} --host {host}: {error.strerror}"
        raise UserError(f"{fault}; give another port or host") from error


def serve(stage: Stage, place: socket.socket, most: int) -> None:
    """Answers at `place` until it is told to stop."""
    host, port = place.getsockname()
    print(f"http://{host}:{port}/v1 answers as {', '.join(names_of(stage))}; Ctrl-C ends it")
    config = uvicorn.Config(make_app(stage, most), log_level="warning")
    uvicorn.Server(config).run(sockets=[place])
