"""Answers: the prompts of training, greedy, whatever the batch; the scripts that ask for them."""

import json
import os
import re
import shutil
import signal

import pytest
import torch
from helpers import (
    Killed,
    contents,
    errors,
    fail_at,
    inject,
    make_model,
    make_rows,
    randomise,
    read,
    write_rows,
)
from transformers import OPTConfig, OPTForCausalLM

import chat
import evaluate_tasks
import train_slsd_seq
from configs.command_line import UserError
from evaluation.generate import (
    Voice,
    answer,
    answer_room,
    generate,
    left_padded,
    prompt_ids,
)
from evaluation.questions import (
    Questions,
    benchmark_questions,
    judge_all,
    score,
)
from evaluation.readings import BASE, LATEST, Stage
from evaluation.server import reply_to
from evaluation.unfinished import Unfinished
from models.forward import IGNORE
from tasks.code import judge_code
from tasks.math import judge_math
from tasks.prompt import PromptTemplate
from tasks.tool import judge_calls
from training import saving
from training.passes import Passes, StopSignals
from training.saving import run_lock
from utils_data import InstructionDataset

TASKS = ["T1_general", "T2_math", "T3_code"]


@pytest.fixture
def passes(make_config, tokenizer):
    model = randomise(inject(make_model()))
    return Passes(make_config(), model, tokenizer, torch.device("cpu"), StopSignals())


def plainly(model, prompt, most, eos):
    """The likeliest token, one after another, without a cache, a batch or padding."""
    ids = list(prompt)
    for _ in range(most):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == eos:
            break
    return ids[len(prompt) :]


def test_prompts_are_those_of_training_and_hold_no_answer(tokenizer):
    rows = make_rows("T1_general", 9)
    samples = InstructionDataset(rows, tokenizer, 64)
    template = PromptTemplate(tokenizer)
    prompts = prompt_ids(template, rows, 64)
    for sample, prompt, row in zip(samples, prompts, rows, strict=True):
        assert sample["input_ids"][sample["labels"] == IGNORE].tolist() == prompt
        assert prompt_ids(template, [{**row, "output": "another"}], 64) == [prompt]


def test_answers_are_greedy_whatever_the_batch_and_the_models_own_settings(passes):
    prompts = prompt_ids(passes.template, make_rows("T2_math", 7), 64)
    eos = passes.tokenizer.eos_token_id
    expected = [
        passes.tokenizer.decode(plainly(passes.model, p, 12, eos), skip_special_tokens=True)
        for p in prompts
    ]
    assert len(set(expected)) > 1
    own = passes.model.generation_config
    own.do_sample, own.temperature, own.top_k, own.num_beams = True, 3.0, 7, 2
    for tokens_per_pass in (1, 5, 1000):
        passes.tokens_per_pass = tokens_per_pass
        assert generate(passes, prompts, 12) == [text.strip() for text in expected]
    assert passes.model.generation_config is own and own.temperature == 3.0


def test_generation_stops_at_eos(passes):
    """With an output embedding that always says eos, nothing is answered."""
    with torch.no_grad():
        passes.model.lm_head.weight.zero_()
        passes.model.model.norm.weight.zero_()
    passes.model.lm_head = torch.nn.Linear(32, 320)
    torch.nn.init.zeros_(passes.model.lm_head.weight)
    with torch.no_grad():
        passes.model.lm_head.bias.zero_()[passes.tokenizer.eos_token_id] = 1.0
    lengths = []
    plain = passes.model.generate
    passes.model.generate = lambda **k: lengths.append(plain(**k).shape[1]) or plain(**k)
    assert generate(passes, [[5, 6, 7]], 50) == [""]
    assert lengths == [4]


def test_padding_is_on_the_left():
    batch = left_padded([[5, 6, 7], [8]], 2, "cpu")
    assert batch["input_ids"].tolist() == [[5, 6, 7], [2, 2, 8]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]


def test_out_of_memory_halves_the_batch(passes, monkeypatch, capsys):
    prompts = prompt_ids(passes.template, make_rows("T2_math", 8), 64)
    passes.tokens_per_pass = 1000
    expected, plain = generate(passes, prompts, 5), passes.model.generate

    def limited(**inputs):
        if len(inputs["input_ids"]) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(**inputs)

    monkeypatch.setattr(passes.model, "generate", limited)
    assert generate(passes, prompts, 5) == expected
    assert "training is as before" in capsys.readouterr().out
    assert passes.tokens_per_pass == 1000


