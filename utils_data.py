"""From a JSON-lines file to passes of token ids: template, held-out split, batches."""

import hashlib
import json
import random
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from jinja2 import TemplateError
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from tqdm import tqdm

from configs.command_line import UserError, shows_progress
from models.forward import IGNORE

KEYS = ("instruction", "input", "output")
# A worse reply to the same prompt: never trained on, but compared with the output.
REJECTED = "rejected"
# Of max_seq_len, what a prompt keeps beside a response that is too long: one part in four.
PROMPT_SHARE = 4


def read_jsonl(path: str | Path) -> list[dict[str, str]]:
    """Rows {"instruction", "input", "output"} of a UTF-8 file with one JSON object a line.

    A byte-order mark, CRLF line ends and blank lines are fine, and null is "". A worse reply may
    stand beside the output as "rejected". Other columns are named once on stderr and left out.
    Raises `UserError` with file, line and fault.
    """
    rows, ignored = [], {}
    try:
        if Path(path).exists() and not Path(path).is_file():
            raise UserError(f"{path} is no file: give a file with one JSON object a line")
        with open(path, "rb") as file:
            _refuse_other_formats(path, file.read(4096))
            file.seek(0)
            for number, line in enumerate(file, 1):
                row = _parse_line(line, f"{path}, line {number}", number == 1)
                if row is None:
                    continue
                rows.append({key: row[key] or "" for key in KEYS})
                if row.get(REJECTED):
                    rows[-1][REJECTED] = row[REJECTED]
                for key in row.keys() - {*KEYS, REJECTED}:
                    ignored[key] = ignored.get(key, 0) + bool(row[key])
    except FileNotFoundError:
        raise UserError(
            f"{path} is missing: run python prepare_datasets.py, or give --use_toy_data true, or "
            "a file of your own with --task_data"
        ) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if not rows:
        raise UserError(f"{path} holds no sample: run python prepare_datasets.py again")
    if not any(row["output"].strip() for row in rows):
        raise UserError(f"{path}: every output is empty, so there is nothing to learn")
    if told := [f"{key} ({number} rows)" for key, number in sorted(ignored.items()) if number]:
        print(f"warning: {path}: columns that are not read: {', '.join(told)}", file=sys.stderr)
    return rows


def _refuse_other_formats(path: str | Path, beginning: bytes) -> None:
    kinds = {b"\x1f\x8b": "a gzip", b"PAR1": "a Parquet", b"PK": "a zip", b"\x28\xb5": "a zstd"}
    for mark, kind in kinds.items():
        if beginning.startswith(mark):
            raise UserError(f"{path} is {kind} file, no text: give one JSON object a line")
    if beginning.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        raise UserError(
            f"{path} is one JSON array, not one object a line: make lines of it, for example with "
            "jq -c '.[]'"
        )


def _parse_line(line: bytes, where: str, is_first: bool) -> dict | None:
    """The row of a line, None of a blank one; `UserError` where it is no row."""
    try:
        text = line.decode("utf-8-sig" if is_first else "utf-8")
        row = json.loads(text) if text.strip() else None
    except UnicodeDecodeError:
        raise UserError(f"{where}: not UTF-8; save the file as UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not a JSON object ({error}); mend the line") from None
    if not text.strip():
        return None
    if not isinstance(row, dict):
        raise UserError(f"{where}: {type(row).__name__}, not a JSON object; mend the line")
    for key in (*KEYS, *({REJECTED} & row.keys())):
        if key not in row:
            raise UserError(f"{where}: key {key!r} is missing; each line needs {KEYS}")
        if not isinstance(row[key], str | None):
            kind = type(row[key]).__name__
            raise UserError(f"{where}: {key!r} is {kind}, not text; mend the line")
        try:
            (row[key] or "").encode("utf-8")
        except UnicodeEncodeError:
            fault = "holds half a surrogate pair; mend the line"
            raise UserError(f"{where}: {key!r} {fault}") from None
    return row


def _sha256(*texts: str) -> bytes:
    return hashlib.sha256("\0".join(texts).encode("utf-8", "surrogatepass")).digest()


def prompt_text(row: dict[str, str]) -> str:
    """A row's prompt as the model reads it, without the template: what makes two rows twins."""
    return "\n".join(filter(None, (row["instruction"].strip(), row["input"].strip())))


def held_out_fraction(row: dict[str, str]) -> float:
    """sha256 of the prompt's first line, NUL and the rest, read as a fraction of 1.

    It depends on what the model reads alone: twins fall on one side, whatever the order of the
    file and the white space around their texts.
    """
    first, _, rest = prompt_text(row).partition("\n")
    return int.from_bytes(_sha256(first, rest), "big") / 2**256


