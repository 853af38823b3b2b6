"""Template, labels, cuts, splits, and the reader's complaints."""

import json
import os
import random

import pytest
import torch
from helpers import make_model, make_rows, write_rows
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from configs.command_line import UserError
from models.forward import IGNORE
from tasks.prompt import PromptTemplate
from utils_data import (
    InstructionDataset,
    collate_fn,
    held_out_fraction,
    prepare_task,
    read_jsonl,
    split_held_out,
)

ROW = {"instruction": "Add.", "input": "1 and 2", "output": "It is 3."}
# Texts that tempt a tokenizer: special tokens, indented code, odd spaces, other scripts.
AWKWARD = [
    ROW,
    {"instruction": "  Say </s> and <s>. ", "input": "", "output": "</s> is a mark [INST]"},
    {"instruction": "Indent", "input": "x = 1", "output": "\n    return x\n        pass  \n\n"},
    {"instruction": "多语言", "input": "emoji 🙂", "output": "naïve café 🙂"},
    {"instruction": "ends with [", "input": "(", "output": "a  b\tc"},
]


@pytest.fixture(scope="session")
def spacing_tokenizer():
    """SentencePiece-like: puts a space in front of every text and a bos in front of its ids."""
    words = [chr(i) for i in range(33, 127)] + ["\u2581", "[INST]", "\u2581[/", "\u2581It"]
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *words])}
    byte_words = {f"<0x{i:02X}>": len(vocabulary) + i for i in range(256)}
    tokenizer = Tokenizer(
        models.BPE({**vocabulary, **byte_words}, [], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first", split=False)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.fixture(params=["without bos", "with bos", "llama2"])
def any_tokenizer(request):
    if request.param == "llama2":
        return llama2()
    fixture = {"without bos": "tokenizer", "with bos": "spacing_tokenizer"}[request.param]
    return request.getfixturevalue(fixture)


def llama2():
    folder = os.environ.get("DSLORA_LLAMA2_TOKENIZER")
    if not folder:
        pytest.skip("DSLORA_LLAMA2_TOKENIZER does not point at LLaMA-2's tokenizer")
    return AutoTokenizer.from_pretrained(folder)


def rendered(row):
    content = "\n".join(filter(None, (row["instruction"].strip(), row["input"].strip())))
    return f"[INST] {content} [/INST] " + row["output"].lstrip("\n").rstrip()


@pytest.mark.parametrize("row", AWKWARD)
def test_every_label_is_a_response_token_and_the_whole_reads_as_specified(any_tokenizer, row):
    sample = InstructionDataset([row], any_tokenizer, 512)[0]
    ids, labels = sample["input_ids"].tolist(), sample["labels"].tolist()
    start = next(i for i, label in enumerate(labels) if label != IGNORE)
    assert all(label == IGNORE for label in labels[:start]) and labels[start:] == ids[start:]
    # bos and eos are the tokenizer's own ids, once each; </s> inside the data stays text.
    eos, bos = any_tokenizer.eos_token_id, any_tokenizer.bos_token_id
    has_bos = any_tokenizer("a").input_ids[0] == bos
    assert ids.count(eos) == 1 and ids[-1] == eos and ids.count(bos) == has_bos
    body = ids[has_bos:-1]
    assert any_tokenizer.decode(body).lstrip(" ") == rendered(row)
    response = any_tokenizer.decode(ids[start:-1])
    assert response.strip() == row["output"].strip()
    assert any_tokenizer.decode(ids[has_bos:start]).endswith("[/INST]")


@pytest.mark.parametrize("row", AWKWARD)
def test_parts_tokenised_apart_give_the_joint_prompt(any_tokenizer, row):
    template = PromptTemplate(any_tokenizer)
    prompt = template.join(template.prompts([row])[0], room=10**9)
    text = rendered({**row, "output": ""}).rstrip()
    joint = any_tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
    assert prompt == template.bos + joint


def test_known_ids_of_llama2():
    tokenizer = llama2()
    row = {"instruction": "Hi", "input": "there", "output": "Hello"}
    sample = InstructionDataset([row], tokenizer, 64)[0]
    # <s> _[ INST ] _Hi \n there _[ / INST ] _Hello </s>
    prompt = [1, 518, 25580, 29962, 6324, 13, 12711, 518, 29914, 25580, 29962]
    assert sample["input_ids"].tolist() == [*prompt, 15043, 2]
    assert sample["labels"].tolist() == [IGNORE] * len(prompt) + [15043, 2]


def test_an_empty_input_leaves_no_line(tokenizer):
    template = PromptTemplate(tokenizer)
    assert tokenizer.decode(template.prompts([{**ROW, "input": " "}])[0]) == "[INST] Add."


def test_too_long_a_prompt_loses_its_end_and_nothing_else(any_tokenizer):
    row = {**ROW, "instruction": "word " * 200}
    whole = InstructionDataset([row], any_tokenizer, 10**6)[0]
    data = InstructionDataset([row], any_tokenizer, 60)
    assert (data.num_prompts_cut, data.num_responses_cut, data.num_dropped) == (1, 0, 0)
    ids, labels = data[0]["input_ids"].tolist(), data[0]["labels"].tolist()
    assert len(ids) == 60
    assert [x for x in labels if x != IGNORE] == [
        x for x in whole["labels"].tolist() if x != IGNORE
    ]
    text = any_tokenizer.decode(ids, skip_special_tokens=True).strip()
    assert text.startswith("[INST] word word") and text.endswith("[/INST] It is 3.")


def test_only_a_response_too_long_by_itself_is_cut(any_tokenizer):
    data = InstructionDataset([{**ROW, "output": "word " * 200}], any_tokenizer, 60)
    # Of the prompt a quarter stays.
    assert (data.num_responses_cut, data.num_dropped) == (1, 0)
    sample = data[0]
    assert len(sample["input_ids"]) == 60 and sample["input_ids"][-1] != any_tokenizer.eos_token_id
    text = any_tokenizer.decode(sample["input_ids"], skip_special_tokens=True)
    assert text.strip().startswith("[INST] Add.\n1") and "word word" in text
    long = {**ROW, "instruction": "what " * 200, "output": "word " * 200}
    data = InstructionDataset([long], any_tokenizer, 60)
    assert (data.num_prompts_cut, data.num_responses_cut, data.num_dropped) == (1, 1, 0)
    text = any_tokenizer.decode(data[0]["input_ids"], skip_special_tokens=True)
    assert len(data[0]["input_ids"]) == 60 and "what wh" in text and "word word" in text


def test_samples_without_a_response_token_are_dropped_and_counted(tokenizer):
    data = InstructionDataset([{**ROW, "output": " \n"}, ROW], tokenizer, 64)
    assert (len(data), data.num_dropped) == (1, 1)
    assert InstructionDataset([ROW], tokenizer, 8).num_dropped == 1


def test_collate_pads_on_the_right_and_a_model_takes_it(tokenizer):
    data = InstructionDataset(make_rows("T1", 3), tokenizer, 64)
    batch = collate_fn([data[i] for i in range(3)], pad_token_id=2)
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    for i in range(3):
        n = data.lengths[i]
        assert torch.equal(batch["input_ids"][i, :n], data[i]["input_ids"])
        assert (batch["input_ids"][i, n:] == 2).all() and (batch["labels"][i, n:] == IGNORE).all()
        assert batch["attention_mask"][i].tolist() == [1] * n + [0] * (max(data.lengths) - n)
    assert torch.isfinite(make_model()(**batch).loss)


def test_the_split_depends_on_the_text_alone():
    rows = make_rows("T1", 400)
    train, held_out = split_held_out(rows, 0.25)
    shuffled = random.Random(0).sample(rows, len(rows))
    assert split_held_out(shuffled, 0.25)[1] == held_out
    assert len(train) + len(held_out) == 400 and 60 < len(held_out) < 140
    twin = {**held_out[0], "output": "another answer"}
    assert twin in split_held_out([*rows, twin], 0.25)[1]
    # printf 'a\0b' | sha256sum begins 59b271.
    fraction = held_out_fraction({"instruction": "a", "input": "b"})
    assert fraction == pytest.approx(0x59B271 / 2**24, abs=2**-24)


def test_a_bom_crlf_blank_lines_and_line_separators_are_fine(tmp_path):
    path = tmp_path / "rows.jsonl"
    odd = {**ROW, "output": "a\u2028b\u0085c"}
    lines = [json.dumps(ROW), "", "  ", json.dumps(odd, ensure_ascii=False)]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    assert read_jsonl(path) == [ROW, odd]


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        (b'{"instruction": "a"', "line 2: not a JSON object"),
        (b"[1]", "line 2: list, not a JSON object"),
        (b"null", "line 2: NoneType, not a JSON object"),
        (b'{"instruction": "a", "input": ""}', "line 2: key 'output' is missing"),
        (b'{"instruction": "a", "input": 3, "output": ""}', "line 2: 'input' is int, not text"),
        (b'{"instruction": "\xff"}', "line 2: not UTF-8"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, fault):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps(ROW).encode() + b"\n" + line + b"\n")
    with pytest.raises(UserError) as caught:
        read_jsonl(path)
    assert str(path) in str(caught.value) and fault in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_empty_and_unreadable_files_are_named(tmp_path):
    with pytest.raises(UserError, match="is missing: run python prepare_datasets.py"):
        read_jsonl(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="is no file"):
        read_jsonl(tmp_path)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match="holds no sample"):
        read_jsonl(tmp_path / "empty.jsonl")