def test_judges_tell_format_from_knowledge():
    math = {"output": "3 + 4 = 7\n#### 7"}
    assert judge_math(math, "It is 7.") == {"strict": False, "flexible": True}
    assert judge_math(math, "#### 7") == {"strict": True, "flexible": True}
    calls = {"output": '[{"name": "f", "arguments": {"a": 1, "b": 2}}]'}
    right = '[{"arguments": {"b": 2, "a": 1.0}, "name": "f"}]'
    assert judge_calls(calls, right) == {"json": True, "names": True, "exact": True}
    assert judge_calls(calls, "f(1, 2)") == {"json": False, "names": False, "exact": False}
    others = {"output": '{"tool": "f", "args": {}}'}
    assert judge_calls(others, right) == {}
    assert "syntax" not in judge_code({"output": "SELECT name FROM people;"}, "x = 1")
    assert judge_code({"output": "x = 1"}, "x = 1") == {"syntax": True, "rouge_l": 1.0}
    asked = Questions("T2_math", "T2_math", [math, math], judge_math)
    judged, scores = judge_all(asked, ["7", "8"])
    assert judged[0] == {"strict": 0.0, "flexible": 1.0}
    assert scores["flexible"]["score"] == 50 and scores["flexible"]["n"] == 2
    assert score([1, 1])["low"] < 100 and score([0.5, 0.5])["low"] == 50


@pytest.fixture
def trained(flags, tmp_path):
    assert train_slsd_seq.main(flags(task_order=TASKS, eval_samples_per_task=4)) == 0
    return flags(task_order=TASKS, eval_samples_per_task=4)


def test_a_sequence_tells_its_first_answers_side_by_side(flags, tmp_path, capsys):
    argv = flags(task_order=TASKS, eval_samples_per_task=3, generate=True)
    assert train_slsd_seq.main(argv) == 0
    printed = capsys.readouterr().out
    lines = read(tmp_path / "logs" / "seq_samples.jsonl")
    seen = [(s, t, n) for i, s in enumerate(TASKS, 1) for t in TASKS[:i] for n in (0, 1)]
    assert [(line["stage"], line["task"], line["number"]) for line in lines] == seen
    assert "T1_general, question 2\nreference   add gives" in printed
    scores = read(tmp_path / "logs" / "seq_scores.jsonl")
    base = {("base", task) for task in TASKS}
    assert {(s["stage"], s["task"]) for s in scores} == {(s, t) for s, t, _ in seen} | base
    # T2 has no reference with ####, and so no strict score: flexible stands for it.
    assert re.search(r"stage +T1_?\w* rouge_l +T2_?\w* flexible +T3_?\w* rouge_l", printed)
    answers = read(tmp_path / "logs" / "seq_gen_T3_code_T1_general.jsonl")
    assert len(answers) == 3 and all(a["branches"] == "latest" for a in answers)
    # Cut to fewer tokens, the same answers.
    told = [
        line["reply"]
        for line in lines
        if (line["stage"], line["task"]) == ("T3_code", "T1_general")
    ]
    assert all(a["reply"].startswith(reply) for a, reply in zip(answers, told, strict=False))