def split_held_out(rows: list[dict], holdout_fraction: float) -> tuple[list[dict], list[dict]]:
    """(training rows in file order, held-out rows in the order of their hash)."""
    train = [row for row in rows if held_out_fraction(row) >= holdout_fraction]
    held_out = [row for row in rows if held_out_fraction(row) < holdout_fraction]
    return train, sorted(held_out, key=held_out_fraction)


# What a checkpoint says of a prompt template that is no tokenizer's own. One turn is what was
# trained, so several are several of them; a system message goes in front of the user's text.
JINJA = """\
{%- set ns = namespace(system='') -%}
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}
{%- set ns.system = message['content'] | trim + '\\n' -%}
{%- elif message['role'] == 'assistant' -%}
{{- ' ' + message['content'] + eos_token -}}
{%- else -%}
{{- OPENING + ns.system + message['content'] | trim + CLOSING -}}
{%- set ns.system = '' -%}
{%- endif -%}
{%- endfor -%}"""


class PromptTemplate:
    """How a row becomes token ids; `kind` is a value of `--prompt_template`.

    inst: `<s>[INST] {instruction}\\n{input} [/INST] {output}</s>`, LLaMA-2's.
    plain: the same without the marks, `<s>{instruction}\\n{input} {output}</s>`.
    chat: the tokenizer's own, with prompt_text as the user's only message and its generation
    prompt; the reply ends with its end-of-turn token.

    `<s>` and `</s>` are the tokenizer's own ids, bos only where the tokenizer adds one by itself.
    The parts are tokenised apart, so the label boundary is exact and a prompt has the same ids in
    training and generation; special tokens inside the data stay plain text. Raises `UserError`
    where the tokenizer has no chat template that can be taken apart.

    Attributes:
        bos, opening, closing: ids of what stands before and after the prompt's content.
        end: ids that end a reply, which are learned.
        stop: ids any of which ends generation.
    """

    def __init__(self, tokenizer, kind: str = "inst"):
        self.tokenizer, self.kind = tokenizer, kind
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        adds_bos = bos is not None and tokenizer("a").input_ids[:1] == [bos]
        self.bos, self.opening, self.closing, self.end = [bos] if adds_bos else [], [], [], [eos]
        # LLaMA-2's tokenizer puts a space in front of every text, byte-level BPE puts none.
        both, x, a = self._encode(["x a", "x", "a"])
        self._adds_space = both == x + a
        # Text before and after the prompt's content, and in front of a reply.
        self._head, self._tail, self._lead = "", "", " "
        if kind == "inst":
            self._head, self._tail = "[INST] ", " [/INST]"
            self.opening = self._encode(["[INST]"])[0]
            self.closing = self._encode_after_space(["[/INST]"])[0]
        elif kind == "chat":
            named = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
            self._marks = {**named, **tokenizer.get_added_vocab()}
            self._head, self._tail, self._lead, ending = self._own_parts()
            self.bos, self.opening = [], self._parse([self._head])[0]
            self.closing = self._parse(["x" + self._tail])[0][len(self._parse(["x"])[0]) :]
            self.end = self._end_of_turn(ending)
        self.stop = sorted({self.end[-1], eos})

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False, split_special_tokens=True).input_ids

    def _parse(self, texts: list[str]) -> list[list[int]]:
        """As `_encode`, but special tokens are what they stand for: of the template's own text."""
        return self.tokenizer(texts, add_special_tokens=False).input_ids

    def _encode_after_space(self, texts: list[str]) -> list[list[int]]:
        own = [text if self._adds_space and text[:1] != " " else " " + text for text in texts]
        return self._encode(own)

    def _encode_after(self, context: str, texts: list[str]) -> list[list[int]]:
        """Ids of each text as it stands behind `context`, a part of the template.

        Where special tokens tempt, or its beginning merges with the context, those of it alone.
        """
        before, alone = self._parse([context])[0], self._encode(texts)
        behind = self._parse([context + text for text in texts])
        return [
            whole[len(before) :]
            if whole[: len(before)] == before and not any(mark in text for mark in self._marks)
            else apart
            for text, whole, apart in zip(texts, behind, alone, strict=True)
        ]

    def _own_parts(self) -> tuple[str, str, str, str]:
        """The tokenizer's template around a message and its reply: head, tail, lead, ending."""
        if not self.tokenizer.chat_template:
            raise UserError(
                "--prompt_template chat: the model's tokenizer has no chat template; give inst or "
                "plain, or the chat version of the model"
            )
        asked, reply = "The user's text", "The model's reply"
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": reply}]
        render = partial(self.tokenizer.apply_chat_template, tokenize=False)
        try:
            head, tail = render(messages[:1], add_generation_prompt=True).split(asked)
            middle, ending = render(messages).split(asked)[1].split(reply)
        except (TemplateError, ValueError, TypeError, IndexError) as error:
            raise UserError(
                "--prompt_template chat: the tokenizer's chat template cannot be taken apart "
                f"({error}); give inst or plain"
            ) from error
        # Where a space stands in front of every reply it belongs to the reply, as with [/INST];
        # empty thoughts do not: no server puts them into a prompt.
        lead = middle[len(tail) :] if middle.startswith(tail) else ""
        return head, tail, "" if lead.strip() else lead, ending.strip()

    def _end_of_turn(self, ending: str) -> list[int]:
        """Ids of `ending` up to its first special token; where it has none, with eos."""
        ids = self._parse(["x" + ending])[0][len(self._parse(["x"])[0]) :]
        special = {*self._marks.values()}
        first = next((i for i, token in enumerate(ids) if token in special), None)
        return [*ids, self.tokenizer.eos_token_id] if first is None else ids[: first + 1]

    def prompts(self, rows: list[dict]) -> list[list[int]]:
        """Ids of each row's prompt with what stands before it, without bos and `closing`."""
        texts = [prompt_text(row) for row in rows]
        if self.kind == "chat":
            return [self.opening + ids for ids in self._encode_after(self._head, texts)]
        return self._encode([self._head + text for text in texts])

    def responses(self, rows: list[dict]) -> list[list[int]]:
        """Ids of each row's output and `end`; [] where the output is empty."""
        # A leading-space strip would break indented code.
        outputs = [row["output"].lstrip("\r\n").rstrip() for row in rows]
        if self.kind == "chat":
            encoded = self._encode_after(self._tail, [self._lead + text for text in outputs])
        else:
            encoded = self._encode_after_space(outputs)
        return [ids + self.end if text else [] for text, ids in zip(outputs, encoded, strict=True)]

    def join(self, prompt: list[int], room: int) -> list[int]:
        """bos, `prompt` and `closing` in at most `room` tokens.

        The prompt's end gives way, but what stands around it stays whole even beyond `room`.
        """
        room = max(room - len(self.bos) - len(self.closing), len(self.opening))
        # A model has to start from something.
        return self.bos + prompt[:room] + self.closing or self.end

    def chat_template(self) -> str:
        """Jinja with which `apply_chat_template` gives the ids of our prompts."""
        if self.kind == "chat":
            return self.tokenizer.get_chat_template()
        head = self._head
        if self.bos:
            # Behind a special token some tokenizers put no space of their own in front of a text.
            bos, (row,) = self.tokenizer.bos_token, [{"instruction": "a", "input": ""}]
            wanted = self.join(self.prompts([row])[0], 10**6)
            text = f"{bos}{head}a{self._tail}"
            head = head if self._parse([text])[0] == wanted else " " + head
        opening = ("bos_token + " if self.bos else "") + repr(head)
        return JINJA.replace("OPENING", opening).replace("CLOSING", repr(self._tail))


