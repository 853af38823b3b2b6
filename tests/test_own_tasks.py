"""Tasks of the user's own: their files, names, judges and likelihoods, through every script."""

import json
import math

import pytest
import torch
from helpers import errors, make_model, make_rows, mean_loss, read, write_rows

import chat
import evaluate_tasks
import plot_loss
import run_experiments
import train_single_task
import train_slsd_seq
from configs.command_line import UserError
from evaluation import readings
from evaluation.likelihood import branching_sample, choose, option_losses, sample_losses
from evaluation.matrix import format_score_matrix, summarise_scores
from evaluation.questions import held_out_questions
from evaluation.readings import BASE, LATEST, Stage, evaluate_reading
from methods import parse_config
from tasks import judged_task
from tasks.choice import is_choice, options_of
from tasks.prompt import PromptTemplate, prompt_text
from training.passes import Passes, StopSignals
from utils_data import InstructionDataset, TaskData, split_task

NAN = math.nan


def law_rows(number: int, words=("yes", "no")) -> list[dict]:
    return [
        {"instruction": f"law {i}?", "input": "", "output": words[i % len(words)]}
        for i in range(number)
    ]


@pytest.fixture
def own(tmp_path):
    """--task_data of two choices; the second has a test file."""
    write_rows(tmp_path / "law.jsonl", law_rows(40))
    write_rows(tmp_path / "med.jsonl", law_rows(30, ("Good", "Very bad", "bad")))
    write_rows(
        tmp_path / "med_test.jsonl",
        [
            {**r, "instruction": f"test {r['instruction']}"}
            for r in law_rows(6, ("Good", "Very bad", "bad", "-"))
        ],
    )
    return [
        f"law={tmp_path}/law.jsonl",
        f"med-1={tmp_path}/med.jsonl",
        f"med-1.test={tmp_path}/med_test.jsonl",
    ]


def test_a_sequence_of_own_tasks_from_training_to_picture(own, flags, tmp_path, capsys):
    more = {"task_data": own, "task_order": ["law", "med-1"], "max_steps_per_task": 2}
    argv = flags(**more)
    assert train_slsd_seq.main(argv) == 0
    out = capsys.readouterr().out
    assert "law: judged as a choice among 2 (" in out
    assert "med-1: judged as a choice among 3 (" in out
    assert "score from 0 to 100 (higher is better): likeliest" in out
    logs = tmp_path / "logs"
    lines = [line for line in read(logs / "seq_scores.jsonl") if line["branches"] == "latest"]
    cells = {(line["stage"], line["task"]) for line in lines}
    # Row 0 and, of choices, the task that comes next: what FWT is made of.
    assert cells == {(s, t) for s in ("base", "law", "med-1") for t in ("law", "med-1")}
    assert all(line["metric"] == "likeliest" and 0 <= line["score"] <= 100 for line in lines)
    # One of the six has no option as its output.
    assert {line["n"] for line in lines if line["task"] == "med-1"} == {5}
    found = json.loads((logs / "seq_summary.json").read_text())["accuracy"]
    assert found["matrix"][0][0] is not None and found["last"] is not None
    assert found["fwt"] == pytest.approx(found["matrix"][1][1] - found["matrix"][0][1])

    folder = tmp_path / "checkpoints" / "seq_med-1"
    facts = json.loads((folder / "ds_lora.json").read_text())
    assert facts["data_paths"].keys() == {"law", "med-1"}
    # The checkpoint remembers them: no --task_data, no --task_order.
    asked = [*flags(), "--checkpoint", str(folder), "--branches", "latest", "own"]
    assert evaluate_tasks.main(asked) == 0
    scores = read(logs / "scores_med-1.jsonl")
    assert {line["task"] for line in scores} == {"law", "med-1"}
    assert {line["metric"] for line in scores} == {"accuracy", "is_option", "likeliest"}
    # Twice the same model on the same questions.
    last = {line["task"]: line["score"] for line in lines if line["stage"] == "med-1"}
    assert last == {
        line["task"]: line["score"]
        for line in scores
        if (line["metric"], line["branches"]) == ("likeliest", "latest")
    }
    assert plot_loss.main(["seq", "--log_dir", str(logs)]) == 0
    assert plot_loss.main(["compare", str(logs), "--log_dir", str(logs)]) == 0
    assert "Accuracy" in (logs / "compare.md").read_text()