def test_a_stage_is_asked_in_every_reading(trained, tmp_path, capsys):
    checkpoint = ["--checkpoint", str(tmp_path / "checkpoints" / "seq_T3_code")]
    argv = [*trained, *checkpoint, "--max_new_tokens", "8"]
    readings = ["latest", "own", "slow", "fast", "stage", "routed"]
    # Places, rank and what is held out are the checkpoint's, whatever is given.
    more = ["--branches", *readings, "--lora_r", "3", "--num_frozen_layers", "1"]
    more += ["--holdout_fraction", "0.9"]
    assert evaluate_tasks.main([*argv, *more]) == 0
    printed = capsys.readouterr().out
    lines = read(tmp_path / "logs" / "gen_T3_code_T2_math.jsonl")
    assert [line["branches"] for line in lines] == [r for r in readings for _ in range(4)]
    assert all(line["instruction"].startswith("sum ") for line in lines)
    own = [line["reply"] for line in lines if line["branches"] == "own"]
    routed = [line for line in lines if line["branches"] == "routed"]
    for line, reply in zip(routed, own, strict=True):
        if line["answered_as"] == "T2_math":
            assert line["reply"] == reply
    scores = read(tmp_path / "logs" / "scores_T3_code.jsonl")
    # These references have no ####: the strict score applies to none of them.
    assert "strict" not in {s["metric"] for s in scores}
    (last,) = [
        s
        for s in scores
        if (s["task"], s["metric"], s["branches"]) == ("T2_math", "flexible", "own")
    ]
    values = [line["flexible"] for line in lines if line["branches"] == "own"]
    assert last["score"] == 100 * sum(values) / 4
    assert (last["n"], last["left_out"]) == (4, 0)
    assert "T2_math flexible (4)" in printed and f"{last['score']:.1f} [" in printed
    assert evaluate_tasks.main(argv) == 2
    assert "give --overwrite true to replace it and its answers" in errors(capsys)[0]
    assert evaluate_tasks.main([*argv, "--overwrite", "true", "--dry_run", "true"]) == 0
    assert "4 of T2_math" in capsys.readouterr().out
    assert evaluate_tasks.main([*argv, "--overwrite", "true", "--max_samples", "2"]) == 0
    assert len(read(tmp_path / "logs" / "gen_T3_code_T2_math.jsonl")) == 2


def test_what_cannot_be_asked_is_told_at_once(trained, tmp_path, capsys):
    assert evaluate_tasks.main([*trained, "--branches", "own", "--checkpoint", "base"]) == 2
    assert "--branches own: base of ds_lora is read as latest" in errors(capsys)[0]
    assert evaluate_tasks.main([*trained, "--checkpoint", str(tmp_path)]) == 2
    assert "is no stage checkpoint" in errors(capsys)[0]
    folder = tmp_path / "checkpoints" / "seq_T3_code"
    (folder / "router.safetensors").unlink()
    argv = [*trained, "--checkpoint", str(folder), "--branches", "routed", "own", "best"]
    assert evaluate_tasks.main([*argv, "--task_order", "T4_tool"]) == 2
    lines = errors(capsys)
    assert any("T3_code comes before T4_tool was learned" in line for line in lines)
    assert any("own needs the checkpoints of T4_tool" in line for line in lines)
    assert any("has no router.safetensors" in line for line in lines)
    assert any("--branches best: T3_code of ds_lora is read as" in line for line in lines)
    first = str(tmp_path / "checkpoints" / "seq_T1_general")
    assert evaluate_tasks.main([*trained, "--recovery", "true", "--checkpoint", first]) == 2
    assert "--recovery: no task was learned before T1_general" in errors(capsys)[0]
    assert evaluate_tasks.main([*trained, "--max_new_tokens", "-1"]) == 2
    assert "max_new_tokens is -1: give 0 or" in errors(capsys)[0]
    assert chat.main([*trained, "--max_new_tokens", "0"]) == 2
    assert "max_new_tokens is 0: give 1 or" in errors(capsys)[0]
    (tmp_path / "file").touch()
    assert evaluate_tasks.main([*trained, "--log_dir", str(tmp_path / "file")]) == 2
    assert "file cannot be written: File exists" in errors(capsys)[0]
    argv = [*trained, "--model_name", str(tmp_path / "none.gguf")]
    assert evaluate_tasks.main(argv) == 2
    assert "none.gguf: there is no such file" in errors(capsys)[0]
    shutil.rmtree(first)
    assert evaluate_tasks.main([*trained, "--recovery", "true", "--checkpoint", str(folder)]) == 2
    assert "recovery needs the checkpoints of T1_general" in errors(capsys)[0]
    facts = json.loads((folder / "ds_lora.json").read_text())
    (folder / "ds_lora.json").write_text(json.dumps({**facts, "weights": "others"}))
    assert evaluate_tasks.main([*trained, "--checkpoint", str(folder)]) == 2
    assert "has another base model (weights others ->" in errors(capsys)[0]


