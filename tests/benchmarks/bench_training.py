"""Times the project's own training loop, and with --parts what surrounds it.

    python tests/benchmarks/bench_training.py --model DIR --data FILE.jsonl --device cpu

16 samples a step, in the order of the file, none longer than --max_seq_len. The last line is one
JSON object. Tokens are real ones, prompt and response, without padding.
"""

import argparse
import contextlib
import dataclasses
import json
import random
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import train_slsd_seq
from configs.base_config import BaseConfig
from configs.smollm2_config import SmolLM2Config
from methods import slsd
from models import answers
from models.ds_lora import DSLoRALinear, find_decoder_layers, replace_with_ds_lora
from models.forward import IGNORE, response_tokens
from training import loop
from training import passes as passes_module
from training.base_model import check_model, load_model, load_tokenizer
from training.journal import Journal
from training.loop import TaskTraining, evaluate_loss
from training.passes import Passes, StopSignals
from training.plan import data_order
from training.saving import RunState
from training.session import Session, enable_checkpointing
from utils_data import InstructionDataset, TaskData, read_jsonl

TASK = "T1_general"
LLAMA_7B = {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008}
LLAMA_7B |= {"num_hidden_layers": 32, "num_attention_heads": 32, "max_position_embeddings": 4096}


class Clock:
    """Takes the place of the training log: notes when each step ended."""

    def __init__(self, device):
        self.device, self.marks, self.losses = device, [], []

    def write(self, **line):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.marks.append(time.perf_counter())
        self.losses.append(line["loss"])


class Rows(list):
    """Samples with their lengths, like an `InstructionDataset`."""

    @property
    def lengths(self):
        return [len(sample["input_ids"]) for sample in self]


def synthetic(length: int, number: int) -> Rows:
    """Random samples of one length; the second half of each is the response."""
    generator = torch.Generator().manual_seed(0)
    rows = Rows()
    for i in range(number):
        ids = torch.randint(3, 30000, (length,), generator=generator)
        labels = torch.where(torch.arange(length) < length // 2, IGNORE, ids)
        rows.append({"id": f"{i:064x}", "input_ids": ids, "labels": labels})
    return rows


def build_model(cfg, device):
    """(model with branches, tokenizer or None)."""
    if cfg.model_name == "llama7b":
        from transformers import LlamaConfig, LlamaForCausalLM

        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        torch.set_default_dtype(dtype)
        with torch.device(device):
            model = LlamaForCausalLM(LlamaConfig(**LLAMA_7B)).eval()
        torch.set_default_dtype(torch.float32)
    else:
        model = load_model(cfg, device)
    frozen = len(find_decoder_layers(model)[1]) // 2
    replace_with_ds_lora(
        model, cfg.lora_target_modules, cfg.lora_r, cfg.lora_alpha, cfg.lora_dropout, frozen
    )
    cfg.num_frozen_layers = frozen
    if cfg.gradient_checkpointing:
        enable_checkpointing(model)
    return model


def without(names) -> None:
    """Replaces an optimisation by what one would do without it."""

    def all_positions(model, input_ids, positions, start=contextlib.nullcontext):
        with start():
            return model(input_ids=input_ids, use_cache=False).logits.flatten(0, 1)[positions]

    def two_products(self, x):
        y = self.base_layer(x)
        for name in self.active:
            A, B = (p.to(x.dtype) for p in self.branch(name))
            y = y + F.linear(F.linear(self.dropout(x), A) * self.scaling, B)
        return y

    if "response_head" in names:
        for module in (answers, slsd, loop):
            module.response_logits = all_positions
    if "one_product" in names:
        DSLoRALinear.forward = two_products
    if "padding_limit" in names:
        passes_module.PASS_COST = {"cpu": 10**9, "cuda": 10**9}


def matrix_rate(device, dtype) -> float:
    """FLOP/s of large matrix products, the median of ten."""
    size = 8192 if device.type == "cuda" else 2048
    a = torch.randn(size, size, device=device, dtype=dtype)
    return 2 * size**3 / median_seconds(lambda: a @ a, device, 10)


def median_seconds(work, device, times: int = 5) -> float:
    """Median time of `work()` after one that does not count."""
    seconds = []
    for _ in range(times + 1):
        begun = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds[1:])


