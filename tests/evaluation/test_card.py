"""The card of a checkpoint says what the run knows, in the hub's format, and nothing of the day."""

import json
import re

import pytest
from helpers import inject, make_journal, make_model, read
from huggingface_hub import ModelCard

import train_single_task
import train_slsd_seq
from configs.base_config import BaseConfig
from evaluation.card import is_hub_id, model_card


def card_of(folder) -> ModelCard:
    return ModelCard.load(folder / "README.md")


def test_each_stage_has_a_card_with_the_losses_so_far(flags, tmp_path):
    argv = flags(task_order=["T2_math", "T1_general"], max_steps_per_task=1)
    assert train_slsd_seq.main(argv) == 0
    first, last = (
        card_of(tmp_path / "checkpoints" / f"seq_{t}") for t in ("T2_math", "T1_general")
    )
    assert first.data.library_name == "peft" and "ds_lora" in first.data.tags
    # A folder of this machine is no model of the hub, and the small files are no set.
    assert first.data.base_model is first.data.datasets is first.data.license is None
    assert "# T2_math → T1_general\n" in last.text and "# T2_math\n" in first.text
    rows = {
        (r["stage"], r["eval_task"], r["branches"]): r["loss"]
        for r in read(tmp_path / "logs" / "seq_eval_loss.jsonl")
    }
    for stage, card, reading in (
        ("T2_math", first, "latest"),
        ("T2_math", last, "latest"),
        ("T1_general", last, "latest"),
        ("T1_general", last, "routed"),
    ):
        loss = rows[stage, "T2_math", reading]
        assert f"| {stage} | {reading} | {loss:.3f} |" in card.text
    assert "| T1_general |" not in first.text
    # Nothing that differs from run to run.
    said = json.dumps(first.content) + json.dumps(last.content)
    assert str(tmp_path / "logs") not in said and not re.search(r"20\d\d-", said)


def test_each_epoch_has_a_card(flags, tmp_path):
    assert train_single_task.main(["--task", "T2_math", *flags(max_steps_per_task=1)]) == 0
    (line,) = read(tmp_path / "logs" / "single_T2_math_eval_loss.jsonl")
    card = card_of(tmp_path / "checkpoints" / "single_T2_math_epoch1")
    assert f"| epoch 1 | latest | {line['loss']:.3f} |" in card.text


def test_what_is_known_of_the_data_is_told_and_no_licence_of_the_model():
    def card_with(*tasks, **changes):
        return ModelCard(model_card(BaseConfig(**changes), "a/b", list(tasks), []))

    def data_of(*tasks, **changes):
        return card_with(*tasks, **changes).data

    one = data_of("T2_math", "T5_safety")
    # That of a set is not that of what was learned from it.
    assert one.base_model == "a/b" and one.license is None
    assert one.datasets == ["openai/gsm8k", "Anthropic/hh-rlhf"]
    # Either of two sets: which one is not known.
    tool = card_with("T4_tool")
    assert tool.data.datasets is None and "| apache-2.0 or cc-by-4.0 |" in tool.text
    assert data_of("T2_math", "law", task_data=["law=law.jsonl"]).datasets == ["openai/gsm8k"]
    assert data_of("T2_math", task_data=["T2_math=law.jsonl"]).datasets is None
    (method,) = (t for t in data_of("T2_math", method="replay").tags if t == "replay")
    assert "*slow*" not in model_card(BaseConfig(method=method), "a/b", ["T2_math"], [])


@pytest.mark.parametrize("name", ["model", "/a/b", "a/b/c", "./a/b", "a b/c", "x.gguf"])
def test_what_is_no_hub_id_is_no_base_model(name):
    assert not is_hub_id(name) and is_hub_id("meta-llama/Llama-2-7b-hf")


def test_the_card_is_part_of_the_atomic_folder(make_config, tmp_path, tokenizer, monkeypatch):
    cfg = make_config(save_dir=str(tmp_path))
    journal = make_journal(cfg, inject(make_model()), tokenizer)
    journal.save_checkpoint("c", "a card\n")
    journal.renew_card("c", "another\n")
    assert (tmp_path / "c" / "README.md").read_text() == "another\n"
    assert not list((tmp_path / "c").glob(".*"))