def test_a_single_own_task_and_a_chat_with_it(own, flags, tmp_path, monkeypatch, capsys):
    argv = flags(task_data=own, max_steps_per_task=1)
    assert train_single_task.main([*argv, "--task", "law"]) == 0
    assert (tmp_path / "logs" / "single_law_train_loss.jsonl").exists()
    assert train_slsd_seq.main([*argv, "--task_order", "law"]) == 0
    said = iter(["/own law", "Is it?", "/quit"])
    monkeypatch.setattr("builtins.input", lambda _: next(said))
    checkpoint = str(tmp_path / "checkpoints" / "seq_law")
    assert chat.main([*flags(), "--checkpoint", checkpoint, "--max_new_tokens", "2"]) == 0
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "fault"),
    [
        (["--task_data", "law"], "--task_data law: give NAME=FILE"),
        (["--task_data", "a/b=x.jsonl"], "--task_data a/b=x.jsonl: give NAME=FILE"),
        (["--task_data", "joint=x.jsonl"], "task 'joint': name it"),
        (["--task_data", "law.test=x.jsonl"], "data_paths of law is"),
        (["--task_order", "law"], "--task_data NAME=FILE adds one"),
        (["--task_judges", "T2_math=taste"], "--task_judges T2_math=taste: give TASK=JUDGE"),
        (["--task_judges", "law=choice"], "--task_judges law=choice: give TASK=JUDGE"),
        (["--task_data", "law=none.jsonl", "--task_order", "law"], "none.jsonl is missing"),
    ],
)
def test_what_is_wrong_with_an_own_task_is_one_line(more, fault, flags, capsys):
    assert train_slsd_seq.main([*flags(), *more]) == 2
    assert any(fault in line for line in errors(capsys))


def test_a_test_file_takes_the_place_of_the_held_out_share(make_config):
    rows, test = law_rows(40), law_rows(50)[35:]
    train, held_out = split_task(make_config(), rows, test)
    assert len(train) == 35 and sorted(map(prompt_text, held_out)) == sorted(map(prompt_text, test))
    few = split_task(make_config(eval_samples_per_task=4), rows, test[::-1])[1]
    assert few == held_out[:4]


def test_judges_by_name_and_by_what_the_outputs_look_like():
    outputs = ["yes", "No.", "no", "Yes"] * 3
    assert options_of(outputs) == ("yes", "No.") and is_choice(outputs)
    assert not is_choice(["yes", "no"]) and not is_choice([f"answer {i}" for i in range(90)])
    assert not is_choice(["a " * 40, "b"] * 9) and not is_choice(["yes"] * 9)
    choice = judged_task("law", "", outputs)
    row = {"instruction": "", "input": "", "output": "No"}
    assert choice.judge(row, " NO.\n") == {"accuracy": True, "is_option": True}
    assert choice.judge(row, "yes") == {"accuracy": False, "is_option": True}
    assert choice.judge(row, "no way") == {"accuracy": False, "is_option": False}
    assert choice.judge({**row, "output": "-"}, "no") == {}
    assert judged_task("law", "", [f"answer {i}" for i in range(90)]).primary == "rouge_l"
    exact = judged_task("law", "exact", []).judge
    assert exact(row, "no .") == {"exact": True} and exact(row, "no no") == {"exact": False}
    assert exact({**row, "output": " "}, "x") == {}
    number = judged_task("law", "number", []).judge
    assert number({**row, "output": "3 apples\n#### 7"}, "so 7.") == {"number": True}
    assert number({**row, "output": "3 apples"}, "about 4") == {"number": False}
    assert number(row, "4") == {}
    assert judged_task("law", "json_calls", []).primary == "exact"
    assert (
        judged_task("law", "python", []).judge({**row, "output": "x = 1"}, "x = ")["syntax"]
        is False
    )
    # A task of our own keeps what is not its judge.
    math_task = judged_task("T2_math", "exact", [])
    assert (math_task.primary, math_task.max_new_tokens) == ("exact", 256)
    assert judged_task("T2_math", "", outputs).primary == "strict"


