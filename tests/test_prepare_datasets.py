"""Each trap of the source sets, on rows written by hand in their schema."""

import contextlib
import gzip
import json
import os
import shutil
from pathlib import Path

import pytest
from helpers import Killed, command, contents, errors, fail_at

import prepare_datasets
from configs.base_config import TASKS
from tasks.general import convert_alpaca, convert_dolly
from tasks.math import convert_gsm8k
from tasks.safety import convert_hh
from tasks.source import Drop, WrongShape
from tasks.tool import convert_glaive, convert_xlam
from training.saving import file_sha256
from utils_data import read_jsonl

SCHEMA = {
    "name": "find_train",
    "description": "Finds a train",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}
SYSTEM = "SYSTEM: You can use these functions -\n" + json.dumps(SCHEMA, indent=4) + "\n"


def alpaca(i, given="", **changes):
    row = {
        "instruction": f"Name {i} colours.",
        "input": given,
        "output": f"Colour {i}.",
        "text": "",
    }
    return {**row, **changes}


def dolly(i):
    return {
        "instruction": f"Who is {i}?",
        "context": "",
        "response": f"Person {i}.",
        "category": "x",
    }


def hh(*turns):
    roles = ("Human", "Assistant")
    text = "".join(f"\n\n{roles[i % 2]}: {turn}" for i, turn in enumerate(turns))
    return {"chosen": text, "rejected": text + " no"}


def glaive(*said, system=SYSTEM):
    return {"system": system, "chat": "\n\n\n".join(said)}


CALL = (
    """ASSISTANT: <functioncall> {"name": "find_train", "arguments": '{"city": "Bonn"}'} """
    "<|endoftext|>"
)


@pytest.fixture
def raw(tmp_path):
    """A folder laid out like the hub: the five tasks' sets with a few rows each."""
    root = tmp_path / "raw"

    def put(hub_id, name, data, config="default"):
        folder = root / hub_id
        (folder / name).parent.mkdir(parents=True)
        readme = (
            f"configs:\n- config_name: {config}\n  data_files:\n  - split: train\n    path: {name}"
        )
        (folder / "README.md").write_text(f"---\n{readme}\n---\n")
        (folder / name).write_bytes(data)

    def lines(rows):
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()

    put("tatsu-lab/alpaca", "train.jsonl", lines(alpaca(i) for i in range(30)))
    put("databricks/databricks-dolly-15k", "train.jsonl", lines(dolly(i) for i in range(10)))
    answers = ({"question": f"Add {i}?", "answer": f"Easy.\u2028So\n#### {i}"} for i in range(5))
    put("openai/gsm8k", "main/train.jsonl", lines(answers), "main")
    shared = [alpaca(3), alpaca(99, output="\n    return 1\n")]
    put("sahil2801/CodeAlpaca-20k", "code.json", json.dumps(shared).encode())
    chats = [glaive(f"USER: Train {i}?", CALL) for i in range(3)] + [
        glaive("USER: Hi", "ASSISTANT: Hi")
    ]
    put("glaiveai/glaive-function-calling-v2", "train.json", json.dumps(chats).encode())
    dialogues = [hh("Hi", "Yes?", f"Question {i}", f"Reply {i}") for i in range(2)]
    dialogues += [hh("Hello", "Reply")]
    put("Anthropic/hh-rlhf", "harmless-base/train.jsonl.gz", gzip.compress(lines(dialogues)))
    return root


@pytest.fixture
def run(raw, tmp_path, capsys):
    def prepare(*argv):
        where = ["--raw_dir", str(raw), "--data_dir", str(tmp_path / "data")]
        return prepare_datasets.main([*where, *argv])

    return prepare


def reason(convert, row, kind=Drop):
    with pytest.raises(kind) as caught:
        convert(row)
    return str(caught.value)


@pytest.mark.parametrize(
    "spelling",
    [
        "No input",
        "<noinput>",
        "< noinput >",
        '"<no input>"',
        "`<noinput>`.",
        "Noinput.",
        "N/A",
        "",
        " ",
    ],
)
def test_spellings_of_an_empty_input(spelling):
    assert convert_alpaca(alpaca(1, spelling)).input == ""


@pytest.mark.parametrize(
    "given",
    # Signs alone are an input: Morse code, brackets to balance, an operator, a picture.
    ["No input devices work", "none of them", "Input: 2", "no", "... --- ...", "({[]})", "+", "😀"],
)
def test_real_inputs_stay(given):
    assert convert_alpaca(alpaca(1, given)).input == given


