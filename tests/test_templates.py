"""--prompt_template: chat templates of three styles, their labels, cuts, and what is saved."""

import pytest
import torch
from helpers import errors, inject, make_journal, make_model, make_rows, mean_loss, read
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, pipeline

import chat
import evaluate_tasks
import train_slsd_seq
from configs.command_line import UserError
from evaluation import likelihood
from evaluation.generate import generate, greedy, left_padded, prompt_ids
from evaluation.questions import held_out_questions
from evaluation.readings import BASE, LATEST, Stage, open_stage
from models.forward import IGNORE
from tasks.prompt import PromptTemplate, prompt_text
from training.passes import Passes, StopSignals
from utils_data import InstructionDataset

CHATML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}"
    "<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
# Template, its special tokens, and the one that ends a turn.
STYLES = {
    "chatml": (CHATML, ["<|im_start|>", "<|im_end|>"], "<|im_end|>"),
    "llama3": (LLAMA3, ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], "<|eot_id|>"),
    "gemma": (GEMMA, ["<start_of_turn>", "<end_of_turn>"], "<end_of_turn>"),
}
ROWS = [
    *make_rows("T1_general", 3),
    {"instruction": "Indent.", "input": "x = 1", "output": "    return x\n        pass"},
    {"instruction": "多语言", "input": "emoji 🙂", "output": "naïve café 🙂"},
    {"instruction": "(odd) [", "input": "a  b\tc", "output": "[INST]"},
]
ROW = {"instruction": "sum 1 and 2", "input": ""}
TEMPTING = {
    "instruction": "What are <|im_end|>, <|eot_id|>, <end_of_turn> and </s>?",
    "input": "",
    "output": "<|im_end|> and <|eot_id|>, <end_of_turn>, </s> are marks.",
}


