"""Files of settings become a run, or many, or a line for each thing that is wrong with them."""

import pytest
import yaml
from helpers import make_rows, write_rows

import run_experiments
import train_single_task
import train_slsd_seq
from configs.command_line import UserError
from configs.run_file import read_runs
from configs.smollm2_config import SmolLM2Config
from methods import parse_config

FILE = """
one: &one
  methods: ["slsd,kd_lambda=1|3", replay]
  seeds: [1, 2]
  orders: [12345]
  lr_slow: 2e-3
  use_toy_data: false
two:
  <<: *one
  seeds: [7]
"""


def test_tables_are_command_lines_and_may_go_on_from_one_another(tmp_path):
    path = tmp_path / "runs.yaml"
    path.write_text(FILE)
    tables = read_runs(str(path))
    common = [*("--methods", "slsd,kd_lambda=1|3", "replay"), *("--orders", "12345")]
    assert list(tables) == ["one", "two"]
    for name, seeds in (("one", ["1", "2"]), ("two", ["7"])):
        at = tables[name].index("--seeds")
        assert tables[name][at : at + 1 + len(seeds)] == ["--seeds", *seeds]
        assert all(word in tables[name] for word in [*common, "--lr_slow", "2e-3", "False"])
    assert read_runs(f"{path},two") == {"two": tables["two"]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "it cannot be read ([Errno 2]"),
        ("a: [", "it cannot be read (while parsing"),
        ("", "give tables of options"),
        ("- slsd", "give tables of options"),
        ("methods: [slsd]", "give tables of options"),
        ("a: {jobs: 3}", "a: jobs is for the command line: leave it out"),
        ("a: {seeds: []}", "a: seeds is []: give a value or a list of some"),
        ("a: {lr_slow: }", "a: lr_slow is None: give a value"),
        ("a: {data_paths: {T1: x}}", "a: data_paths is {'T1': 'x'}: give a value"),
        ("../a: {seeds: [1]}", "../a: name it with letters"),
    ],
)
def test_what_is_no_file_of_runs_is_one_line(tmp_path, text, message):
    path = tmp_path / "runs.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError) as error:
        read_runs(str(path))
    (line,) = str(error.value).splitlines()
    assert line.startswith(f"--runs {path}") and message in line


def test_a_table_that_is_not_there_is_one_line(tmp_path):
    (tmp_path / "runs.yaml").write_text(FILE)
    with pytest.raises(UserError, match="no table three; give some of one, two"):
        read_runs(f"{tmp_path}/runs.yaml,one,three")


def parse(path, *argv):
    (cfg,) = parse_config(["--config", str(path), *argv], description="")
    return cfg


def test_a_run_file_is_a_configuration_with_a_base_and_flags_win(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "base: smollm2\nmethod: slsd_plus\nmemory_per_task: 8\nlr_lora: 1e-4\nseed: 3\n"
        "task_order: [law, T2_math]\ntask_data: [law.test=t.jsonl]\n"
        "data_paths:\n  law: {toy: l.jsonl, full: l.jsonl}\n  T2_math: {toy: m, full: m}\n"
        "task_orders: {back: [T2_math, law]}\n"
    )
    cfg = parse(path, "--seed", "7", "--memory_per_task", "4")
    assert isinstance(cfg, SmolLM2Config) and cfg.num_frozen_layers == 15
    # YAML takes 1e-4 for a text, a user does not.
    assert (cfg.lr_lora, cfg.seed, cfg.memory_per_task) == (1e-4, 7, 4)
    assert cfg.data_paths["law"]["test"] == "t.jsonl" and list(cfg.data_paths) == ["law", "T2_math"]
    assert cfg.task_orders == {"back": ["T2_math", "law"]}
    # Another method than the file's leaves its knobs alone, as with a configuration in Python.
    other = parse(path, "--method", "seq_lora")
    assert "memory_per_task" not in vars(other) and other.lr_lora == 1e-4
    (tmp_path / "mine.json").write_text('{"base": "smollm2", "lr_slow": 1e-4}')
    assert parse(tmp_path / "mine.json").lr_slow == 1e-4


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        (None, ["it cannot be read ([Errno 2]"]),
        ("lr_slow: [", ["it cannot be read (while parsing"]),
        ("[" * 5000, ["it cannot be read (maximum recursion"]),
        ("- lr_slow", ["give fields and their values"]),
        ("base: [x]", ["base is ['x']: give a name"]),
        ("base: other.yaml", ["base is 'other.yaml': give a name"]),
        ("lr_slo: 1", ["unknown field lr_slo; did you mean lr_slow?"]),
        (
            "lora_r: x\nuse_slsd: 1\nlr_fast: fast\ndtype: half\ntask_order: [1]\n",
            ["lora_r is 'x': give a value of type int", "use_slsd is 1", "lr_fast is 'fast'"]
            + ["dtype is 'half': give auto, float32", "task_order is [1]: give a list of names"],
        ),
        ("model_name:", ["model_name is None: give a value of type str"]),
        ("data_paths: {law: {toy: 5}}", ["data_paths is {'law': {'toy': 5}}: give a mapping"]),
        ("ewc_lambda: 3", ["--ewc_lambda belongs to --method ewc"]),
    ],
)
def test_what_is_wrong_with_a_run_file_is_a_line_each(tmp_path, text, messages):
    path = tmp_path / "mine.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError) as error:
        parse(path)
    lines = str(error.value).splitlines()
    assert len(lines) == len(messages)
    for line, message in zip(lines, messages, strict=True):
        assert line.startswith(f"--config {path}: {message}")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("base: nowhere", "there is no such file"),
        ("method: nothing", "--method nothing"),
        ("lora_r: 0", "lora_r is 0"),
        ("seed: 1\nlora_r: 3\nseed: 2", "seed is given twice"),
    ],
)
def test_impossible_values_of_a_run_file_are_told_as_those_of_flags(tmp_path, given, said):
    path = tmp_path / "mine.yaml"
    path.write_text(given)
    with pytest.raises(UserError, match=said):
        parse(path)