def test_empty_outputs_and_wrong_shapes_are_dropped_by_reason():
    assert reason(convert_alpaca, alpaca(1, output=" \n")) == "empty output"
    assert reason(convert_alpaca, alpaca(1, instruction=" ")) == "empty instruction"
    assert "column input" in reason(convert_alpaca, {"instruction": "a"}, WrongShape)
    assert "column output" in reason(convert_alpaca, alpaca(1, output=3), WrongShape)
    assert reason(convert_alpaca, alpaca(1, output=None)) == "empty output"
    assert reason(convert_alpaca, None, WrongShape) == "empty row"


def test_indented_code_keeps_its_first_line_in_place():
    assert (
        convert_alpaca(alpaca(1, output="\n\n    x = 1\n    y = 2  \n")).output
        == "    x = 1\n    y = 2"
    )


def test_dolly_context_is_the_input_and_citation_marks_go():
    row = {
        **dolly(1),
        "context": "Rome fell.[3][12] In 476[4]\nlist = [1]",
        "response": "In 476.[4]",
    }
    sample = convert_dolly(row)
    assert (sample.input, sample.output) == ("Rome fell. In 476\nlist = [1]", "In 476.")
    # Marks count from 1: a subscript of 0 is code.
    assert convert_dolly({**dolly(1), "response": "word[0]"}).output == "word[0]"


def test_gsm8k_notes_go_and_the_answer_stays():
    answer = "He has 48/2 = <<48/2=24>>24.\nSo $<<1000*2=2000>>2,000.\n#### 2,000"
    sample = convert_gsm8k({"question": " How many? ", "answer": answer})
    assert sample.output == "He has 48/2 = 24.\nSo $2,000.\n#### 2,000"
    assert (sample.instruction, sample.input) == ("How many?", "")
    assert convert_gsm8k({"question": "q", "answer": "x\n#### -3"}).output.endswith("#### -3")
    assert "####" in reason(convert_gsm8k, {"question": "q", "answer": "no answer"}, WrongShape)


def test_xlam_strings_become_schemas_and_calls():
    calls = [{"name": "find_train", "arguments": {"city": "Köln"}}] * 2
    row = {"id": 1, "query": "Trains?", "tools": json.dumps([SCHEMA]), "answers": json.dumps(calls)}
    sample = convert_xlam(row)
    line, schemas = sample.input.split("\n")
    assert line == "You can call these functions:"
    assert schemas == json.dumps([SCHEMA], separators=(",", ":"))
    assert json.loads(sample.output) == calls and "Köln" in sample.output
    assert reason(convert_xlam, {**row, "answers": "[]"}) == "no call"
    assert "not offered" in reason(convert_xlam, {**row, "tools": "[]"})
    assert "no JSON" in reason(convert_xlam, {**row, "answers": "[{"}, WrongShape)


@pytest.mark.parametrize(
    "broken",
    [
        {"answers": '[{"name": {}, "arguments": {}}]'},
        {"answers": '[{"arguments": {}}]'},
        {"answers": '[{"name": "find_train", "arguments": "x"}]'},
        {"answers": '["find_train"]'},
        {"answers": '{"name": "find_train"}'},
        {"tools": '[{"name": ["find_train"]}, "x"]'},
        # What json.loads takes but no JSON line in UTF-8 can hold.
        {"answers": '[{"name": "find_train", "arguments": {"city": NaN}}]'},
        {"answers": '[{"name": "find_train", "arguments": {"city": "\\ud83d"}}]'},
        {"answers": '[{"name": "find_train", "arguments": {"n": %s}}]' % ("9" * 5000)},
    ],
)
def test_a_malformed_call_is_dropped_and_does_not_stop_the_task(broken):
    call = {"name": "find_train", "arguments": {"city": "Bonn"}}
    row = {"query": "Trains?", "tools": json.dumps([SCHEMA]), "answers": json.dumps([call])}
    assert convert_xlam(row).output == json.dumps([call])
    assert reason(convert_xlam, {**row, **broken}, WrongShape)