def test_options_have_the_losses_that_whole_samples_have(make_config, tokenizer):
    """Read once, from the kept prefix too, each is what a sample of its own gives."""
    model = make_model()
    cfg = make_config(tokens_per_pass=40, num_frozen_layers=1)
    passes = Passes(cfg, model, tokenizer, torch.device("cpu"), StopSignals())
    rows = [{"instruction": f"is {'it ' * i}so", "input": "", "output": ""} for i in range(1, 6)]
    options = ["yes", "certainly not", "no"]
    template = PromptTemplate(tokenizer)
    prompts = [template.join(prompt, 64) for prompt in template.prompts(rows)]
    responses = template.responses([{"output": o} for o in options])
    found = option_losses(passes, prompts, responses)
    assert len(passes.keep_prefix([branching_sample(p, responses) for p in prompts], "kept")) == 5
    assert torch.allclose(option_losses(passes, prompts, responses), found, rtol=1e-5)
    for i, row in enumerate(rows):
        for j, option in enumerate(options):
            (sample,) = InstructionDataset([{**row, "output": option}], tokenizer, 64)
            ids, labels = sample["input_ids"][None], sample["labels"][None]
            with torch.no_grad():
                expected = model(input_ids=ids, labels=labels).loss
            assert found[i, j] == pytest.approx(expected.item(), rel=1e-4)


def test_a_sample_that_is_an_option_is_read_once(make_config, tokenizer, monkeypatch):
    """Its loss comes from the reading of all options, and is what reading it alone gives."""
    model = make_model()
    cfg = make_config(max_seq_len=64)
    passes = Passes(cfg, model, tokenizer, torch.device("cpu"), StopSignals())
    rows = [*law_rows(5), {"instruction": "law 9?", "input": "", "output": "perhaps"}]
    held_out = InstructionDataset(rows, tokenizer, 64)
    stage = Stage(BASE, cfg, passes, {"law": TaskData(held_out, held_out, rows)})
    questions = held_out_questions(cfg, "law", rows, ["yes", "no"] * 4)
    lines, known = choose(stage, LATEST, questions)
    assert lines[0]["n"] == len(known) == 5
    expected, _ = evaluate_reading(stage, LATEST, "law", {})
    assert expected["loss"] == pytest.approx(mean_loss(model, held_out).item(), rel=1e-5)

    read_whole, original = [], readings.evaluate_loss
    monkeypatch.setattr(
        readings,
        "evaluate_loss",
        lambda passes, samples, _: read_whole.extend(samples) or original(passes, samples, _),
    )
    found, _ = evaluate_reading(stage, LATEST, "law", known)
    assert [sample["id"] for sample in read_whole] == [held_out[5]["id"]]
    assert found["tokens"] == expected["tokens"]
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    with pytest.raises(UserError, match="law .latest.: the loss is not finite"):
        evaluate_reading(stage, LATEST, "law", dict.fromkeys(known, NAN))


def test_the_papers_numbers_by_hand():
    matrix = [[50.0, 40.0], [90.0, 45.0], [70.0, 80.0]]
    found = summarise_scores(matrix)
    assert (found["last"], found["avg"]) == (75.0, 82.5)
    assert (found["bwt"], found["fwt"], found["forgetting"]) == (-20.0, 5.0, 20.0)
    assert math.isnan(summarise_scores(matrix, joint=True)["bwt"])


def test_a_table_of_many_tasks_has_numbered_columns():
    tasks = {f"A_rather_long_name_of_a_task_{i}": "likeliest" for i in range(19)}
    matrix = [[NAN] * 19 for _ in range(20)]
    matrix[1][18] = 12.5
    lines = format_score_matrix(matrix, tasks).splitlines()
    assert max(map(len, lines)) <= 180 and "19 A_rather_long_name_of_a_task_18" in " ".join(lines)
    assert any(line.endswith("12.5") for line in lines)