def useful_flops(model, samples, kept: bool) -> float:
    """Of a step: forward of all layers (the upper ones where the prefix is kept), backward of the
    activations of the upper ones, output embedding at response positions, causal attention."""
    layers = find_decoder_layers(model)[1]
    frozen = sum(not any(p.requires_grad for p in layer.parameters()) for layer in layers)
    weights = [sum(p.numel() for p in layer.parameters() if p.dim() > 1) for layer in layers]
    config = model.config.get_text_config()
    run = range(frozen if kept else 0, len(layers))
    passes = [(i, 1 + (i >= frozen)) for i in run]
    total = 0
    for sample in samples:
        n, responses = len(sample["input_ids"]), response_tokens(sample)
        for i, times in passes:
            attention = 2 * n * n * config.hidden_size * (1 if times == 1 else 3)
            total += 2 * n * weights[i] * times + attention
        total += 4 * responses * config.vocab_size * config.hidden_size
    return total


def peak_gib(device) -> dict:
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 2**30
    on_gpu = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
    return {
        "peak_memory_gib": host if on_gpu is None else on_gpu,
        "peak_host_gib": host,
        "peak_device_gib": on_gpu,
    }


def bench_parts(cfg, session, rows) -> dict:
    """Evaluation, probes, distillation, saving: seconds and bytes."""
    passes, found = session.passes, {}
    device, prefix = passes.device, passes.prefix

    def evaluate():
        return evaluate_loss(passes, rows)

    room, prefix.room = prefix.room, 0
    found["evaluate_plain_seconds"] = median_seconds(evaluate, device)
    prefix.room = room
    begun = time.perf_counter()
    kept = passes.keep_prefix(rows, "frozen layers")
    found["evaluate_prefix_seconds"] = time.perf_counter() - begun
    found["evaluate_kept_seconds"] = median_seconds(evaluate, device)
    found["evaluate_ratio"] = found["evaluate_plain_seconds"] / found["evaluate_kept_seconds"]
    every_sample = dataclasses.replace(cfg, entropy_threshold=1e9)
    method = train_slsd_seq.make_method(every_sample, session)

    def probes():
        method.read_pool(TASK, rows)

    found["probe_pool"] = min(len(rows), cfg.probe_pool_factor * cfg.probe_size_per_task)
    found["probes_kept_seconds"] = median_seconds(probes, device)
    prefix.drop(kept)
    found["probes_plain_seconds"] = median_seconds(probes, device)
    tensors = method.buffer.tensors()
    found["probe_buffer_bytes"] = sum(tensor.nbytes for tensor in tensors.values())
    found["probe_buffer_response_tokens"] = len(method.buffer.log_tail)
    found["probe_buffer_bytes_at_500x256"] = (
        found["probe_buffer_bytes"] / found["probe_buffer_response_tokens"] * 500 * 256
    )
    passes.keep_prefix(list(method.buffer), "probes")
    passes.model.train()
    steps = iter(range(0, 10**6, cfg.kd_every))

    def distil():
        method.aux_backward(next(steps), lambda loss: loss.backward())

    found["kd_seconds"] = median_seconds(distil, device, 15)
    passes.model.eval()
    found["save_seconds"] = median_seconds(
        lambda: session.journal.save({}, {"method": method.state()}), torch.device("cpu")
    )
    return found


def slsd_share(cfg, result: dict, samples: int, epochs: int) -> float:
    """Probe building and distillation of a task, of its time without them."""
    steps = samples * epochs / cfg.samples_per_step
    pool = min(samples, cfg.probe_pool_factor * cfg.probe_size_per_task)
    probes = result["probes_plain_seconds"] / result["probe_pool"] * pool
    kd = result["kd_seconds"] * steps / cfg.kd_every
    return (probes + kd) / (steps * result["seconds_per_step"])


