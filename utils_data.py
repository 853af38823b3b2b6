"""From a JSON-lines file to passes of token ids: template, held-out split, batches."""

import hashlib
import json
import random
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from tqdm import tqdm

from configs.command_line import UserError, shows_progress
from models.forward import IGNORE

KEYS = ("instruction", "input", "output")


def read_jsonl(path: str | Path) -> list[dict[str, str]]:
    """Rows {"instruction", "input", "output"} of a UTF-8 file with one JSON object a line.

    A byte-order mark, CRLF line ends and blank lines are fine. Raises `UserError` with file, line
    and fault.
    """
    rows = []
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                where = f"{path}, line {number}"
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                    row = json.loads(text) if text.strip() else None
                except UnicodeDecodeError:
                    raise UserError(f"{where}: not UTF-8; save the file as UTF-8") from None
                except (ValueError, RecursionError) as error:
                    raise UserError(
                        f"{where}: not a JSON object ({error}); mend the line"
                    ) from None
                if row is None and not text.strip():
                    continue
                if not isinstance(row, dict):
                    raise UserError(
                        f"{where}: {type(row).__name__}, not a JSON object; mend the line"
                    )
                for key in KEYS:
                    if key not in row:
                        raise UserError(f"{where}: key {key!r} is missing; each line needs {KEYS}")
                    if not isinstance(row[key], str):
                        kind = type(row[key]).__name__
                        raise UserError(f"{where}: {key!r} is {kind}, not text; mend the line")
                    try:
                        row[key].encode("utf-8")
                    except UnicodeEncodeError:
                        fault = "holds half a surrogate pair; mend the line"
                        raise UserError(f"{where}: {key!r} {fault}") from None
                rows.append({key: row[key] for key in KEYS})
    except FileNotFoundError:
        raise UserError(
            f"{path} is missing: run python prepare_datasets.py, or give --use_toy_data true"
        ) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if not rows:
        raise UserError(f"{path} holds no sample: run python prepare_datasets.py again")
    return rows


def _sha256(*texts: str) -> bytes:
    return hashlib.sha256("\0".join(texts).encode("utf-8", "surrogatepass")).digest()


def held_out_fraction(row: dict[str, str]) -> float:
    """sha256 of instruction, NUL and input, read as a fraction of 1.

    It depends on the text alone: duplicates fall on one side, whatever the order of the file.
    """
    return int.from_bytes(_sha256(row["instruction"], row["input"]), "big") / 2**256


def split_held_out(rows: list[dict], holdout_fraction: float) -> tuple[list[dict], list[dict]]:
    """(training rows in file order, held-out rows in the order of their hash)."""
    train = [row for row in rows if held_out_fraction(row) >= holdout_fraction]
    held_out = [row for row in rows if held_out_fraction(row) < holdout_fraction]
    return train, sorted(held_out, key=held_out_fraction)


class PromptTemplate:
    """`<s>[INST] {instruction}\\n{input} [/INST] {output}</s>` as token ids.

    `<s>` and `</s>` are the tokenizer's own ids, bos only where the tokenizer adds one by itself.
    The parts are tokenised apart, so the label boundary is exact and a prompt has the same ids in
    training and generation; special tokens inside the data stay plain text.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        bos = tokenizer.bos_token_id
        adds_bos = bos is not None and tokenizer("a").input_ids[:1] == [bos]
        self.bos, self.eos = [bos] if adds_bos else [], [tokenizer.eos_token_id]
        # LLaMA-2's tokenizer puts a space in front of every text, byte-level BPE puts none.
        self._adds_space = self._encode(["x a"])[0][-1] == self._encode(["a"])[0][-1]
        self.opening, self.closing = (
            self._encode(["[INST]"])[0],
            self._encode_after_space(["[/INST]"])[0],
        )

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False, split_special_tokens=True).input_ids

    def _encode_after_space(self, texts: list[str]) -> list[list[int]]:
        own = [text if self._adds_space and text[:1] != " " else " " + text for text in texts]
        return self._encode(own)

    def prompts(self, rows: list[dict]) -> list[list[int]]:
        """Ids of `[INST] {instruction}\\n{input}` for each row, without bos and ` [/INST]`."""
        contents = [
            "\n".join(filter(None, (r["instruction"].strip(), r["input"].strip()))) for r in rows
        ]
        return self._encode([f"[INST] {content}" for content in contents])

    def responses(self, rows: list[dict]) -> list[list[int]]:
        """Ids of each row's output and eos; [] where the output is empty."""
        # A leading-space strip would break indented code.
        outputs = [row["output"].lstrip("\r\n").rstrip() for row in rows]
        encoded = self._encode_after_space(outputs)
        return [ids + self.eos if text else [] for text, ids in zip(outputs, encoded, strict=True)]

    def join(self, prompt: list[int], room: int) -> list[int]:
        """bos, `prompt` and ` [/INST]` in at most `room` tokens.

        The prompt's end gives way, but `[INST]` and ` [/INST]` stay whole even beyond `room`.
        """
        room = max(room - len(self.bos) - len(self.closing), len(self.opening))
        return self.bos + prompt[:room] + self.closing