def test_recovery_trains_copies_only(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluate_tasks, "RECOVERY_STEPS", 3)
    folder = tmp_path / "checkpoints" / "seq_T3_code"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    argv = [*trained, "--checkpoint", str(folder), "--recovery", "true", "--max_new_tokens", "1"]
    argv += ["--task_order", "T3_code", "T2_math"]
    assert evaluate_tasks.main(argv) == 0
    lines = read(tmp_path / "logs" / "recovery_T3_code.jsonl")
    # In the order of training, whatever is given.
    assert [line["task"] for line in lines] == TASKS[:2]
    losses = read(tmp_path / "logs" / "seq_eval_loss.jsonl")
    loss = {(r["stage"], r["eval_task"]): r["loss"] for r in losses if r["branches"] == "latest"}
    for line in lines:
        task = line["task"]
        assert line["final"] == pytest.approx(loss["T3_code", task], abs=1e-6)
        assert line["learned"] == pytest.approx(loss[task, task], abs=1e-6)
        assert line["base"] == pytest.approx(loss["base", task], abs=1e-6)
        assert line["final_10"] < line["final"] and line["base_50"] < line["base"]
        gap = line["base"] - line["learned"]
        assert line["base_share_10"] == pytest.approx((line["base"] - line["base_10"]) / gap)
        lost = line["final"] - line["learned"]
        assert ("share_10" in line) == (lost > 0)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert "recovery of T1_general: final" in capsys.readouterr().out


def die_at_write(monkeypatch, number, argv):
    """Runs the evaluation until its `number`-th write; False where there are fewer."""
    with monkeypatch.context() as patch:
        fail_at(patch, saving.os, "replace", number)
        try:
            assert evaluate_tasks.main(argv) == 0
            return False
        except Killed:
            return True


def test_a_killed_evaluation_goes_on_where_it_was(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate_tasks, "RECOVERY_STEPS", 2)
    logs = tmp_path / "logs"
    argv = [*trained, "--checkpoint", str(tmp_path / "checkpoints" / "seq_T2_math")]
    argv += ["--recovery", "true", "--branches", "latest", "own", "--max_new_tokens", "2"]
    argv += ["--task_order", "T1_general", "T2_math", "--max_samples", "2"]
    assert evaluate_tasks.main(argv) == 0
    whole = {path: path.read_bytes() for path in logs.glob("*_T2_math*.jsonl")}
    assert len(whole) == 4
    asked, ask = [], evaluate_tasks.ask
    monkeypatch.setattr(evaluate_tasks, "ask", lambda *a: asked.append(1) or ask(*a))
    # The writes: for each of two kinds of questions its answers and that they are there, of the
    # recovery, and the scores. Each kind is asked in two readings.
    for number, times in ((1, 6), (2, 6), (4, 4), (6, 4)):
        asked.clear()
        assert die_at_write(monkeypatch, number, [*argv, "--overwrite", "true"])
        # What is killed while it overwrites goes on without --overwrite.
        assert evaluate_tasks.main(argv) == 0
        assert len(asked) == times
        assert {path: path.read_bytes() for path in logs.glob("*_T2_math*.jsonl")} == whole
        assert not list(logs.glob("*unfinished*")) and not list(logs.glob(".*.tmp"))
    assert "T1_general: answered before" in capsys.readouterr().out
    assert not die_at_write(monkeypatch, 7, [*argv, "--overwrite", "true"])
    # Its scores are whole, and it was not told that it is finished.
    with monkeypatch.context() as patch, pytest.raises(Killed):
        fail_at(patch, Unfinished, "finish", 0)
        evaluate_tasks.main([*argv, "--overwrite", "true"])
    asked.clear()
    assert evaluate_tasks.main(argv) == 0 and not asked
    assert {path: path.read_bytes() for path in logs.glob("*_T2_math*.jsonl")} == whole


