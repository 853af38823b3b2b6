"""What people have, as our samples; published layouts; the lock and what a death leaves."""

import csv
import json
import time

import pytest
from helpers import errors, read

import prepare_datasets
from configs.command_line import UserError, config_class
from tasks.own import OwnFile
from tasks.safety import convert_hh
from tasks.source import Drop, WrongShape, without_placeholders
from tasks.tool import convert_glaive
from training.saving import atomic_file, run_lock
from utils_data import read_jsonl

ROW = {"instruction": "Say hi.", "input": "", "output": "Hi."}


def convert(path, rows=None, text=None, **columns):
    """The samples' rows of a file with these rows as a JSON array, or with this text."""
    path.write_text(json.dumps(rows) if text is None else text, encoding="utf-8")
    source = OwnFile(str(path), str(path), columns)
    loaded, _ = source.load("")
    found = []
    for row in loaded:
        try:
            found.append(source.convert(row).row())
        except Drop as reason:
            found.append(str(reason))
    return found


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        (ROW, {}),
        ({"instruction": "Say hi.", "input": None, "output": "Hi."}, {}),
        ({"prompt": "Say hi.", "response": "Hi."}, {}),
        ({"prompt": "Say hi.", "completion": "Hi."}, {}),
        ({"question": "Say hi.", "answer": "Hi."}, {}),
        ({"task": "Say hi.", "solution": "Hi."}, {"instruction": "task", "output": "solution"}),
        (
            {
                "messages": [
                    {"role": "user", "content": "Say hi."},
                    {"role": "assistant", "content": "Hi."},
                ]
            },
            {},
        ),
        (
            {
                "conversations": [
                    {"from": "human", "value": "Say hi."},
                    {"from": "gpt", "value": "Hi."},
                    {"from": "human", "value": "Bye."},
                ]
            },
            {},
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "Say hi."}]},
                    {"role": "assistant", "content": "Hi."},
                ]
            },
            {},
        ),
    ],
)
def test_each_form_gives_the_same_sample(tmp_path, row, columns):
    assert convert(tmp_path / "a.json", [row], **columns) == [ROW]


def test_earlier_turns_and_the_system_go_into_the_prompt(tmp_path):
    said = [
        ("system", "Be kind."),
        ("user", "A?"),
        ("assistant", "B."),
        ("user", "C?"),
        ("assistant", "D."),
    ]
    row = {"messages": [{"role": role, "content": text} for role, text in said]}
    expected = {
        "instruction": "C?",
        "input": "Be kind.\n\nHuman: A?\n\nAssistant: B.",
        "output": "D.",
    }
    assert convert(tmp_path / "a.json", [row]) == [expected]
    row = {"instruction": "C?", "output": "D.", "system": "Be kind.", "history": [["A?", "B."]]}
    assert convert(tmp_path / "a.json", [row]) == [expected]


def test_what_is_no_sample_is_dropped_by_reason(tmp_path):
    messages = [{"role": "user", "content": "A?"}]
    assert convert(tmp_path / "a.json", [{"messages": messages}, {"messages": 1}, None, 3]) == [
        "no reply to a user",
        "messages are no list",
        "empty row",
        "empty row",
    ]
    rows = [
        {**ROW, "output": "<nooutput>"},
        {**ROW, "output": 4},
        {**ROW, "output": {"a": 1}},
        dict.fromkeys(ROW),
        {**ROW, "rejected": "Go away."},
        *({**ROW, name: "a \ud83d"} for name in ("instruction", "input", "output", "rejected")),
        {**ROW, "output": "a \ud83d\ude00"},
    ]
    assert convert(tmp_path / "a.json", rows) == [
        "empty output",
        {**ROW, "output": "4"},
        "output is no text",
        "empty row",
        {**ROW, "rejected": "Go away."},
        *["half a surrogate pair"] * 4,
        {**ROW, "output": "a \U0001f600"},
    ]