class InstructionDataset(Dataset):
    """Samples of one task, tokenised.

    Args:
        path_or_rows: a JSON-lines file, or rows {"instruction", "input", "output"}.
        tokenizer: a Hugging Face tokenizer with an eos token.
        max_length: tokens per sample; see `PromptTemplate.join` for what is cut.
        prompt_template: the kind of `PromptTemplate`.

    Attributes:
        lengths: tokens of each sample.
        num_prompts_cut, num_responses_cut: samples too long for `max_length`.
        num_dropped: samples left without a response token, which are not in the data set.
    """

    def __init__(self, path_or_rows, tokenizer, max_length: int, prompt_template: str = "inst"):
        is_path = isinstance(path_or_rows, str | Path)
        rows = read_jsonl(path_or_rows) if is_path else list(path_or_rows)
        template = PromptTemplate(tokenizer, prompt_template)
        self.num_prompts_cut = self.num_responses_cut = self.num_dropped = 0
        self._samples: list[tuple[str, torch.Tensor, int]] = []
        chunks = [rows[i : i + 1000] for i in range(0, len(rows), 1000)]
        for chunk in tqdm(
            chunks, desc="tokenising", leave=False, disable=len(chunks) <= 5 or not shows_progress()
        ):
            encoded = zip(chunk, template.prompts(chunk), template.responses(chunk), strict=True)
            for row, prompt, response in encoded:
                full = template.join(prompt, room=10**9)
                least = len(template.join([], 0)) + max_length // PROMPT_SHARE
                kept = template.join(prompt, room=max(max_length - len(response), least))
                space = max_length - len(kept)
                if not response or space < 1:
                    self.num_dropped += 1
                    continue
                self.num_prompts_cut += len(kept) < len(full)
                self.num_responses_cut += len(response) > space
                ids = torch.tensor(kept + response[:space], dtype=torch.int32)
                self._samples.append((_sha256(*(row[key] for key in KEYS)).hex(), ids, len(kept)))
        self.lengths = [len(ids) for _, ids, _ in self._samples]

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, i: int) -> dict:
        """The text's sha256 as "id"; "input_ids", "attention_mask", "labels": (length,) long."""
        sample_id, ids, prompt_length = self._samples[i]
        input_ids = ids.long()
        labels = input_ids.clone()
        labels[:prompt_length] = IGNORE
        return {
            "id": sample_id,
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "labels": labels,
        }