def make_tokenizer(style: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE, for gemma SentencePiece-like: spaces are a letter and words may merge."""
    template, marks, _ = STYLES[style]
    tokenizer = Tokenizer(models.BPE())
    special = ["<s>", "</s>", "<pad>", *marks]
    if style == "gemma":
        # As in Gemma's vocabulary, line ends merge with nothing but themselves.
        parts = [
            pre_tokenizers.Split("\n", "isolated"),
            pre_tokenizers.Metaspace(prepend_scheme="never", split=False),
        ]
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="never", split=False)
        trainer = trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=special,
            initial_alphabet=[chr(i) for i in range(33, 127)],
        )
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=310, special_tokens=special, initial_alphabet=alphabet
        )
    texts = ["\n".join([*row.values(), "user", "model"]) for row in [*ROWS, TEMPTING]]
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=marks,
        chat_template=template,
    )


@pytest.fixture(scope="module", params=STYLES)
def style(request):
    """(tokenizer, id that ends a turn)."""
    tokenizer = make_tokenizer(request.param)
    return tokenizer, tokenizer.convert_tokens_to_ids(STYLES[request.param][2])


def rendered(tokenizer, row) -> list[int]:
    message = {"role": "user", "content": prompt_text(row)}
    options = {"add_generation_prompt": True, "return_dict": False}
    return tokenizer.apply_chat_template([message], **options)


def labelled(sample) -> tuple[list[int], list[int]]:
    """(ids without a label, labels)."""
    labels = sample["labels"]
    return sample["input_ids"][labels == IGNORE].tolist(), labels[labels != IGNORE].tolist()


def test_a_prompt_is_the_tokenizers_own_and_the_reply_and_its_end_are_learned(style):
    tokenizer, end = style
    template = PromptTemplate(tokenizer, "chat")
    samples = InstructionDataset(ROWS, tokenizer, 512, "chat")
    for sample, row in zip(samples, ROWS, strict=True):
        prompt, labels = labelled(sample)
        assert prompt == rendered(tokenizer, row) == prompt_ids(template, [row], 512)[0]
        assert labels[-1] == end and end not in labels[:-1]
        assert tokenizer.decode(labels[:-1]) == row["output"]
        both = [
            {"role": "user", "content": prompt_text(row)},
            {"role": "assistant", "content": row["output"]},
        ]
        # Gemma's and Llama-3's templates strip a reply, whose indentation ours keeps.
        if not row["output"].startswith(" "):
            whole = tokenizer.apply_chat_template(both, return_dict=False)
            assert whole[: len(prompt) + len(labels)] == prompt + labels
    assert template.stop == sorted({end, tokenizer.eos_token_id})


def test_special_tokens_in_the_data_stay_plain_text(style):
    tokenizer, end = style
    (sample,) = InstructionDataset([TEMPTING], tokenizer, 1024, "chat")
    prompt, labels = labelled(sample)
    plain = rendered(tokenizer, {"instruction": "plain", "input": ""})
    assert prompt.count(end) == plain.count(end) and labels.count(end) == 1
    assert tokenizer.eos_token_id not in prompt + labels
    assert tokenizer.decode(labels[:-1]) == TEMPTING["output"]
    assert TEMPTING["instruction"] in tokenizer.decode(prompt)


def test_too_long_a_prompt_keeps_the_templates_parts_whole(style):
    tokenizer, end = style
    template = PromptTemplate(tokenizer, "chat")
    row = {"instruction": "word " * 100, "input": "", "output": "It is 3."}
    (sample,) = data = InstructionDataset([row], tokenizer, 100, "chat")
    assert (data.num_prompts_cut, data.num_responses_cut) == (1, 0)
    prompt, labels = labelled(sample)
    assert len(prompt) + len(labels) == 100 and labels[-1] == end
    size = len(template.closing)
    assert (
        prompt[: len(template.opening)] == template.opening and prompt[-size:] == template.closing
    )
    assert rendered(tokenizer, {"instruction": "a", "input": ""})[-size:] == template.closing
    assert template.join(template.prompts([row])[0], 1) == template.opening + template.closing


def test_generation_stops_at_the_end_of_a_turn(style):
    tokenizer, end = style
    model = make_model(vocab_size=len(tokenizer))
    model.lm_head = torch.nn.Linear(32, len(tokenizer))
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.bias.zero_()[end] = 1.0
    for kind, tokens in (("chat", 1), ("inst", 5)):
        template = PromptTemplate(tokenizer, kind)
        inputs = left_padded(prompt_ids(template, ROWS[:1], 512), tokenizer.pad_token_id, "cpu")
        with greedy(model, template, 5):
            replies = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
        assert replies.tolist() == [[end] * tokens]


@pytest.mark.parametrize("kind", ["inst", "plain", "chat"])
def test_what_is_saved_prompts_as_was_trained(style, kind, make_config, tmp_path):
    tokenizer, _ = style
    cfg = make_config(save_dir=str(tmp_path), prompt_template=kind)
    own = tokenizer.chat_template
    model = inject(make_model())
    make_journal(cfg, model, tokenizer).save_checkpoint("c")
    saved = AutoTokenizer.from_pretrained(tmp_path / "c")
    assert tokenizer.chat_template == own and (saved.chat_template == own) == (kind == "chat")
    template = PromptTemplate(tokenizer, kind)
    for row in ROWS:
        assert rendered(saved, row) == prompt_ids(template, [row], 512)[0]


def test_a_bos_and_spaces_of_the_tokenizers_own_are_in_the_saved_template():
    """SentencePiece's first space stands behind bos too."""
    words = [chr(i) for i in range(33, 127)] + ["\u2581"]
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *words])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    for kind in ("inst", "plain"):
        template = PromptTemplate(tokenizer, kind)
        tokenizer.chat_template = template.chat_template()
        row = {"instruction": "Add.", "input": "1 and 2"}
        prompt = prompt_ids(template, [row], 99)[0]
        assert prompt[0] == 1 and rendered(tokenizer, row) == prompt


def test_plain_is_the_bare_text(tokenizer):
    row = {"instruction": "Add.", "input": "1 and 2", "output": "It is 3."}
    (sample,) = InstructionDataset([row], tokenizer, 64, "plain")
    ids, eos = sample["input_ids"].tolist(), tokenizer.eos_token_id
    assert tokenizer.decode(ids[:-1]) == "Add.\n1 and 2 It is 3." and ids[-1] == eos
    assert tokenizer.decode(labelled(sample)[0]) == "Add.\n1 and 2"
    # Something to start from, even where nothing was asked.
    empty = {"instruction": "", "input": "", "output": "Yes."}
    assert labelled(InstructionDataset([empty], tokenizer, 64, "plain")[0])[0] == [eos]


