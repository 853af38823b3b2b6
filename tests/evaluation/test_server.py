"""A checkpoint behind OpenAI's address: each request gets the branches it asks for, alone."""

import builtins
import contextlib
import json
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx2
import huggingface_hub.constants
import pytest
import uvicorn
from helpers import errors, fail_at
from huggingface_hub import InferenceClient

import chat
import train_slsd_seq
from evaluation import server
from evaluation.generate import answer
from evaluation.readings import open_stage
from evaluation.server import MOST_BYTES, listening, make_app, names_of

TASKS = ["T1_general", "T2_math", "T3_code"]
PROMPT = "name the colour of 12 and 7"


@pytest.fixture
def stage(flags, make_config, tmp_path):
    short = {"task_order": TASKS, "max_steps_per_task": 2, "eval_samples_per_task": 1}
    # Rates at which a task's own branches change what the random model says.
    assert train_slsd_seq.main(flags(**short, lr_slow=0.05, lr_fast=0.3)) == 0
    return open_stage(make_config(**short), str(tmp_path / "checkpoints" / "seq_T3_code"))


@contextlib.contextmanager
def served(stage):
    """The address at which `stage` answers within the block."""
    with listening("127.0.0.1", 0) as place:
        runs = uvicorn.Server(uvicorn.Config(make_app(stage, 8), log_level="warning"))
        thread = threading.Thread(target=runs.run, kwargs={"sockets": [place]})
        thread.start()
        try:
            while not runs.started:
                time.sleep(0.01)
            yield "http://{}:{}/v1".format(*place.getsockname())
        finally:
            runs.should_exit = True
            thread.join()


def test_three_clients_at_once_get_each_its_own_branches(stage, monkeypatch):
    # The library's client is for the hub too.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    rows = [{"instruction": PROMPT, "input": ""}]
    expected = {task: answer(stage, "own", task, rows, 8)[0][0] for task in TASKS}
    assert len(set(expected.values())) == 3
    (routed,), (source,) = answer(stage, "routed", "", rows, 8)
    with served(stage) as address, ThreadPoolExecutor(3) as pool:

        def ask(model):
            client = InferenceClient(base_url=address)
            messages = [{"role": "user", "content": PROMPT}]
            return client.chat_completion(messages, model=model)

        answers = list(pool.map(ask, [f"own:{task}" for task in TASKS] * 4))
        for task, reply in zip(TASKS * 4, answers, strict=True):
            assert reply.choices[0].message.content == expected[task]
            assert reply.model == f"own:{task}" and reply.usage.completion_tokens <= 8
        by_default = httpx2.post(
            f"{address}/chat/completions",
            json={"messages": [{"role": "user", "content": PROMPT}]},
        ).json()
        assert by_default["model"] == f"routed:{source}"
        assert by_default["choices"][0]["message"]["content"] == routed
        listed = httpx2.get(f"{address}/models").json()["data"]
    assert [model["id"] for model in listed] == names_of(stage)
    assert names_of(stage)[0] == "routed" and "own:T2_math" in names_of(stage)


USER = [{"role": "user", "content": "hello"}]


REFUSALS = [
    (b"{", 400, "no JSON"),
    (b"[" * 100_000, 400, "nested too deeply"),
    (b'"' + b"x" * MOST_BYTES + b'"', 413, "larger than"),
    ([], 400, "no JSON object"),
    ({}, 400, "messages: give a list"),
    ({"messages": [{"role": "assistant", "content": "hello"}]}, 400, "must be a user's"),
    ({"messages": [{"role": "user", "content": 3}]}, 400, "no role or no text"),
    ({"messages": [{"role": "user", "content": "word " * 500}]}, 400, "tokens; at most 64"),
    ({"messages": USER, "model": "gpt-4"}, 404, "give one of routed, latest"),
    ({"messages": USER, "model": 3}, 404, "give one of routed, latest"),
    ({"messages": USER, "model": ["own"]}, 404, "give one of routed, latest"),
    ({"messages": USER, "temperature": 0.7}, 400, "temperature: replies are greedy"),
    ({"messages": USER, "n": 2}, 400, "n: replies are greedy"),
    ({"messages": USER, "max_tokens": 0}, 400, "max_tokens"),
    (b'{"messages": [{"role": "user", "content": "a\\ud800b"}]}', 400, "half a surrogate"),
    (b'{"messages": [], "\\ud800": 1}', 400, "half a surrogate"),
    ({"messages": USER, "max_tokens": -1}, 400, "max_tokens"),
    ({"messages": USER, "tools": []}, 400, "not known here: tools"),
    ({"messages": USER, "stream_options": {"pieces": 9}}, 400, "stream_options: give"),
]


