"""A file of runs becomes command lines, or one line that says what is wrong with it."""

import pytest

from configs.command_line import UserError
from configs.run_file import read_runs

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