def test_json_lines_a_wrapped_array_csv_and_parquet(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [{**ROW, "output": 'a\u2028b\n"c"'}, {**ROW, "instruction": "Say, bye."}]
    lines = "\ufeff" + "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    assert convert(tmp_path / "a.jsonl", text=lines) == rows
    assert convert(tmp_path / "a.json", text=json.dumps({"n": 2, "data": rows}, indent=1)) == rows
    # One conversation alone is a row, and its messages are none.
    turns = [{"from": "human", "value": "Say hi."}, {"from": "gpt", "value": "Hi."}]
    text = json.dumps({"conversations": turns}, indent=1)
    assert convert(tmp_path / "b.json", text=text) == [ROW]
    with open(tmp_path / "t.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(ROW))
        writer.writeheader()
        writer.writerows(rows)
    text = (tmp_path / "t.csv").read_bytes().decode()
    assert convert(tmp_path / "a.csv", text=text) == rows
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    source = OwnFile("a", str(tmp_path / "a.parquet"))
    assert [source.convert(row).row() for row in source.load("")[0]] == rows


def test_what_cannot_be_read_says_what_was_found_and_what_is_known(tmp_path):
    with pytest.raises(UserError, match="columns are text, label; known are instruction, input"):
        convert(tmp_path / "a.json", [{"text": "a", "label": 1}])
    with pytest.raises(UserError, match="there is no column task"):
        convert(tmp_path / "a.json", [ROW], instruction="task")
    with pytest.raises(UserError, match="cannot be read .* give JSON"):
        convert(tmp_path / "a.json", text="{broken")
    with pytest.raises(UserError, match="there is no such file"):
        OwnFile("a", str(tmp_path / "none.csv")).load("")


@pytest.fixture
def prepare(tmp_path):
    return lambda *argv: prepare_datasets.main(["--data_dir", str(tmp_path / "data"), *argv])


def test_own_files_are_written_counted_and_told_how_to_train_on(prepare, tmp_path, capsys):
    rows = [{**ROW, "instruction": f"Say {i}."} for i in range(5)]
    dropped = [rows[0], {**ROW, "output": ""}, {**ROW, "output": "\ud83d"}]
    (tmp_path / "law.json").write_text(json.dumps([*rows, *dropped]))
    (tmp_path / "test.csv").write_text("question,answer\nWho?,Me\n")
    argv = ["--own", f"law={tmp_path}/law.json", f"law.test={tmp_path}/test.csv"]
    assert prepare(*argv) == 0
    out = capsys.readouterr().out
    assert "1 empty output" in out and "1 duplicate" in out and "1 half a surrogate pair" in out
    full = tmp_path / "data" / "full"
    assert f"--task_data law={full}/law_full.jsonl law.test={full}/law_test.jsonl" in out
    assert "--task_order law\n" in out
    assert sorted(map(str, read_jsonl(full / "law_full.jsonl"))) == sorted(map(str, rows))
    assert read(full / "law_test.jsonl") == [{"instruction": "Who?", "input": "", "output": "Me"}]
    manifest = json.loads((full / "manifest.json").read_text())
    assert manifest["law"]["written"] == 5 and manifest["law"]["rows_read"] == 8
    assert prepare(*argv) == 0 and "law is prepared: 5 samples" in capsys.readouterr().out
    # Another content is not taken for this one.
    (tmp_path / "law.json").write_text(json.dumps(rows))
    assert prepare(*argv) == 2 and "exists: give --overwrite" in errors(capsys)[0]


@pytest.mark.parametrize(
    ("argv", "fault"),
    [
        (["--own", "law"], "--own law: give NAME=FILE"),
        (["--own", "joint=x.json"], "--own joint=x.json: give NAME=FILE"),
        (["--own", "T2_math=x.json"], "has sources of its own"),
        (["--columns", "output=x"], "give that too"),
        (["--own", "law=x.json", "--columns", "x=y"], "--columns x=y: give instruction=NAME"),
        (["--suite", "absa"], "--suite absa needs --raw_dir"),
        (["--own", "law=none.json"], "none.json: there is no such file"),
    ],
)
def test_what_is_wrong_with_own_files_is_one_line(prepare, argv, fault, capsys):
    assert prepare(*argv) == 2
    assert any(fault in line for line in errors(capsys))


def test_the_published_layouts_give_files_that_the_config_names(prepare, tmp_path, capsys):
    raw = tmp_path / "raw"

    def put(name, rows):
        (raw / name).parent.mkdir(parents=True, exist_ok=True)
        (raw / name).write_text(json.dumps(rows))

    easy = [{"instruction": f"Topic {i}?", "input": "x", "output": "Sports"} for i in range(3)]
    put("agnews/agnews_train.json", easy)
    # A published test file stays as it is: a row that stands there twice counts twice.
    put("agnews/agnews_test.json", [easy[0], easy[0]])
    olora = [{"sentence": f"sentence 1: {i}\nsentence 2: b", "label": "neutral"} for i in range(2)]
    put("NLI/MNLI/train.json", olora)
    put("NLI/MNLI/dev.json", olora[:1])
    put("NLI/MNLI/labels.json", ["neutral", "entailment"])
    assert prepare("--suite", "long_sequence", "--raw_dir", str(raw)) == 0
    told = capsys.readouterr()
    assert "warning: yelp: none of yelp/yelp_train.json, " in told.err
    assert "--config long_sequence" in told.out
    cfg = config_class("long_sequence")(data_dir=str(tmp_path / "data"))
    assert read_jsonl(cfg.data_path("agnews")) == easy
    assert read_jsonl(cfg.test_path("agnews")) == [easy[0], easy[0]]
    row = read_jsonl(cfg.data_path("MNLI"))[0]
    assert row["instruction"].endswith("Choose one from the option.\nOption: neutral, entailment")
    assert (row["input"], row["output"]) == (olora[0]["sentence"], "neutral")
    # Other options make other instructions.
    suite = ("--suite", "long_sequence", "--raw_dir", str(raw))
    capsys.readouterr()
    assert prepare(*suite) == 0 and "MNLI is prepared" in capsys.readouterr().out
    put("NLI/MNLI/labels.json", ["neutral", "contradiction"])
    assert prepare(*suite) == 2 and "MNLI.jsonl exists: give --overwrite" in capsys.readouterr().err
    assert prepare(*suite, "--overwrite") == 0
    row = read_jsonl(cfg.data_path("MNLI"))[0]
    assert row["instruction"].endswith("Option: neutral, contradiction")

    put("FOMC/train.json", [{"prompt": "Stance?", "answer": "A"}])
    put("FOMC/test.json", [{"prompt": "Stance now?", "answer": "B"}])
    assert prepare("--suite", "trace", "--raw_dir", str(raw)) == 0
    cfg = config_class("trace")(data_dir=str(tmp_path / "data"))
    assert read_jsonl(cfg.test_path("FOMC"))[0]["output"] == "B"
    capsys.readouterr()
    assert prepare("--suite", "absa", "--raw_dir", str(raw)) == 2
    assert len(errors(capsys)) == 19 * 2


@pytest.mark.parametrize("suite", prepare_datasets.SUITES)
def test_the_orders_of_a_suite_hold_its_tasks_once(suite):
    cfg = config_class(suite)()
    assert cfg.task_order == cfg.task_orders["order1"]
    for order in cfg.task_orders.values():
        assert set(order) <= set(cfg.data_paths) and len(set(order)) == len(order)


def test_two_at_once_lose_nothing_and_a_death_between_files_is_mended(
    prepare, tmp_path, capsys, monkeypatch
):
    source, full = tmp_path / "law.json", tmp_path / "data" / "full"
    argv = ["--own", f"law={source}"]
    source.write_text(json.dumps([ROW]))
    with run_lock([str(full)], "prepare"):
        assert prepare(*argv) == 2
    assert "another run is at work there" in errors(capsys)[0]
    assert prepare(*argv) == 0
    source.write_text(json.dumps([{**ROW, "output": "Hello."}]))

    def die(path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(prepare_datasets, "atomic_file", die)
        assert prepare(*argv, "--overwrite") == 130
    assert read(full / "law_full.jsonl") == [ROW]
    # What a run that was killed leaves of a task that this one does not write.
    with atomic_file(full / "tax_full.jsonl"):
        (left,) = full.glob(".*.tmp")
    left.write_text("half")
    # The manifest knows what was to be replaced, with leave.
    assert prepare(*argv) == 0
    assert read(full / "law_full.jsonl")[0]["output"] == "Hello."
    assert not list(full.glob(".*.tmp"))


def test_many_spaces_take_no_time():
    spaces = " " * 60_000
    started = time.perf_counter()
    for chat in (
        f"USER: Hi <functioncall> {spaces}x",
        f"USER: Hi{chr(10) * 60_000}x <functioncall> y",
        f'USER: Hi\n\n\nASSISTANT: <functioncall> {{"name": "f", "arguments": {spaces}x',
        f"USER: {spaces}Hi{spaces}",
    ):
        with pytest.raises(Drop):
            convert_glaive({"system": "SYSTEM: -", "chat": chat})
    assert without_placeholders(spaces + "x", spaces + "x") == (spaces + "x", spaces + "x")
    assert time.perf_counter() - started < 2


def test_arguments_nested_too_deep_are_dropped():
    deep = "[" * 100_000
    call = f'USER: Hi\n\n\nASSISTANT: <functioncall> {{"name": "f", "arguments": \'{deep}\'}}'
    with pytest.raises(WrongShape):
        convert_glaive({"system": "SYSTEM: -", "chat": call})
    with pytest.raises(WrongShape):
        convert_glaive({"system": 'SYSTEM: {"a": ' + deep, "chat": call})


@pytest.mark.parametrize("output", ["<nooutput>", "No output", "`< no_output >`.", "N/A"])
def test_a_placeholder_is_an_empty_output(output):
    assert without_placeholders("No input.", output) == ("", "")
    assert without_placeholders("", "None of them")[1] == "None of them"


def test_the_rejected_reply_stays_beside_the_chosen_one(tmp_path):
    start = "\n\nHuman: Help me.\n\nAssistant:"
    row = convert_hh({"chosen": start + " No.", "rejected": start + " Sure. "}).row()
    assert (row["output"], row["rejected"]) == ("No.", "Sure.")
    # Of another dialogue, or none: left out.
    for other in ("\n\nHuman: Other.\n\nAssistant: Sure.", start + " ", None):
        assert "rejected" not in convert_hh({"chosen": start + " No.", "rejected": other}).row()


def test_a_raw_folder_without_the_hubs_layout(prepare, tmp_path, capsys):
    raw = tmp_path / "raw" / "openai" / "gsm8k"
    raw.mkdir(parents=True)
    row = {"question": "How many?", "answer": "One.\n#### 1"}
    (raw / "train.jsonl").write_text(json.dumps(row))
    argv = ["--raw_dir", str(tmp_path / "raw"), "--tasks"]
    assert prepare(*argv, "T2_math") == 0
    assert read(tmp_path / "data/full/T2_math_full.jsonl")[0]["output"] == row["answer"]
    (tmp_path / "raw" / "Anthropic" / "hh-rlhf").mkdir(parents=True)
    capsys.readouterr()
    assert prepare(*argv, "T5_safety") == 2
    assert "harmless-base/ is missing there" in errors(capsys)[0]