def checkpoint_at_7b(cfg, tokenizer) -> dict:
    """Seconds and bytes of a stage checkpoint of LLaMA-2-7B's shape; the base has no weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**LLAMA_7B))
    replace_with_ds_lora(model)
    for layer in model.modules():
        if isinstance(layer, DSLoRALinear):
            for name, parameter in list(layer.named_parameters(recurse=False)):
                setattr(layer, name, nn.Parameter(torch.randn(parameter.shape)))
    of_model = Passes(cfg, model, tokenizer, torch.device("cpu"), StopSignals())
    path = Path(cfg.save_dir) / "stage"
    journal = Journal(cfg, of_model, {"base_model": "llama7b"}, RunState(path), {})
    seconds = median_seconds(lambda: journal.save_checkpoint(path.name), of_model.device)
    size = sum(file.stat().st_size for file in path.iterdir())
    return {"checkpoint_7b_seconds": seconds, "checkpoint_7b_bytes": size}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", required=True, help="folder, .gguf file, or llama7b: its shape, random")
    add("--tokenizer", default="", help="folder of the tokenizer, for llama7b")
    add("--data", default="", help="JSON lines; without: random samples of --max_seq_len tokens")
    add("--steps", type=int, default=20)
    add("--warmup", type=int, default=3, help="steps not counted, at least 1")
    add("--max_seq_len", type=int, default=512)
    add("--device", default="cpu", choices=["cpu", "cuda"])
    add("--prefix", default="off", choices=["off", "kept"], help="kept: as in later epochs")
    add("--tokens_per_pass", type=int, default=0, help="0: the default, on a CPU SmolLM2's")
    add("--gradient_checkpointing", action="store_true")
    add(
        "--without",
        nargs="*",
        default=[],
        choices=["response_head", "one_product", "padding_limit"],
        help="switch an optimisation off",
    )
    add("--parts", action="store_true", help="also evaluation, probes, distillation, saving")
    args = parser.parse_args()

    device = torch.device(args.device)
    without(args.without)
    folder = tempfile.TemporaryDirectory()
    default = BaseConfig if device.type == "cuda" else SmolLM2Config
    cfg = BaseConfig(
        model_name=args.model,
        task_order=[TASK],
        max_seq_len=args.max_seq_len,
        tokens_per_pass=args.tokens_per_pass or default.tokens_per_pass,
        gradient_checkpointing=args.gradient_checkpointing,
        logging_steps=1,
        save_steps=10**6,
        num_epochs=1,
        warmup_ratio=0.0,
        log_dir=f"{folder.name}/logs",
        save_dir=f"{folder.name}/checkpoints",
    )
    model = build_model(cfg, device)
    need = cfg.samples_per_step * (args.steps + args.warmup)
    named = args.tokenizer or ("" if args.model == "llama7b" else args.model)
    of_named = BaseConfig(model_name=named, num_frozen_layers=0, max_seq_len=16) if named else None
    tokenizer = load_tokenizer(of_named, check_model(of_named)) if named else None
    if args.data:
        data = InstructionDataset(read_jsonl(args.data), tokenizer, 10**6)
        all_rows = Rows(
            {key: sample[key] for key in ("id", "input_ids", "labels")}
            for sample, length in zip(data, data.lengths, strict=True)
            if length <= args.max_seq_len
        )
    else:
        all_rows = synthetic(args.max_seq_len, need)
    rows = (all_rows * (need // len(all_rows) + 1))[:need]
    # So that the loop's own order is that of the file.
    shuffled = Rows(rows)
    for place, row in zip(data_order(cfg.seed, TASK, 0, need), rows, strict=True):
        shuffled[place] = row
    pad = tokenizer or argparse.Namespace(pad_token_id=0)
    of_run = Passes(cfg, model, pad, device, StopSignals())
    journal = Journal(cfg, of_run, {}, RunState(f"{folder.name}/state"), {})
    session = Session({TASK: TaskData(shuffled, shuffled)}, of_run, journal)

    result = {"model": args.model, "prefix": args.prefix, "without": args.without}
    if args.prefix == "kept":
        begun = time.perf_counter()
        of_run.keep_prefix(shuffled, "frozen layers")
        result["prefix_seconds"] = time.perf_counter() - begun
        result["prefix_gib"] = of_run.prefix.used / 2**30
    clock = Clock(device)
    TaskTraining(cfg, of_run, TASK, shuffled, clock, journal=journal).run()
    marks = clock.marks[args.warmup - 1 :]
    counted = rows[cfg.samples_per_step * args.warmup :]
    seconds = marks[-1] - marks[0]
    tokens = sum(len(sample["input_ids"]) for sample in counted)
    responses = sum(map(response_tokens, counted))
    result |= {
        "steps": args.steps,
        "seconds_per_step": seconds / args.steps,
        "median_seconds_per_step": statistics.median(
            after - before for before, after in zip(marks, marks[1:], strict=False)
        ),
        "tokens_per_second": tokens / seconds,
        "response_tokens_per_second": responses / seconds,
        **peak_gib(device),
        "loss": clock.losses[-1],
    }
    rate = matrix_rate(device, model.dtype)
    flops = useful_flops(model, counted, args.prefix == "kept") / seconds
    result |= {"useful_flops": flops, "matrix_flops": rate, "share_of_matrix_rate": flops / rate}
    if args.parts:
        rows = Rows(random.Random(0).sample(all_rows, min(len(all_rows), 100)))
        result |= bench_parts(cfg, session, rows)
        result["slsd_share"] = slsd_share(cfg, result, samples=2000, epochs=BaseConfig.num_epochs)
        if tokenizer:
            result |= checkpoint_at_7b(cfg, tokenizer)
    for name, value in result.items():
        print(f"{name:32} {value:.4g}" if isinstance(value, float) else f"{name:32} {value}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
