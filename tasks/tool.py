"""T4: tool calling."""

import json
import re

from tasks.scores import parse_calls, same_calls, same_names
from tasks.source import Drop, Sample, Source, WrongShape, texts
from tasks.task import Task

TOOL_LINE = "You can call these functions:"


def tool_input(schemas: list) -> str:
    """What a tool-calling prompt says of the functions on offer; ValueError where it is no JSON."""
    listed = json.dumps(schemas, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return f"{TOOL_LINE}\n{listed}"


def tool_sample(request: str, tools, calls, history: str = "") -> Sample:
    """The one form of every tool-calling source: schemas in the input, a JSON list of calls out.

    Without the schemas the names could not be known and memory alone would be measured.
    """
    if not isinstance(tools, list) or not isinstance(calls, list):
        raise WrongShape("tools or calls are no list")
    if not calls:
        raise Drop("no call")
    names = [tool.get("name") for tool in tools if isinstance(tool, dict)]
    output = []
    for call in calls:
        match call:
            case {"name": str(name), "arguments": dict(arguments)}:
                output.append({"name": name, "arguments": arguments})
            case _:
                raise WrongShape("call is not readable")
        if name not in names:
            raise WrongShape("call of a function that is not offered")
    try:
        offered = tool_input(tools)
        answer = json.dumps(output, ensure_ascii=False, allow_nan=False)
        # An escape such as \ud83d alone decodes to what no UTF-8 file can hold.
        (offered + answer).encode()
    except (ValueError, RecursionError):
        raise WrongShape("tools or calls are no JSON") from None
    return Sample(request, f"{offered}\n\n{history}", answer)


def convert_xlam(row: dict) -> Sample:
    """Salesforce/xlam-function-calling-60k: answers and tools are JSON in strings."""
    query, answers, tools = texts(row, "query", "answers", "tools")
    try:
        return tool_sample(query, json.loads(tools), json.loads(answers))
    except (ValueError, RecursionError):
        raise WrongShape("tools or calls are no JSON") from None


def convert_glaive(row: dict) -> Sample:
    """glaiveai/glaive-function-calling-v2: a dialogue's first call and the message before it.

    What was said before that message of the user follows the schemas in the input.
    """
    system, chat = texts(row, "system", "chat")
    before, mark, after = chat.partition("<functioncall>")
    call = after.partition("<|endoftext|>")[0].strip()
    if not mark:
        raise Drop("no call")
    said = glaive_turns(before)
    # The call's own turn may open with words to the user.
    users = [i for i, (role, _) in enumerate(said) if role == "USER"]
    if not users:
        raise WrongShape("no user message before the call")
    history = "\n".join(f"{role}: {text}" for role, text in said[: users[-1]])
    return tool_sample(said[users[-1]][1], glaive_schemas(system), [glaive_call(call)], history)


def glaive_turns(chat: str) -> list[tuple[str, str]]:
    """(role, text) of each turn. Turns stand two blank lines apart: a label elsewhere was said."""
    turns: list[tuple[str, list[str]]] = []
    for piece in chat.split("\n\n\n"):
        label = re.match(r"(USER|ASSISTANT|FUNCTION RESPONSE):", piece.lstrip())
        if label:
            turns.append((label[1], [piece.lstrip()[label.end() :]]))
        elif turns:
            turns[-1][1].append(piece)
    said = ((role, "\n\n\n".join(pieces)) for role, pieces in turns)
    return [(role, text.replace("<|endoftext|>", "").strip()) for role, text in said]


def glaive_schemas(system: str) -> list[dict]:
    """The schemas in a system message: JSON objects that follow each other without commas."""
    decoder, schemas, position = json.JSONDecoder(), [], system.find("{")
    try:
        while position >= 0:
            schema, end = decoder.raw_decode(system, position)
            schemas.append(schema)
            position = system.find("{", end)
    except (ValueError, RecursionError):
        raise WrongShape("schemas are not readable") from None
    return schemas


def glaive_call(text: str) -> dict:
    """A call, whose arguments are JSON in single quotes: {"name": "f", "arguments": '{"a": 1}'}."""
    head = re.match(r'\{\s*"name":\s*"([^"]*)"\s*,\s*"arguments":', text)
    if not head or not text.endswith("}"):
        raise WrongShape("call is not readable")
    name, arguments = head[1], text[head.end() : -1].strip()
    if arguments[:1] == "'" == arguments[-1:]:
        arguments = arguments[1:-1].replace("\\'", "'")
    try:
        return {"name": name, "arguments": json.loads(arguments)}
    except (ValueError, RecursionError):
        raise WrongShape("call is not readable") from None


def judge_calls(row: dict, reply: str) -> dict[str, float]:
    """Only where the reference holds calls as we know them: a reply like it is right."""
    calls, reference = parse_calls(reply), parse_calls(row["output"])
    if reference is None:
        return {}
    return {
        "json": calls is not None,
        "names": same_names(calls, reference),
        "exact": same_calls(calls, reference),
    }


TASK = Task(
    "T4_tool",
    judge_calls,
    primary="exact",
    sources={
        "glaive": [
            Source("glaiveai/glaive-function-calling-v2", convert_glaive, license="apache-2.0")
        ],
        "xlam": [
            Source(
                "Salesforce/xlam-function-calling-60k", convert_xlam, "dataset", license="cc-by-4.0"
            )
        ],
    },
)