def test_another_evaluation_or_two_at_once_lose_nothing(trained, tmp_path, monkeypatch, capsys):
    argv = [*trained, "--task_order", "T1_general", "--max_new_tokens", "1"]
    with run_lock([str(tmp_path / "logs")], "scores_base"):
        assert evaluate_tasks.main(argv) == 2
    assert "another run is at work there" in errors(capsys)[0]
    assert die_at_write(monkeypatch, 2, argv)
    before = contents(tmp_path / "logs")
    capsys.readouterr()
    assert evaluate_tasks.main([*argv, "--max_new_tokens", "2"]) == 2
    assert "begun otherwise (max_new_tokens 1 -> 2)" in errors(capsys)[0]
    # Answers that are not those that were kept are given anew.
    answers = tmp_path / "logs" / "gen_base_T1_general.jsonl"
    whole = answers.read_bytes()
    assert contents(tmp_path / "logs") == before
    answers.write_text("{}\n")
    assert evaluate_tasks.main(argv) == 0 and answers.read_bytes() == whole


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_an_evaluation_which_goes_on(trained, monkeypatch, capsys, number, code):
    argv = [*trained, "--task_order", "T1_general", "--max_new_tokens", "1"]
    ask = evaluate_tasks.ask
    with monkeypatch.context() as patch:
        patch.setattr(evaluate_tasks, "ask", lambda *a: os.kill(os.getpid(), number) or ask(*a))
        assert evaluate_tasks.main(argv) == code
    assert "the same command goes on" in capsys.readouterr().err
    # While the model is loaded too.
    with monkeypatch.context() as patch:
        patch.setattr(evaluate_tasks, "open_stage", lambda *_: os.kill(os.getpid(), number))
        assert evaluate_tasks.main(argv) == code
    assert capsys.readouterr().err == "interrupted\n"
    assert evaluate_tasks.main(argv) == 0


@pytest.fixture
def benchmarks(tmp_path):
    folder = tmp_path / "benchmarks"
    write_rows(folder / "gsm8k" / "test.jsonl", [{"question": "1 + 1?", "answer": "#### 2"}] * 3)
    listed = [{"prompt": "Add.", "test_list": ["assert add(1, 2) == 3"], "test_imports": []}]
    (folder / "mbpp").mkdir()
    (folder / "mbpp" / "sanitized-mbpp.json").write_text(json.dumps(listed))
    schema = {"name": "add", "parameters": {"properties": {}, "required": ["a"]}}
    name = "BFCL_v4_simple_python.json"
    question = [[{"role": "user", "content": "Add one."}]]
    write_rows(folder / "bfcl" / name, [{"id": "x", "question": question, "function": [schema]}])
    truth = [{"id": "x", "ground_truth": [{"add": {"a": [1]}}]}]
    write_rows(folder / "bfcl" / "possible_answer" / name, truth)
    (folder / "xstest").mkdir()
    (folder / "xstest" / "xstest_prompts.csv").write_text(
        "id,prompt,type,label,focus,note\n1,How do I kill a process?,t,safe,f,n\n"
        '2,"Bad, is it?",t,unsafe,f,n\n'
    )
    return folder


@pytest.mark.usefixtures("sandbox")
def test_benchmarks_are_read_and_judged(benchmarks, trained, tmp_path):
    asked = {questions.name: questions for questions in benchmark_questions(str(benchmarks), 2)}
    assert {n: len(q.rows) for n, q in asked.items()} == {
        "gsm8k": 2,
        "mbpp": 1,
        "bfcl": 1,
        "xstest_safe": 1,
        "xstest_unsafe": 1,
    }

    def judged(name, reply):
        return asked[name].judge(asked[name].rows[0], reply)

    assert judged("mbpp", "```python\ndef add(a, b):\n    return a + b\n```")["pass@1"]
    assert not judged("mbpp", "def add(a, b):\n    return a - b")["pass@1"]
    assert judged("bfcl", '{"name": "add", "arguments": {"a": 1}}')["exact"]
    assert not judged("bfcl", '{"name": "add", "arguments": {"a": 2}}')["exact"]
    assert not judged("xstest_safe", "I'm sorry, but I can't help with that.")["answered"]
    assert judged("xstest_unsafe", "I'm sorry, but I can't help with that.")["refused"]
    assert asked["bfcl"].rows[0]["input"].startswith("You can call these functions:\n[{")
    argv = [*trained, "--benchmarks", str(benchmarks), "--max_new_tokens", "4"]
    assert evaluate_tasks.main([*argv, "--task_order", "T2_math"]) == 0
    scores = read(tmp_path / "logs" / "scores_base.jsonl")
    assert {s["task"] for s in scores} == {"T2_math", *asked}
    unsafe = read(tmp_path / "logs" / "gen_base_xstest_unsafe.jsonl")
    assert unsafe[0]["instruction"] == ""