def test_a_template_that_cannot_be_used_is_one_line(tokenizer, flags, capsys, tmp_path):
    assert train_slsd_seq.main(flags(prompt_template="chat")) == 2
    (line,) = errors(capsys)
    assert "--prompt_template chat: the model's tokenizer has no chat template" in line
    broken = make_tokenizer("chatml")
    for text in ("no message at all", "{{ raise_exception('two turns only') }}"):
        broken.chat_template = text
        with pytest.raises(UserError, match="cannot be taken apart") as caught:
            PromptTemplate(broken, "chat")
        assert "\n" not in str(caught.value)


@pytest.fixture
def chat_folder(tmp_path):
    tokenizer = make_tokenizer("chatml")
    make_model(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_a_run_records_its_template_and_what_reads_it_follows(
    flags, make_config, chat_folder, tmp_path, monkeypatch, capsys
):
    tasks = ["T1_general", "T2_math"]
    settings = {"model_name": chat_folder, "task_order": tasks, "eval_samples_per_task": 2}
    settings["max_seq_len"] = 128
    assert train_slsd_seq.main(flags(**settings, dry_run=True)) == 0
    assert "note: the tokenizer has a chat template" in capsys.readouterr().err
    argv = flags(**settings)
    assert train_slsd_seq.main([*argv, "--prompt_template", "chat"]) == 0
    told = capsys.readouterr()
    assert "note:" not in told.err and "branches beside 2 q_proj, 2 v_proj" in told.out
    folder = tmp_path / "checkpoints" / "seq_T2_math"
    # Whatever is given: the checkpoint's.
    stage = open_stage(make_config(**settings), str(folder))
    assert stage.cfg.prompt_template == stage.passes.template.kind == "chat"
    with monkeypatch.context() as inside:
        inside.chdir(folder)
        assert open_stage(make_config(**settings), ".").name == "T2_math"
    asked = [*argv, "--checkpoint", str(folder), "--max_new_tokens", "3"]
    assert evaluate_tasks.main(asked) == 0
    assert read(tmp_path / "logs" / "scores_T2_math.jsonl")
    lines = iter(["sum 1 and 2", "/quit"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    assert chat.main(asked) == 0
    # Without this repository: the folder alone prompts, and ends, as was trained.
    capsys.readouterr()
    message = [{"role": "user", "content": "sum 1 and 2"}]
    with greedy(stage.passes.model, stage.passes.template, 3):
        settings = stage.passes.model.generation_config
    served = pipeline("text-generation", str(folder), tokenizer=str(folder), device="cpu")
    (answer,) = served(message, generation_config=settings)
    ours = generate(stage.passes, prompt_ids(stage.passes.template, [ROW], 128), 3)
    assert answer["generated_text"][-1]["content"].strip() == ours[0]


@pytest.mark.parametrize("template", ["inst", "plain", "chat"])
def test_a_better_and_a_worse_reply_are_read_in_the_runs_own_template(
    make_config, monkeypatch, template
):
    """The better one from what was kept of the same held-out sample."""
    tokenizer = make_tokenizer("chatml")
    model = inject(make_model(vocab_size=len(tokenizer)))
    cfg = make_config(prompt_template=template, max_seq_len=128)
    passes = Passes(cfg, model, tokenizer, torch.device("cpu"), StopSignals())
    rows = [{**row, "rejected": f"{row['output']} never"} for row in make_rows("T5_safety", 6)]
    worse = [{**row, "output": row["rejected"]} for row in rows]
    samples = [InstructionDataset(x, tokenizer, 128, template) for x in (rows, worse)]
    passes.keep_prefix(samples[0], "frozen layers")
    assert samples[0][0]["id"] in passes.prefix
    losses, original = [], likelihood.sample_losses
    monkeypatch.setattr(
        likelihood, "sample_losses", lambda *args: losses.append(original(*args)) or losses[-1]
    )
    questions = held_out_questions(cfg, "T5_safety", rows, [])
    (line,) = likelihood.prefer(Stage(BASE, cfg, passes, {}), LATEST, questions)
    assert line["n"] == len(rows)
    for found, of_reply in zip(losses, samples, strict=True):
        expected = [mean_loss(model, [sample]).item() for sample in of_reply]
        assert found.tolist() == pytest.approx(expected, rel=1e-4)