def test_glaive_pairs_a_call_with_the_user_message_before_it():
    row = glaive(
        "USER: Hello, I travel.",
        "ASSISTANT: Where to? <|endoftext|>",
        "USER: To Bonn.",
        CALL,
        'FUNCTION RESPONSE: {"train": 3}',
        "ASSISTANT: Train 3. <|endoftext|>",
        "USER: Thanks!",
    )
    sample = convert_glaive(row)
    assert sample.instruction == "To Bonn."
    assert sample.input.endswith("\n\nUSER: Hello, I travel.\nASSISTANT: Where to?")
    assert json.loads(sample.output) == [{"name": "find_train", "arguments": {"city": "Bonn"}}]


def test_glaive_quotes_and_schemas_without_commas():
    second = {**SCHEMA, "name": "say"}
    call = CALL.replace("find_train", "say")
    call = call.replace('{"city": "Bonn"}', r'{"text": "it\'s {5}"}')
    row = glaive("USER: Say it", call, system=SYSTEM + json.dumps(second, indent=4) + "\n\n")
    sample = convert_glaive(row)
    assert json.loads(sample.output) == [{"name": "say", "arguments": {"text": "it's {5}"}}]
    assert json.loads(sample.input.split("\n")[1]) == [SCHEMA, second]
    assert reason(convert_glaive, glaive("USER: Hi", "ASSISTANT: No.")) == "no call"
    broken = CALL.replace('"Bonn"', "Bonn")
    assert "not readable" in reason(convert_glaive, glaive("USER: Hi", broken), WrongShape)


def test_hh_takes_the_last_reply_and_the_turns_before_it():
    sample = convert_hh(
        hh("Is Assistant: a word?", "Yes.", " And Human: too? ", "It is, Assistant: too.")
    )
    assert sample.instruction == "And Human: too?"
    assert sample.input == "Human: Is Assistant: a word?\n\nAssistant: Yes."
    assert sample.output == "It is, Assistant: too."
    assert convert_hh(hh("Hi", "Hello")).input == ""


def test_hh_rejects_what_is_no_dialogue():
    assert reason(convert_hh, hh("Hi", " ")) == "empty output"
    assert "made-up" in reason(convert_hh, hh("Hi", "Yes. Human: more?"))
    assert "made-up" in reason(convert_hh, hh("Hi", "Yes.", "More?"))
    twice = {"chosen": "\n\nHuman: a\n\nHuman: b\n\nAssistant: c"}
    assert reason(convert_hh, twice) == "turns do not alternate"
    assert reason(convert_hh, hh("Hi", " ", "Well?", "Yes.")) == "empty turn"
    assert reason(convert_hh, {"chosen": "Just text"}, WrongShape) == "no dialogue"


def test_all_five_tasks_and_a_manifest_that_adds_up(run, tmp_path):
    assert run() == 0
    full = tmp_path / "data" / "full"
    manifest = json.loads((full / "manifest.json").read_text())
    assert list(manifest) == list(TASKS)
    for task, entry in manifest.items():
        rows = read_jsonl(full / f"{task}_full.jsonl")
        assert len(rows) == entry["written"]
        assert entry["rows_read"] == entry["written"] + sum(entry["dropped"].values())
        assert entry["sha256"] == file_sha256(full / f"{task}_full.jsonl")
        assert set(entry["from"].values()) == {"raw"}
    assert manifest["T4_tool"]["dropped"] == {"no call": 1}
    # One row for each first Human turn: near-duplicates must not straddle the held-out split.
    assert manifest["T5_safety"]["dropped"] == {"duplicate": 1}
    # A row of T3 that stands in T1 is dropped.
    assert manifest["T3_code"]["dropped"] == {"also in T1_general": 1}
    assert read_jsonl(full / "T3_code_full.jsonl")[0]["output"] == "    return 1"
    assert any("\u2028" in row["output"] for row in read_jsonl(full / "T2_math_full.jsonl"))
    assert str(tmp_path) not in (full / "manifest.json").read_text()


def test_the_order_mixes_the_sources_and_is_that_of_the_seed(run, tmp_path):
    def rows(*argv):
        assert run("--tasks", "T1_general", "--overwrite", *argv) == 0
        return read_jsonl(tmp_path / "data/full/T1_general_full.jsonl")

    first = rows()
    file = tmp_path / "data/full/T1_general_full.jsonl"
    written = file.read_bytes()
    assert rows() == first and file.read_bytes() == written
    assert rows("--seed", "1") != first
    assert sorted(map(str, rows())) == sorted(map(str, first))
    few = rows("--max_samples_per_task", "16")
    assert few == first[:16]
    assert 1 <= sum(row["instruction"].startswith("Who") for row in few) <= 9
    manifest = json.loads((tmp_path / "data/full/manifest.json").read_text())
    assert manifest["T1_general"]["dropped"] == {"beyond max_samples_per_task": 24}