def collate_fn(batch: list[dict], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Pads on the right to (batch, longest): what any `AutoModelForCausalLM` takes."""
    padding = {"input_ids": pad_token_id, "attention_mask": 0, "labels": IGNORE}
    return {
        key: pad_sequence([sample[key] for sample in batch], batch_first=True, padding_value=value)
        for key, value in padding.items()
        if key in batch[0]
    }


def read_task(cfg, task: str) -> tuple[list[dict], list[dict] | None]:
    """(rows of the file of `task`, rows of its test file or None where it has none)."""
    test = cfg.test_path(task)
    return read_jsonl(cfg.data_path(task)), read_jsonl(test) if test else None


def split_task(cfg, rows: list[dict], test: list[dict] | None) -> tuple[list[dict], list[dict]]:
    """(rows to train on, rows to evaluate on) of what `read_task` gave.

    A test file takes the place of the held-out share. Twins of what is evaluated are not trained
    on. Of many rows those with the lowest hash are evaluated: a choice, whatever their order.
    """
    if test is None:
        train, held_out = split_held_out(rows, cfg.holdout_fraction)
    else:
        prompts = set(map(prompt_text, test))
        train = [row for row in rows if prompt_text(row) not in prompts]
        held_out = sorted(test, key=held_out_fraction)
    return train, held_out[: cfg.eval_samples_per_task or None]


@dataclass
class TaskData:
    """The training and the held-out samples of one task.

    Attributes:
        held_out_rows: of the held-out samples.
        outputs: of all rows that may be trained on, which `max_train_samples` chooses from.
    """

    train: InstructionDataset
    held_out: InstructionDataset
    held_out_rows: list[dict] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)


def prepare_task(
    cfg, tokenizer, task: str, rows: list[dict], test: list[dict] | None = None
) -> TaskData:
    """Splits and tokenises the rows of `task` and prints what was kept, cut and dropped.

    `test` is that of `read_task`. Raises `UserError` where either side of the split is empty.
    """
    train, held_out = split_task(cfg, rows, test)
    if test is not None and len(train) < len(rows):
        print(f"{task}: {len(rows) - len(train)} samples are in the test file: not trained on")
    outputs = [row["output"] for row in train]
    if cfg.max_train_samples:
        size = min(cfg.max_train_samples, len(train))
        train = random.Random(f"{cfg.seed}/{task}/train").sample(train, size)
    data = TaskData(
        InstructionDataset(train, tokenizer, cfg.max_seq_len, cfg.prompt_template),
        InstructionDataset(held_out, tokenizer, cfg.max_seq_len, cfg.prompt_template),
        held_out,
        outputs,
    )
    for name in ("train", "held_out"):
        if not len(getattr(data, name)):
            path = cfg.test_path(task) if name == "held_out" else ""
            raise UserError(
                f"{path or cfg.data_path(task)} gives no {name} sample: add samples, or change "
                f"holdout_fraction ({cfg.holdout_fraction}) or max_seq_len ({cfg.max_seq_len})"
            )
    both = data.train, data.held_out
    print(
        f"{task}: {len(data.train)} samples to train on, {len(data.held_out)} held out; "
        f"{sum(d.num_prompts_cut for d in both)} prompts and "
        f"{sum(d.num_responses_cut for d in both)} responses cut to {cfg.max_seq_len} tokens "
        f"(a prompt keeps {cfg.max_seq_len // PROMPT_SHARE} of its own), "
        f"{sum(d.num_dropped for d in both)} dropped without a response"
    )
    return data
