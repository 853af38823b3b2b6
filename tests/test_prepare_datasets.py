"""Each trap of the source sets, on rows written by hand in their schema."""

import gzip
import json
from pathlib import Path

import pytest
from test_scripts import command, errors

import prepare_datasets
from prepare_datasets import (
    Drop,
    WrongShape,
    convert_alpaca,
    convert_dolly,
    convert_glaive,
    convert_gsm8k,
    convert_hh,
    convert_xlam,
)
from utils_checkpoint import file_sha256
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
    "given", ["No input devices work", "none of them", "Input: 2", "no", "?!x"]
)
def test_real_inputs_stay(given):
    assert convert_alpaca(alpaca(1, given)).input == given


def test_empty_outputs_and_wrong_shapes_are_dropped_by_reason():
    assert reason(convert_alpaca, alpaca(1, output=" \n")) == "empty output"
    assert reason(convert_alpaca, alpaca(1, instruction=" ")) == "empty instruction"
    assert "column input" in reason(convert_alpaca, {"instruction": "a"}, WrongShape)
    assert "column output" in reason(convert_alpaca, alpaca(1, output=None), WrongShape)


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
    assert line == "You can call these functions:" and json.loads(schemas) == [SCHEMA]
    assert json.loads(sample.output) == calls and "Köln" in sample.output
    assert reason(convert_xlam, {**row, "answers": "[]"}) == "no call"
    assert "not offered" in reason(convert_xlam, {**row, "tools": "[]"})
    assert "no JSON" in reason(convert_xlam, {**row, "answers": "[{"}, WrongShape)


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
    assert reason(convert_hh, {"chosen": "Just text"}, WrongShape) == "no dialogue"


def test_all_five_tasks_and_a_manifest_that_adds_up(run, tmp_path):
    assert run() == 0
    full = tmp_path / "data" / "full"
    manifest = json.loads((full / "manifest.json").read_text())
    assert list(manifest) == list(prepare_datasets.TASKS)
    for task, entry in manifest.items():
        rows = read_jsonl(full / f"{task}_full.jsonl")
        assert len(rows) == entry["written"]
        assert entry["rows_read"] == entry["written"] + sum(entry["dropped"].values())
        assert entry["sha256"] == file_sha256(full / f"{task}_full.jsonl")
        assert set(entry["sources"].values()) == {"raw"}
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
    assert rows() == first and rows("--seed", "1") != first
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


def test_long_rows_are_dropped_not_cut(run, tmp_path):
    assert run("--tasks", "T1_general", "--max_chars", "24") == 0
    entry = json.loads((tmp_path / "data/full/manifest.json").read_text())["T1_general"]
    rows = read_jsonl(tmp_path / "data/full/T1_general_full.jsonl")
    assert entry["dropped"]["longer than max_chars"] > 0
    assert all(sum(map(len, row.values())) <= 24 for row in rows)


def test_what_is_there_is_not_replaced_without_leave(run, tmp_path, capsys):
    assert run("--tasks", "T2_math") == 0
    file = tmp_path / "data/full/T2_math_full.jsonl"
    file.write_text("mine")
    capsys.readouterr()
    assert run("--tasks", "T2_math", "T5_safety") == 2
    (line,) = errors(capsys)
    assert "T2_math_full.jsonl exists: give --overwrite" in line
    assert file.read_text() == "mine" and not (file.parent / "T5_safety_full.jsonl").exists()


def test_a_set_that_has_changed_its_form_is_an_error(run, raw, tmp_path, capsys):
    rows = [{"question": "q", "answer": "#### 1"}] + [{"question": "q", "answer": "none"}] * 2
    (raw / "openai/gsm8k/main/train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert run("--tasks", "T2_math") == 2
    (line,) = errors(capsys)
    assert "T2_math: 3 rows of openai/gsm8k gave 1 samples" in line
    assert not (tmp_path / "data/full/T2_math_full.jsonl").exists()


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
    assert names == [f"{task}_full.jsonl" for task in prepare_datasets.TASKS[1:]]


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


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--tasks", "T9"], "--tasks: give some of T1_general"),
        (["--toy"], "--toy needs --toy_dir"),
        (["--raw_dir", "nowhere"], "there is no such folder"),
        (["--tool", "xlam"], "unknown option --tool"),
        (["--max_chars", "-1"], "--max_chars -1: give 0"),
    ],
)
def test_a_wrong_option_is_one_line(argv, message, capsys):
    assert prepare_datasets.main(argv) == 2
    (line,) = errors(capsys)
    assert message in line
    assert not Path("nowhere").exists()
