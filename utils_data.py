"""From a JSON-lines file to passes of token ids: template, held-out split, batches."""

import hashlib
import json
import random
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from tqdm import tqdm

from configs.command_line import UserError, shows_progress
from models.forward import IGNORE
from tasks.prompt import KEYS, REJECTED, PromptTemplate, prompt_text

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
    padding = {"input_ids": pad_token_id, "attention_mask": 0, "labels": IGNORE, "parents": 0}
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