def test_a_stream_is_one_piece_and_who_has_left_is_not_answered(stage, monkeypatch):
    asked = {"messages": [{"role": "user", "content": PROMPT}], "model": "latest"}
    with served(stage) as address:
        whole = httpx2.post(f"{address}/chat/completions", json=asked).json()
        client = httpx2.post(f"{address}/chat/completions", json=asked | {"stream": True})
        *pieces, last = client.text.strip().split("\n\n")
        first, end = (json.loads(piece.removeprefix("data: ")) for piece in pieces)
        assert last == "data: [DONE]" and end["choices"][0]["finish_reason"]
        assert first["choices"][0]["delta"] == whole["choices"][0]["message"]
        wants_usage = {"stream": True, "stream_options": {"include_usage": True}}
        client = httpx2.post(f"{address}/chat/completions", json=asked | wants_usage)
        usage = json.loads(client.text.strip().split("\n\n")[-2].removeprefix("data: "))
        assert usage["usage"] == whole["usage"] and usage["choices"] == []
        # Two wait behind one that takes long, and have left when it is their turn.
        answered, reply_to = [], server.reply_to

        def slowly(*args):
            answered.append(1)
            time.sleep(1)
            return reply_to(*args)

        monkeypatch.setattr(server, "reply_to", slowly)

        def ask_and_leave(seconds):
            with contextlib.suppress(httpx2.TimeoutException):
                httpx2.post(f"{address}/chat/completions", json=asked, timeout=seconds)

        with ThreadPoolExecutor(3) as pool:
            list(pool.map(ask_and_leave, [5, 0.3, 0.3]))
        assert len(answered) <= 2
    # The checkpoint of a task is gone.
    shutil.rmtree(stage.folder_of("T1_general"))
    assert names_of(stage)[0] == "latest" and "own:T1_general" not in names_of(stage)


def test_what_cannot_be_answered_is_a_clear_refusal(stage, monkeypatch):
    with served(stage) as address:
        chat_at = f"{address}/chat/completions"
        asked = {"messages": USER, "temperature": 0, "stop": None, "seed": 3}
        assert httpx2.post(chat_at, json=asked).status_code == 200
        # A page in a browser, of this machine or by a name that leads here.
        headers = {"origin": "http://127.0.0.1:8000"}
        assert httpx2.post(chat_at, json=asked, headers=headers).status_code == 403
        for path in ("chat/completions", "models"):
            reply = httpx2.get(f"{address}/{path}", headers={"host": "evil.example"})
            assert reply.status_code == 400
        reply = httpx2.get(chat_at)
        assert reply.status_code == 405 and "POST" in reply.headers["allow"]
        with monkeypatch.context() as patch:
            fault = RuntimeError("CUDA out of memory")
            fail_at(patch, server, "continue_prompt", 0, fault)
            assert httpx2.post(chat_at, json=asked).status_code == 503
        for body, status, said in REFUSALS:
            content = {"content": body} if isinstance(body, bytes) else {"json": body}
            reply = httpx2.post(f"{address}/chat/completions", **content)
            message = reply.json()["error"]["message"]
            assert (reply.status_code, said in message) == (status, True), message


def test_a_port_in_use_and_a_missing_library_are_one_line(flags, capsys, monkeypatch):
    with listening("127.0.0.1", 0) as place:
        port = place.getsockname()[1]
        assert chat.main([*flags(), "--serve", str(port)]) == 2
    assert "already in use" in (line := errors(capsys)[0]) and "another port" in line
    imported = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "evaluation" and args[2] == ("server",):
            raise ImportError("no module", name="starlette")
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert chat.main([*flags(), "--serve", "8000"]) == 2
    assert errors(capsys) == ["error: --serve needs starlette: pip install starlette uvicorn"]