def test_t1_spares_the_t3_file_that_is_there(run, tmp_path):
    assert run("--tasks", "T3_code") == 0 == run("--tasks", "T1_general")
    manifest = json.loads((tmp_path / "data/full/manifest.json").read_text())
    assert manifest["T3_code"]["written"] == 2
    assert manifest["T1_general"]["dropped"] == {"also in T3_code": 1}
    # A T3 file that is about to be replaced has no say: the result is that of a fresh folder.
    assert run("--tasks", "T1_general", "T3_code", "--overwrite") == 0
    manifest = json.loads((tmp_path / "data/full/manifest.json").read_text())
    assert manifest["T1_general"]["dropped"] == {}
    assert manifest["T3_code"]["dropped"] == {"also in T1_general": 1}


def test_a_duplicate_has_both_instruction_and_input(run, raw, tmp_path):
    rows = [alpaca(1, "a"), alpaca(1, "b"), alpaca(1, " a\n", output="Another answer.")]
    (raw / "sahil2801/CodeAlpaca-20k/code.json").write_text(json.dumps(rows))
    assert run("--tasks", "T3_code") == 0
    written = read_jsonl(tmp_path / "data/full/T3_code_full.jsonl")
    assert sorted(row["input"] for row in written) == ["a", "b"]


def test_only_the_harmless_part_of_hh_is_read(run, raw, tmp_path):
    folder = raw / "Anthropic/hh-rlhf"
    (folder / "README.md").unlink()
    (folder / "helpful-base").mkdir()
    other = json.dumps(hh("How do I bake?", "With flour.")).encode()
    (folder / "helpful-base/train.jsonl.gz").write_bytes(gzip.compress(other))
    assert run("--tasks", "T5_safety") == 0
    manifest = json.loads((tmp_path / "data/full/manifest.json").read_text())
    assert manifest["T5_safety"]["rows_read"] == 3


@pytest.mark.parametrize(("limit", "longest"), [(24, 24), (23, 18)])
def test_long_rows_are_dropped_not_cut(run, tmp_path, limit, longest):
    assert run("--tasks", "T1_general", "--max_chars", str(limit)) == 0
    entry = json.loads((tmp_path / "data/full/manifest.json").read_text())["T1_general"]
    rows = read_jsonl(tmp_path / "data/full/T1_general_full.jsonl")
    assert entry["dropped"]["longer than max_chars"] > 0
    # "Name 3 colours." and "Colour 3." are 24 together, the next shorter rows are Dolly's.
    assert max(sum(map(len, row.values())) for row in rows) == longest


def test_what_is_there_is_not_replaced_without_leave(run, tmp_path, capsys):
    assert run("--tasks", "T2_math") == 0
    file = tmp_path / "data/full/T2_math_full.jsonl"
    file.write_text("mine")
    capsys.readouterr()
    assert run("--tasks", "T2_math", "T5_safety") == 2
    (line,) = errors(capsys)
    assert "T2_math_full.jsonl exists: give --overwrite" in line
    assert file.read_text() == "mine" and not (file.parent / "T5_safety_full.jsonl").exists()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("main/train.jsonl", "hello"),
        ("main/train.jsonl", ""),
        ("gsm8k.py", "raise SystemExit(3)\n"),
        ("README.md", "---\nconfigs: !!python/object/apply:os.system ['exit 3']\n---\n"),
    ],
)
def test_a_set_that_its_library_cannot_read_is_one_line(run, raw, capsys, name, text):
    (raw / "openai/gsm8k" / name).write_text(text)
    assert run("--tasks", "T2_math") == 2
    (line,) = errors(capsys)
    assert "openai/gsm8k cannot be read" in line and "mend or remove" in line


@pytest.mark.parametrize("text", ['{"T2_math": []}', '{"T2_math": {}}', "[]", "[" * 100_000])
def test_a_manifest_that_is_none_is_one_line(run, tmp_path, capsys, text):
    folder = tmp_path / "data/full"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(text)
    assert run("--tasks", "T2_math") == 2
    assert "manifest.json is no manifest: remove it" in errors(capsys)[-1]