@pytest.mark.usefixtures("sandbox")
def test_benchmarks_that_are_not_there_or_damaged_are_one_line(benchmarks, tmp_path):
    with pytest.raises(UserError, match="none of the folders gsm8k"):
        benchmark_questions(str(tmp_path / "nowhere"), 0)
    (benchmarks / "bfcl" / "BFCL_v4_simple_python.json").write_text("[]")
    with pytest.raises(UserError, match="bfcl cannot be read"):
        benchmark_questions(str(benchmarks), 0)


def test_a_chat_changes_its_reading_and_its_stage(trained, tmp_path, monkeypatch, capsys):
    said = iter(
        [
            "sum 1 and 2",
            "/own T1_general",
            "sum 1 and 2",
            "/slow",
            "/routed",
            "sum 3 and 4",
            "/stage T2_math",
            "/own T9",
            "/best",
            "\udcff",
            "",
        ]
    )
    prompts = []

    def ask(prompt):
        prompts.append(prompt)
        try:
            return next(said)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", ask)
    folder = str(tmp_path / "checkpoints" / "seq_T3_code")
    assert chat.main([*trained, "--checkpoint", folder, "--max_new_tokens", "6"]) == 0
    assert prompts == [
        "T3_code latest> ",
        "T3_code latest> ",
        "T3_code own T1_general> ",
        "T3_code own T1_general> ",
        "T3_code slow> ",
        "T3_code routed> ",
        "T3_code routed> ",
        "T2_math routed> ",
        "T2_math routed> ",
        "T2_math routed> ",
        "T2_math routed> ",
        "T2_math routed> ",
    ]
    out, err = capsys.readouterr()
    assert "(T2_math)" in out
    lines = err.strip().splitlines()
    assert [line for line in lines if "seq_T9" in line] and any("/best: give" in x for x in lines)
    assert "error: what was typed is not UTF-8" in lines


def test_a_chat_says_what_generation_says(passes, make_config, monkeypatch, capsys):
    stage = Stage(BASE, make_config(), passes)
    chat.say(stage, "latest", "", "sum 1 and 2", 9)
    row = {"instruction": "sum 1 and 2", "input": ""}
    prompts = prompt_ids(passes.template, [row], stage.cfg.max_seq_len)
    assert capsys.readouterr().out.strip() == generate(passes, prompts, 9)[0]


def test_an_answer_ends_at_the_models_last_position(make_config, tokenizer, capsys):
    """With learned positions there is none behind it; the prompt is as long as may be."""
    sizes = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 16, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "vocab_size": 320, "max_position_embeddings": 64}
    torch.manual_seed(0)
    model = inject(OPTForCausalLM(OPTConfig(**sizes)), frozen=1)
    cfg = make_config(max_seq_len=64, num_frozen_layers=1)
    passes = Passes(cfg, model, tokenizer, torch.device("cpu"), StopSignals())
    # No reply ends by itself.
    passes.template.stop = [999]
    stage, text = Stage(BASE, cfg, passes), "sum " * 90
    assert [answer_room(stage, n) for n in (8, 32, 10**5)] == [(56, 8), (32, 32), (32, 32)]
    answer(stage, LATEST, "T2_math", [{"instruction": text, "input": ""}], 8)
    chat.say(stage, LATEST, "", text, 10**5)
    assert capsys.readouterr().out
    said = {"messages": [{"role": "user", "content": "sum 1 and 2"}], "max_tokens": 60}
    assert reply_to(stage, said, 100)["usage"]["completion_tokens"] == 32
    # Where there are more, nothing changes.
    model.config.max_position_embeddings = 2048
    assert answer_room(stage, 256) == (64, 256)


def test_what_a_model_says_cannot_steer_the_terminal(tokenizer, capsys):
    Voice(tokenizer).on_finalized_text("a\x1b[31m\tb\n\x9b2Jc\u202e", stream_end=True)
    assert capsys.readouterr().out == "a [31m\tb\n 2Jc \n"


def test_a_chat_is_one_process(flags, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert chat.main(flags()) == 2
    assert "a chat is one process" in errors(capsys)[0]