def test_limits_choose_the_same_samples_each_time(make_config, tokenizer, capsys):
    rows = make_rows("T1", 60)
    cfg = make_config(max_train_samples=10, eval_samples_per_task=5)
    first, again = (prepare_task(cfg, tokenizer, "T1_general", rows) for _ in range(2))
    assert (len(first.train), len(first.held_out)) == (10, 5)
    assert [s["id"] for s in first.train] == [s["id"] for s in again.train]
    assert "10 samples to train on, 5 held out" in capsys.readouterr().out
    other = prepare_task(make_config(max_train_samples=10, seed=1), tokenizer, "T1_general", rows)
    assert {s["id"] for s in other.train} != {s["id"] for s in first.train}


def test_no_sample_on_one_side_is_an_error(make_config, tokenizer):
    with pytest.raises(UserError, match="gives no held_out sample"):
        prepare_task(
            make_config(holdout_fraction=1e-9), tokenizer, "T1_general", make_rows("T1", 5)
        )
    with pytest.raises(UserError, match="gives no train sample"):
        prepare_task(make_config(max_seq_len=16), tokenizer, "T1_general", [{**ROW, "output": ""}])


def test_the_reader_keeps_the_path_form(tmp_path, tokenizer):
    write_rows(tmp_path / "rows.jsonl", [ROW])
    for path in (tmp_path / "rows.jsonl", str(tmp_path / "rows.jsonl")):
        assert len(InstructionDataset(path, tokenizer, 64)) == 1