def test_a_set_that_has_changed_its_form_is_an_error(run, raw, tmp_path, capsys):
    rows = [{"question": "q", "answer": "#### 1"}] + [{"question": "q", "answer": "none"}] * 2
    (raw / "openai/gsm8k/main/train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert run("--tasks", "T2_math") == 2
    (line,) = errors(capsys)
    assert "T2_math: 3 rows of openai/gsm8k gave 1 samples" in line
    assert not (tmp_path / "data/full/T2_math_full.jsonl").exists()


def test_mostly_faulty_rows_are_an_error_but_rows_without_a_call_are_not(run, raw, capsys):
    def write(hub_id, name, rows):
        (raw / hub_id / name).write_text("\n".join(map(json.dumps, rows)))

    code = "sahil2801/CodeAlpaca-20k"
    write(code, "code.json", [alpaca(1), alpaca(2, output=""), alpaca(3, output="")])
    assert run("--tasks", "T3_code") == 2
    assert "3 rows of sahil2801/CodeAlpaca-20k gave 1 samples" in errors(capsys)[0]
    write(code, "code.json", [alpaca(1), alpaca(2, output="")])
    assert run("--tasks", "T3_code") == 0
    small_talk = [glaive(f"USER: Hi {i}", "ASSISTANT: Hi") for i in range(3)]
    write(
        "glaiveai/glaive-function-calling-v2", "train.json", [glaive("USER: Go", CALL), *small_talk]
    )
    assert run("--tasks", "T4_tool") == 0


def test_the_table_says_what_was_read_dropped_and_written(run, capsys):
    assert run("--tasks", "T4_tool", "T2_math") == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["task", "read", "dropped", "written", "reasons"]
    assert [line.split(maxsplit=4) for line in lines] == [
        ["T2_math", "5", "0", "5"],
        ["T4_tool", "4", "1", "3", "1 no call"],
    ]


def test_tasks_not_asked_for_keep_their_entry_in_the_manifest(run, tmp_path, capsys):
    manifest = tmp_path / "data/full/manifest.json"
    assert run("--tasks", "T2_math") == 0
    entry = json.loads(manifest.read_text())["T2_math"]
    assert run("--tasks", "T4_tool", "--seed", "1") == 0
    assert json.loads(manifest.read_text())["T2_math"] == entry
    for broken in ("{", "3"):
        manifest.write_text(broken)
        capsys.readouterr()
        assert run("--tasks", "T5_safety") == 2
        assert "manifest.json is no manifest: remove it" in errors(capsys)[0]
    manifest.unlink()
    # Reading it would wait for ever.
    os.mkfifo(manifest)
    assert run("--tasks", "T5_safety") == 2
    assert "manifest.json is no manifest: remove it" in errors(capsys)[0]


def test_an_unreadable_t1_file_leaves_the_other_tasks_whole(run, tmp_path, capsys):
    full = tmp_path / "data/full"
    full.mkdir(parents=True)
    (full / "T1_general_full.jsonl").write_text("mine")
    assert run("--tasks", "T3_code", "T5_safety") == 2
    (line,) = errors(capsys)
    assert "T1_general_full.jsonl, line 1" in line
    assert (full / "T5_safety_full.jsonl").exists()
    assert not (full / "T3_code_full.jsonl").exists()


def test_a_folder_that_cannot_be_written_is_one_line(run, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert run("--tasks", "T2_math", "--data_dir", str(tmp_path / "file")) == 2
    (line,) = errors(capsys)
    assert "cannot be written" in line


def test_the_command_line_itself_refuses_an_unknown_option():
    result = command("prepare_datasets.py", "--tool", "xlam")
    assert (result.returncode, result.stdout) == (2, "")
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: unknown option --tool")


def test_one_source_that_fails_leaves_the_others_whole(raw, tmp_path):
    for file in sorted((raw / "databricks").rglob("*"), reverse=True):
        file.unlink() if file.is_file() else file.rmdir()
    (raw / "databricks").rmdir()
    argv = ["--raw_dir", raw, "--data_dir", tmp_path / "data"]
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    result = command("prepare_datasets.py", *map(str, argv), **environment)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: databricks/databricks-dolly-15k cannot be read")
    assert "HF_ENDPOINT" in line and "--raw_dir" in line
    names = sorted(path.name for path in (tmp_path / "data/full").glob("*.jsonl"))
    assert names == [f"{task}_full.jsonl" for task in TASKS[1:]]


def test_a_run_that_was_interrupted_goes_on(run, raw, tmp_path, capsys, monkeypatch):
    def fail(path):
        if "T3" in str(path):
            raise KeyboardInterrupt
        return original(path)

    original = prepare_datasets.atomic_file
    with monkeypatch.context() as patch:
        patch.setattr(prepare_datasets, "atomic_file", fail)
        assert run() == 130
    before = contents(tmp_path / "data")
    names = {path.name for path in before}
    assert names == {"manifest.json", "T1_general_full.jsonl", "T2_math_full.jsonl"}
    (raw / "openai/gsm8k/README.md").unlink()
    capsys.readouterr()
    assert run() == 0
    assert "T2_math is prepared: 5 samples" in capsys.readouterr().out
    after = contents(tmp_path / "data")
    assert all(after[path] == before[path] for path in before if "jsonl" in path.name)
    assert len(after) == 6
    assert run("--seed", "1") == 2


@pytest.mark.parametrize("function", ["fsync", "replace", "unlink"])
def test_a_death_at_any_write_leaves_what_goes_on(run, tmp_path, monkeypatch, function):
    argv, folder = ["--tasks", "T2_math", "T3_code"], tmp_path / "data"
    assert run(*argv) == 0
    files = sorted(folder.rglob("*.json*"))
    expected, deaths = [path.read_bytes() for path in files], 0
    while True:
        shutil.rmtree(folder)
        with monkeypatch.context() as patch:
            calls = fail_at(patch, os, function, deaths)
            with contextlib.suppress(Killed):
                run(*argv)
        if len(calls) <= deaths:
            break
        deaths += 1
        assert run(*argv) == 0 and sorted(folder.rglob("*.json*")) == files
        assert [path.read_bytes() for path in files] == expected
    assert deaths >= 4


def test_toy_files_are_sampled_from_full_and_never_over_others(run, tmp_path, capsys):
    assert run("--tasks", "T1_general") == 0
    toy = tmp_path / "toy"
    argv = ["--toy", "--toy_dir", str(toy), "--toy_samples", "7", "--tasks", "T1_general"]
    assert run(*argv) == 0
    rows = read_jsonl(toy / "T1_general.jsonl")
    full = read_jsonl(tmp_path / "data/full/T1_general_full.jsonl")
    assert len(rows) == 7 and all(row in full for row in rows)
    (toy / "T1_general.jsonl").write_text("mine")
    capsys.readouterr()
    assert run(*argv) == 2
    assert "exists: give --overwrite" in errors(capsys)[0]
    assert (toy / "T1_general.jsonl").read_text() == "mine"
    assert run(*argv, "--overwrite") == 0
    # A full file that is missing is seen before anything is written.
    assert run("--toy", "--toy_dir", str(tmp_path / "other"), "--tasks", "T1_general", "T2_math")
    assert "T2_math_full.jsonl is missing" in errors(capsys)[0]
    assert not (tmp_path / "other").exists()


def test_toy_prefers_short_rows(run, raw, tmp_path):
    rows = [alpaca(i, output="x" * (500 if i % 2 else 5)) for i in range(10)]
    (raw / "sahil2801/CodeAlpaca-20k/code.json").write_text("\n".join(map(json.dumps, rows)))
    assert run("--tasks", "T3_code") == 0
    for number, long in ((4, 0), (7, 2)):
        argv = ["--toy", "--toy_dir", str(tmp_path / "toy"), "--toy_samples", str(number)]
        assert run(*argv, "--tasks", "T3_code", "--overwrite") == 0
        chosen = read_jsonl(tmp_path / "toy/T3_code.jsonl")
        assert len(chosen) == number
        assert sum(len(row["output"]) > 400 for row in chosen) == long


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--tasks", "T9"], "--tasks: give some of T1_general"),
        (["--toy"], "--toy needs --toy_dir"),
        (["--raw_dir", "nowhere"], "there is no such folder"),
        (["--tool", "xlam"], "unknown option --tool"),
        (["--max_chars", "-1"], "max_chars is -1: give 0"),
        (["--toy_samples", "0"], "toy_samples is 0: give 1"),
    ],
)
def test_a_wrong_option_is_one_line(argv, message, capsys):
    assert prepare_datasets.main(argv) == 2
    (line,) = errors(capsys)
    assert message in line
    assert not Path("nowhere").exists()
