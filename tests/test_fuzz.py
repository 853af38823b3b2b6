"""Generated inputs: an answer or a `UserError`, never a traceback, never accepted nonsense."""

import json
import math
import tempfile
from pathlib import Path

import pytest
import torch
from helpers import inject, make_model, randomise
from hypothesis import example, given
from hypothesis import strategies as st

from configs.base_config import BaseConfig
from configs.command_line import UserError
from methods import METHODS, parse_config, run_config
from models.adapter import load_adapter, save_adapter
from models.ds_lora import branch_parameters
from utils_data import KEYS, read_jsonl

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)
ROW = st.fixed_dictionaries({key: st.text(max_size=8) for key in KEYS})
NEAR_ROW = st.dictionaries(st.sampled_from([*KEYS, "more"]), JSON | st.text(max_size=8), max_size=4)
LINE = (
    ROW.map(json.dumps)
    | ROW.map(lambda row: json.dumps(row, ensure_ascii=False))
    | NEAR_ROW.map(json.dumps)
    | JSON.map(json.dumps)
    | st.text(max_size=20)
).map(lambda text: text.encode("utf-8", "surrogatepass")) | st.binary(max_size=20)


@given(lines=st.lists(LINE, max_size=4), end=st.sampled_from([b"\n", b"\r\n"]))
@example(lines=[b'{"instruction": "a", "input": "", "output": ' + b'"x' * 3], end=b"\n")
@example(lines=[b"[" * 100_000], end=b"\n")
@example(
    lines=[b'{"instruction": "' + b"x" * 2_000_000 + b'", "input": "", "output": "y"}'], end=b"\n"
)
@example(lines=[b'{"instruction": "\\ud800", "input": "", "output": "y"}'], end=b"\n")
@example(lines=[b"1" * 5000], end=b"\n")
@example(lines=[b"\x00" * 10], end=b"\n")
def test_the_reader(lines, end):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.write_bytes(end.join(lines))
        try:
            rows = read_jsonl(path)
        except UserError as error:
            assert "\n" not in str(error) and "rows.jsonl" in str(error)
        else:
            assert rows and all(list(row) == list(KEYS) for row in rows)
            for row in rows:
                "".join(row.values()).encode("utf-8")


FIELDS = sorted(run_config(BaseConfig, *METHODS.values()).__dataclass_fields__)
WORD = st.one_of(
    st.sampled_from(
        ["0", "-1", "1", "nan", "inf", "1e-5", "true", "no", "auto", "cpu", "none", ""]
    ),
    st.sampled_from(["q_proj", "T1_general", "T2_math", "constant", "99999999999999999999", "1_0"]),
    st.sampled_from([*METHODS, "none.py", "configs/base_config.py", "configs", "../base"]),
    st.text(max_size=6),
    st.integers().map(str),
    st.floats().map(str),
)
OPTION = st.sampled_from([f"--{name}" for name in FIELDS] + ["--config", "--lora", "--x", "-x"])


@given(argv=st.lists(st.tuples(OPTION, st.lists(WORD, max_size=2)), max_size=3))
def test_the_command_line(argv):
    words = [word for option, values in argv for word in (option, *values)]
    try:
        (cfg,) = parse_config(words, description="")
    except UserError as error:
        assert str(error)
        return
    # Help is no error.
    except SystemExit as leaving:
        assert leaving.code == 0 and {"-h", "--help"} & set(words)
        return
    for name in vars(cfg):
        value = getattr(cfg, name)
        assert not isinstance(value, float) or math.isfinite(value)
    assert cfg.samples_per_step >= 1 and cfg.lr_slow > 0 and 0 < cfg.holdout_fraction < 1
    assert len(set(cfg.task_order)) == len(cfg.task_order) > 0


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    model = randomise(inject(make_model()))
    save_adapter(model, folder, base_model="b")
    return model, {path.name: path.read_bytes() for path in folder.iterdir()}


@given(
    name=st.sampled_from(["adapter_model.safetensors", "ds_lora.json"]),
    cut=st.floats(0, 1),
    put=st.binary(min_size=0, max_size=8),
    over=st.booleans(),
)
def test_the_adapter_loader(adapter, name, cut, put, over):
    model, files = adapter
    before = [p.clone() for p in branch_parameters(model, "slow")]
    with tempfile.TemporaryDirectory() as folder:
        for file_name, blob in files.items():
            if file_name == name:
                at = int(cut * len(blob))
                blob = blob[:at] + put + (blob[at + len(put) :] if over else b"")
            (Path(folder) / file_name).write_bytes(blob)
        try:
            load_adapter(model, folder)
        except ValueError:
            pairs = zip(before, branch_parameters(model, "slow"), strict=True)
            assert all(torch.equal(*pair) for pair in pairs)
        finally:
            for file_name, blob in files.items():
                (Path(folder) / file_name).write_bytes(blob)
            load_adapter(model, folder)