def test_orders_by_name_by_digits_and_by_tasks(own, flags, tmp_path, capsys):
    from test_experiments import planned

    config = tmp_path / "two_config.py"
    config.write_text(
        "from dataclasses import dataclass\nfrom configs.base_config import BaseConfig\n\n\n"
        "@dataclass\nclass TwoConfig(BaseConfig):\n"
        '    task_orders = {"order1": ["law", "med-1"], "order2": ["med-1", "law"]}\n'
        '    data_paths = {t: {"toy": "x", "full": "x"} for t in ("law", "med-1")}\n'
        '    task_order = ["law", "med-1"]\n'
    )
    argv = [*flags(task_data=own), "--methods", "seq_lora"]
    runs = planned([*argv, "--orders", "law,med-1", "21", "med-1"])
    assert [run.name.partition("/")[0] for run in runs] == [
        "seq_lora@law+med-1",
        "seq_lora@21",
        "seq_lora@med-1",
    ]
    assert [run.cfg.task_order for run in runs] == [
        ["law", "med-1"],
        ["T2_math", "T1_general"],
        ["med-1"],
    ]
    assert runs[0].cfg.test_path("med-1").endswith("med_test.jsonl")
    named = ["--config", str(config), "--orders", "order2", "order1"]
    runs = planned([*argv, *named])
    assert [run.cfg.task_order for run in runs] == [["med-1", "law"], ["law", "med-1"]]
    assert runs[0].name == "seq_lora@order2/seed42"
    assert run_experiments.main([*argv, "--orders", "law,none", "order1"]) == 2
    lines = errors(capsys)
    assert "--orders law,none: " in lines[0] and "--orders order1: " in lines[1]


def test_a_better_reply_is_told_from_a_worse_one(flags, tmp_path, capsys):
    """The share of pairs, by mean losses that are those of whole samples."""
    rows = [{**row, "rejected": f"{row['output']} never"} for row in make_rows("T5", 30)]
    # The first one says less, the last has nothing to compare with.
    rows[0]["rejected"], rows[-1] = "", {**rows[-1], "rejected": None}
    write_rows(tmp_path / "pairs.jsonl", rows)
    more = {"task_data": [f"T5_safety={tmp_path}/pairs.jsonl"], "task_order": ["T5_safety"]}
    argv = flags(**more, max_steps_per_task=2, generate=True)
    assert train_slsd_seq.main(argv) == 0
    out, err = capsys.readouterr()
    assert "not read" not in err and "preferred" in out.partition("score from 0 to 100")[2]
    lines = [x for x in read(tmp_path / "logs/seq_scores.jsonl") if x["metric"] == "preferred"]
    assert [line["stage"] for line in lines] == ["base", "T5_safety"]
    held_out = split_task(parse_config(argv, description="")[0], rows, None)[1]
    pairs = [row for row in held_out if row["rejected"]]
    assert lines[0]["n"] == len(pairs) > 3 and lines[0]["low"] <= lines[0]["score"]
    folder = str(tmp_path / "checkpoints" / "seq_T5_safety")
    assert evaluate_tasks.main([*flags(**more), "--checkpoint", folder]) == 0
    again = [
        x for x in read(tmp_path / "logs/scores_T5_safety.jsonl") if x["metric"] == "preferred"
    ]
    assert again[0]["score"] == lines[1]["score"]


def test_the_loss_of_each_sample_is_its_own(make_config, tokenizer):
    model, rows = make_model(), make_rows("T2", 7)
    cfg, cpu = make_config(), torch.device("cpu")
    samples = InstructionDataset(rows, tokenizer, 64)
    found = sample_losses(Passes(cfg, model, tokenizer, cpu, StopSignals()), samples)
    expected = [mean_loss(model, [sample]).item() for sample in samples]
    assert found.tolist() == pytest.approx(expected, rel=1e-4)