class InstructionDataset(Dataset):
    """Samples of one task, tokenised.

    Args:
        path_or_rows: a JSON-lines file, or rows {"instruction", "input", "output"}.
        tokenizer: a Hugging Face tokenizer with an eos token.
        max_length: tokens per sample; see `PromptTemplate.join` for what is cut.

    Attributes:
        lengths: tokens of each sample.
        num_prompts_cut, num_responses_cut: samples too long for `max_length`.
        num_dropped: samples left without a response token, which are not in the data set.
    """

    def __init__(self, path_or_rows, tokenizer, max_length: int):
        is_path = isinstance(path_or_rows, str | Path)
        rows = read_jsonl(path_or_rows) if is_path else list(path_or_rows)
        template = PromptTemplate(tokenizer)
        self.num_prompts_cut = self.num_responses_cut = self.num_dropped = 0
        self._samples: list[tuple[str, torch.Tensor, int]] = []
        chunks = [rows[i : i + 1000] for i in range(0, len(rows), 1000)]
        for chunk in tqdm(
            chunks, desc="tokenising", leave=False, disable=len(chunks) <= 5 or not shows_progress()
        ):
            encoded = zip(chunk, template.prompts(chunk), template.responses(chunk), strict=True)
            for row, prompt, response in encoded:
                full = template.join(prompt, room=10**9)
                kept = template.join(prompt, room=max_length - len(response))
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


def held_out_rows(cfg, rows: list[dict]) -> list[dict]:
    """The rows of a task that are evaluated and never trained on."""
    return split_held_out(rows, cfg.holdout_fraction)[1][: cfg.eval_samples_per_task or None]


@dataclass
class TaskData:
    """The training and the held-out samples of one task, and the rows of the held-out ones."""

    train: InstructionDataset
    held_out: InstructionDataset
    held_out_rows: list[dict] = field(default_factory=list)


def prepare_task(cfg, tokenizer, task: str, rows: list[dict]) -> TaskData:
    """Splits and tokenises the rows of `task` and prints what was kept, cut and dropped.

    Raises `UserError` where either side of the split is empty.
    """
    train, held_out = split_held_out(rows, cfg.holdout_fraction)[0], held_out_rows(cfg, rows)
    if cfg.max_train_samples:
        size = min(cfg.max_train_samples, len(train))
        train = random.Random(f"{cfg.seed}/{task}/train").sample(train, size)
    data = TaskData(
        InstructionDataset(train, tokenizer, cfg.max_seq_len),
        InstructionDataset(held_out, tokenizer, cfg.max_seq_len),
        held_out,
    )
    for name in ("train", "held_out"):
        if not len(getattr(data, name)):
            raise UserError(
                f"{cfg.data_path(task)} gives no {name} sample: add samples, or change "
                f"holdout_fraction ({cfg.holdout_fraction}) or max_seq_len ({cfg.max_seq_len})"
            )
    both = data.train, data.held_out
    print(
        f"{task}: {len(data.train)} samples to train on, {len(data.held_out)} held out; "
        f"{sum(d.num_prompts_cut for d in both)} prompts and "
        f"{sum(d.num_responses_cut for d in both)} responses cut to {cfg.max_seq_len} tokens, "
        f"{sum(d.num_dropped for d in both)} dropped without a response"
    )
    return data
