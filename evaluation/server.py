"""A stage checkpoint at an address of this machine, as OpenAI's clients ask for chat completions.

The model's name in a request is the reading: `routed`, `latest`, `slow`, `own:TASK`, `fast:TASK`;
the answer's says whose branches gave it. Replies are greedy and come whole, as one piece where a
client wants a stream. One prompt is answered at a time, so the branches of two are never mixed.
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
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from configs.command_line import UserError
from configs.ending import is_out_of_memory
from evaluation.generate import answer_room, continue_prompt, prompt_samples
from evaluation.readings import READINGS, Stage, read_as, sources_of
from models.reading import parse_json
from tasks.own import OwnFile
from tasks.source import Drop

MOST_BYTES = 2**20
# What a client may say beside these is about sampling, tools or formats: refused, not ignored.
KNOWN = {"model", "messages", "max_tokens", "max_completion_tokens", "stream", "user", "seed"}
KNOWN |= {"stream_options"}
STREAM_OPTIONS = {"include_usage"}
GREEDY = {"temperature": 0, "top_p": 1, "n": 1, "frequency_penalty": 0, "presence_penalty": 0}


def names_of(stage: Stage) -> list[str]:
    """What a request may give as "model", the default first."""
    names = []
    # Checkpoints of the other tasks may have been left elsewhere.
    here = [task for task in stage.seen if stage.folder_of(task).is_dir()]
    for reading in stage.readings:
        of_reading = READINGS[reading]
        if of_reading.is_routed:
            can_route = stage.router.tasks and here == stage.seen
            names = [reading, *names] if can_route else names
        elif of_reading.own:
            names += [f"{reading}:{task}" for task in here]
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
    asked = {name: value for name, value in asked.items() if value is not None}
    if unknown := sorted(asked.keys() - KNOWN - GREEDY.keys()):
        raise HTTPException(400, f"not known here: {', '.join(unknown)}")
    for name, allowed in GREEDY.items():
        if asked.get(name, allowed) != allowed:
            raise HTTPException(400, f"{name}: replies are greedy, one at a time; leave it out")
    options = asked.get("stream_options", {})
    if not isinstance(options, dict) or options.keys() - STREAM_OPTIONS:
        raise HTTPException(400, f"stream_options: give {', '.join(STREAM_OPTIONS)} or nothing")
    names = names_of(stage)
    name = asked.get("model") or names[0]
    if name not in names:
        raise HTTPException(404, f"model: give one of {', '.join(names)}")
    limit = asked.get("max_completion_tokens", asked.get("max_tokens", most))
    if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
        raise HTTPException(400, "max_tokens: give a whole number from 1 on")
    template = stage.passes.template
    room, limit = answer_room(stage, min(limit, most))
    prompt = template.join(template.prompts([_row(asked.get("messages"))])[0], 10**9)
    if len(prompt) > room:
        raise HTTPException(400, f"messages: {len(prompt)} tokens; at most {room} can be read")
    reading, _, task = name.partition(":")
    return reading, task, prompt, limit


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


def as_stream(reply: dict, with_usage: bool = False) -> Response:
    """The reply as a stream of one piece, with one of its usage where the client wants it."""
    choice = reply["choices"][0]
    common = {name: reply[name] for name in ("id", "created", "model")}
    common["object"] = "chat.completion.chunk"
    pieces = [
        {**common, "choices": [{"index": 0, "delta": delta, "finish_reason": reason}]}
        for delta, reason in ((choice["message"], None), ({}, choice["finish_reason"]))
    ]
    if with_usage:
        pieces.append({**common, "choices": [], "usage": reply["usage"]})
    lines = [*map(json.dumps, pieces), "[DONE]"]
    text = "".join(f"data: {line}\n\n" for line in lines)
    return Response(text, media_type="text/event-stream")


def make_app(stage: Stage, most: int, host: str = "127.0.0.1") -> Starlette:
    """`most`: new tokens of a reply, whatever a request asks for; `host`: where it listens."""
    one_at_a_time = asyncio.Lock()
    is_here = host.startswith("127.") or host == "localhost"
    hosts = [host, "127.0.0.1", "localhost"] if is_here else ["*"]

    async def completions(request):
        if "origin" in request.headers:
            raise HTTPException(403, "a page in a browser asks: this is for programs")
        parts, size = [], 0
        async for part in request.stream():
            size += len(part)
            if size > MOST_BYTES:
                raise HTTPException(413, f"the body is larger than {MOST_BYTES} bytes")
            parts.append(part)
        try:
            asked = parse_json(b"".join(parts).decode(), "the body")
        except ValueError as error:
            raise HTTPException(400, str(error)) from None
        async with one_at_a_time:
            if await request.is_disconnected():
                return Response(status_code=499)
            try:
                reply = await run_in_threadpool(reply_to, stage, asked, most)
            except UserError as error:
                # A checkpoint that is gone, say: nothing that the client could mend.
                raise HTTPException(500, str(error)) from error
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                raise HTTPException(503, "the machine is out of memory") from error
        if not asked.get("stream"):
            return JSONResponse(reply)
        return as_stream(reply, bool((asked.get("stream_options") or {}).get("include_usage")))

    async def models(request):
        listed = [{"id": name, "object": "model", "owned_by": "local"} for name in names_of(stage)]
        return JSONResponse({"object": "list", "data": listed})

    async def refused(request, error):
        fault = {"message": error.detail, "type": "invalid_request_error", "code": None}
        return JSONResponse({"error": fault}, error.status_code, error.headers)

    return Starlette(
        routes=[
            Route("/v1/chat/completions", completions, methods=["POST"]),
            Route("/v1/models", models),
        ],
        exception_handlers={HTTPException: refused},
        # A name that a foreign page has let lead here would be another one.
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=hosts)],
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
    app = make_app(stage, most, host)
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)
    uvicorn.Server(config).run(sockets=[place])