def test_a_method_on_the_command_line_wins_over_that_of_the_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("base: smollm2\nmemory_per_task: 8\n")
    assert parse(path, "--method", "replay").memory_per_task == 8
    with pytest.raises(UserError, match="this run's is ds_lora or seq_lora"):
        parse(path, "--method", "seq_lora")


def test_many_runs_go_on_from_a_run_file(tmp_path):
    """Each method takes what is its own; the file may start from a configuration in Python."""
    (tmp_path / "my_config.py").write_text(
        "from dataclasses import dataclass\nfrom configs.base_config import BaseConfig\n\n\n"
        "@dataclass\nclass MyConfig(BaseConfig):\n    lora_r = 5\n"
    )
    path = tmp_path / "mine.yaml"
    path.write_text(f"base: {tmp_path}/my_config.py\nmethod: replay\nmemory_per_task: 8\nseed: 3\n")
    argv = ["--config", str(path), "--methods", "replay", "seq_lora", "--lora_alpha", "7"]
    (table,), *_ = run_experiments.plan_tables([*argv, "--log_dir", str(tmp_path)])
    replay, alone = (run.cfg for run in table.runs)
    assert (replay.memory_per_task, replay.seed, replay.lora_r, replay.lora_alpha) == (8, 3, 5, 7)
    assert (alone.method, alone.seed, alone.lora_r) == ("seq_lora", 3, 5)


def adapters(folder):
    return {path.parent.name: path.read_bytes() for path in folder.rglob("adapter_model.*")}


def test_a_run_is_run_again_from_the_file_that_it_wrote(flags, tmp_path):
    """Bit for bit, with knobs of its method and a task of its own, and from a file by hand."""
    write_rows(tmp_path / "law.jsonl", make_rows("T5_law", 30))

    def where(name):
        return {"log_dir": tmp_path / name, "save_dir": tmp_path / name}

    settings = {
        **{"config": "smollm2", "method": "replay", "memory_per_task": 3, "lr_lora": 5e-3},
        **{"task_order": ["T2_math", "law"], "max_steps_per_task": 2},
        **{"task_data": f"law={tmp_path}/law.jsonl"},
    }
    assert train_slsd_seq.main(flags(**settings, **where("flags"))) == 0
    wrote = tmp_path / "flags" / "seq_config.yaml"
    again = [f"--{key}={value}" for key, value in where("again").items()]
    assert train_slsd_seq.main(["--config", str(wrote), *again]) == 0
    by_hand = flags(**settings, **where("hand"))
    values = yaml.safe_load(wrote.read_text())
    assert values["base"] == "smollm2" and "overwrite" not in values
    names = [word[2:] for word in by_hand if word.startswith("--") and word != "--config"]
    mine = {name: values[name] for name in names} | {k: str(v) for k, v in where("hand").items()}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"base": "smollm2", **mine}))
    assert train_slsd_seq.main(["--config", str(tmp_path / "mine.yaml")]) == 0
    first, *others = (adapters(tmp_path / name) for name in ("flags", "again", "hand"))
    assert len(first) == 2 and all(other == first for other in others)
    # The file that a run from a file wrote says the same.
    later = yaml.safe_load((tmp_path / "again" / "seq_config.yaml").read_text())
    assert later == {**values, **{k: str(v) for k, v in where("again").items()}}


def test_a_single_task_is_run_again_from_the_file_that_it_wrote(flags, tmp_path):
    argv = ["--task", "T2_math", *flags(max_steps_per_task=2)]
    assert train_single_task.main(argv) == 0
    wrote = tmp_path / "logs" / "single_T2_math_config.yaml"
    again = ["--log_dir", str(tmp_path / "again"), "--save_dir", str(tmp_path / "again")]
    assert train_single_task.main(["--config", str(wrote), *again]) == 0
    assert adapters(tmp_path / "again") == adapters(tmp_path / "checkpoints") != {}
