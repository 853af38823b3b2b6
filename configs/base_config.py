"""Every knob of an experiment, with its unit, bounds and meaning."""

from dataclasses import dataclass, fields
from typing import Literal

from configs.command_line import Knobs, knob, num_processes
from configs.task_files import JUDGES, TASKS, task_problems, with_task_data

TRACKERS = ("tensorboard", "trackio", "wandb")


@dataclass
class BaseConfig(Knobs):
    """The full-size experiment: LLaMA-2-7B on one GPU. To change an experiment, change this first.

    Raises `UserError` on construction, one line for every impossible value.
    """

    # What `--config` calls it; no field.
    config_name = "base"

    model_name: str = knob(
        "meta-llama/Llama-2-7b-hf",
        "base model: hub id, local folder, or a .gguf file",
        not_empty=True,
        decides=False,
    )
    quantization: Literal["none", "8bit", "4bit"] = knob(
        "none", "how the frozen base is held; 8bit and 4bit need bitsandbytes"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = knob(
        "auto",
        "of the frozen base; auto: bfloat16 where the GPU has it, else float16; float32 on CPU",
    )
    device: str = knob(
        "auto",
        "auto: the GPU with the most free memory, else cpu; or cpu, cuda, cuda:1",
        pattern=(r"auto|cpu|cuda(:\d+)?", "auto, cpu, cuda or cuda:N"),
        decides=False,
    )

    shard: bool = knob(
        False,
        "under torchrun: each process holds its share of the frozen base, for a model larger than a"
        " GPU; layers are gathered as they run",
        decides=False,
    )

    lora_r: int = knob(8, "rank of each of the two branches", at_least=1, at_most=8192)
    lora_alpha: int = knob(
        32, "each branch's output is scaled by lora_alpha / lora_r", at_least=1, at_most=10**6
    )
    use_rslora: bool = knob(
        False, "scaled by lora_alpha / sqrt(lora_r) instead (rsLoRA)", decides=False
    )
    lora_dropout: float = knob(
        0.05, "probability, on the branches' input; 0: none", at_least=0, below=1
    )
    lora_target_modules: list[str] = knob(
        ["q_proj", "v_proj"],
        "a linear layer whose name is or ends with one of these gets the branches; all-linear: "
        "every one of the decoder layers",
        not_empty=True,
    )
    num_frozen_layers: int = knob(
        16, "bottom decoder layers left untouched; 0: branches in every layer", at_least=0
    )

    method: str = knob(
        "ds_lora",
        "what is trained: a file in methods/, or a Python file of your own",
        not_empty=True,
    )
    lr_slow: float = knob(1e-5, "AdamW rate of the slow branch, which every task shares", above=0)
    lr_fast: float = knob(
        5e-5, "AdamW rate of the fast branch, which follows the task at hand", above=0
    )
    fast_init: Literal["continue", "fresh"] = knob(
        "continue", "the next task's fast branch: the last task's, or a new one"
    )
    lr_lora: float = knob(5e-5, "AdamW rate of the one LoRA of the other methods", above=0)
    weight_decay: float = knob(0.01, "AdamW decay of both branches; 0: none", at_least=0)
    lr_schedule: Literal["constant", "linear", "cosine"] = knob(
        "cosine", "multiplier of all rates over a task, from 1 to 0; cosine is Stanford Alpaca's"
    )
    warmup_ratio: float = knob(
        0.03,
        "share of a task's steps in which the rates rise from 0 (Stanford Alpaca's 0.03)",
        at_least=0,
        at_most=1,
    )
    max_grad_norm: float = knob(
        1.0, "each branch is clipped to this gradient norm by itself; 0: no clipping", at_least=0
    )

    use_slsd: bool = knob(True, "distil the slow branch, from task 2 on")
    kd_lambda: float = knob(
        1.0, "weight of the distillation loss in the slow branch's loss; 0: off", at_least=0
    )
    kd_temperature: float = knob(
        1.0, "softens teacher and student; the loss is scaled by its square", above=0, at_most=1000
    )
    kd_top_k: int = knob(
        64,
        "teacher logits kept per response token; all others are one class; 0: the vocabulary",
        at_least=0,
        at_most=10**6,
    )
    kd_batch_size: int = knob(4, "probes distilled at a step", at_least=1, at_most=10**5)
    kd_every: int = knob(4, "optimizer steps from one distillation to the next", at_least=1)
    kd_branches: Literal["slow", "all"] = knob("slow", "the branches that distillation moves")
    kd_forward: Literal["joint", "slow"] = knob(
        "joint", "what answers as the student: both branches, or the slow one alone"
    )
    kd_probes: Literal["current", "replay"] = knob(
        "current",
        "distilled: the probes of the current task; replay: those of each earlier task too, with "
        "the answers of the model that had just learned it",
    )
    probe_choice: Literal["entropy", "random"] = knob(
        "entropy", "the surest samples become probes, or any"
    )
    probe_size_per_task: int = knob(500, "most probes kept per task", at_least=1, at_most=10**6)
    probe_pool_factor: int = knob(
        2,
        "the probes are chosen among this many times probe_size_per_task samples",
        at_least=1,
        at_most=1000,
    )
    entropy_threshold: float = knob(
        2.0,
        "nats per response token; a surer sample may be a probe. 2.0 is a choice among about 7 "
        "tokens; above ln(vocabulary) it keeps all",
        at_least=0,
    )

    task_order: list[str] = knob(list(TASKS), "tasks in the order of learning", not_empty=True)
    data_paths: dict[str, dict[str, str]] = knob(
        {
            task: {
                "toy": f"{{data_dir}}/{task}.jsonl",
                "full": f"{{data_dir}}/full/{task}_full.jsonl",
            }
            for task in TASKS
        },
        "",
        decides=False,
    )
    task_orders: dict[str, list[str]] = knob({}, "", decides=False)
    task_data: list[str] = knob(
        [],
        "tasks of your own: law=law.jsonl; law.test=FILE evaluates on that file instead of held-out"
        " samples",
        decides=False,
    )
    task_judges: list[str] = knob(
        [],
        f"how replies are judged: law=choice, out of {', '.join(JUDGES)}; without: choice where the"
        " training outputs are few and short, else rouge_l",
        decides=False,
    )
    use_toy_data: bool = knob(
        False, "the small files in data_dir instead of those in data_dir/full"
    )
    data_dir: str = knob(
        "data", "folder of T*.jsonl and full/T*_full.jsonl", not_empty=True, decides=False
    )
    holdout_fraction: float = knob(
        0.1, "share of each task that is never trained on but evaluated", above=0, below=1
    )
    prompt_template: Literal["inst", "chat", "plain"] = knob(
        "inst",
        "what stands around a sample's texts: LLaMA-2's [INST]; chat: the tokenizer's own chat "
        "template; plain: nothing",
    )
    # The template alone takes ten.
    max_seq_len: int = knob(
        2048, "tokens per sample; the prompt's end gives way first", at_least=16, at_most=10**6
    )
    max_train_samples: int = knob(0, "per task, chosen by seed; 0: all", at_least=0)
    eval_samples_per_task: int = knob(
        200, "held-out samples evaluated per task: enough for +-0.05 nats; 0: all", at_least=0
    )

    all_readings: bool = knob(
        False,
        "evaluate every reading of the branches after each stage, and the tasks not yet seen too",
    )
    light_evaluation: bool = knob(
        False,
        "measure each task when just learned and all at the end, latest alone: enough for learning,"
        " final mean and forgetting (then since just learned), and most of the time saved",
        decides=False,
    )
    generate: bool = knob(
        False, "after each stage answer the held-out samples of the tasks seen, and score them"
    )

    per_device_batch_size: int = knob(
        1,
        "times gradient_accumulation_steps and processes: the samples of an optimizer step",
        at_least=1,
        at_most=10**5,
    )
    gradient_accumulation_steps: int = knob(
        16,
        "see per_device_batch_size; how samples are cut into passes is tokens_per_pass",
        at_least=1,
        at_most=10**5,
    )
    tokens_per_pass: int = knob(
        2048,
        "tokens, padding included, of one forward pass: memory, and no results but dropout masks",
        at_least=1,
        at_most=10**7,
        decides=False,
    )
    prefix_cache_gib: float = knob(
        -1.0,
        "GiB of host memory for the frozen layers' output, which later epochs, evaluation and "
        "probes start from; -1: what is free, with a margin; 0: none",
        or_exactly=-1,
        at_least=0,
        at_most=10**6,
        decides=False,
    )
    prefix_store: str = knob(
        "",
        "folder that keeps the frozen layers' output, for all samples, from one run to the next; "
        "it may be removed at any time; none: host memory",
        decides=False,
    )
    prefix_store_gib: float = knob(
        100.0,
        "GiB of disk for prefix_store; what was used longest ago gives way; 0: no store",
        at_least=0,
        at_most=2**20,
        decides=False,
    )
    gradient_checkpointing: bool = knob(
        False,
        "recompute the upper layers in the backward: less memory, a third more time",
        decides=False,
    )
    num_epochs: int = knob(
        3,
        "passes over each task's training samples (Stanford Alpaca's 3)",
        at_least=1,
        at_most=10**5,
    )
    max_steps_per_task: int = knob(
        0, "optimizer steps, where fewer than the epochs give; 0: no limit", at_least=0
    )
    seed: int = knob(
        42, "of branch weights, data order, dropout and probe choice", at_least=0, below=2**63
    )

    report_to: list[str] = knob(
        ["none"],
        f"shows the run there too, out of {', '.join(TRACKERS)}; wandb stays offline without "
        "WANDB_MODE",
        not_empty=True,
        decides=False,
    )
    push_to_hub: str = knob(
        "", "OWNER/NAME on the hub: upload the checkpoints at the end; none: never", decides=False
    )
    logging_steps: int = knob(
        10,
        "optimizer steps from one line of the training log to the next",
        at_least=1,
        decides=False,
    )
    save_steps: int = knob(
        50,
        "optimizer steps from one saved state to the next, to resume from after a crash",
        at_least=1,
        decides=False,
    )
    log_dir: str = knob(
        "logs",
        "folder of the loss logs, the summary and the pictures",
        not_empty=True,
        decides=False,
    )
    save_dir: str = knob(
        "checkpoints",
        "folder of the adapters, one sub-folder a stage",
        not_empty=True,
        decides=False,
    )
    overwrite: bool = knob(
        False,
        "start afresh and replace the logs and checkpoints of an earlier run",
        decides=False,
    )
    dry_run: bool = knob(
        False, "check everything, print what would be done, and train nothing", decides=False
    )
    device_tflops: float = knob(
        0.0,
        "TFLOP/s of the device in matrix products, from which --dry_run tells hours; 0: measured",
        at_least=0,
        at_most=10**6,
        decides=False,
    )

    def __post_init__(self):
        if isinstance(self.task_data, list) and isinstance(self.data_paths, dict):
            self.data_paths = with_task_data(self.data_paths, self.task_data)
        super().__post_init__()

    def problems(self):
        found = super().problems() + task_problems(self)
        if self.all_readings and self.light_evaluation:
            found.append("all_readings and light_evaluation are both true: give one of them")
        if self.shard and num_processes() == 1:
            found.append(
                "--shard true: one process has nobody to share the model with; start several with "
                "torchrun, or give false"
            )
        if self.shard and (self.quantization != "none" or self.model_name.endswith(".gguf")):
            found.append(
                "--shard true: a quantised model or a .gguf file is held whole; give --quantization"
                " none and a model with .safetensors, or --shard false"
            )
        if self.kd_forward == "slow" and self.kd_branches == "all":
            found.append(
                "kd_forward is 'slow', kd_branches is 'all': the slow branch alone has no gradient "
                "for the fast one; give --kd_branches slow"
            )
        if set(self.report_to) - set(TRACKERS) and self.report_to != ["none"]:
            found.append(
                f"report_to is {self.report_to!r}: give some of {', '.join(TRACKERS)}, or none"
            )
        return found

    def data_path(self, task: str) -> str:
        """The file that this run reads for `task`."""
        path = self.data_paths[task]["toy" if self.use_toy_data else "full"]
        return path.replace("{data_dir}", self.data_dir)

    def test_path(self, task: str) -> str:
        """The file that `task` is evaluated on; "" where it is its held-out share."""
        return self.data_paths[task].get("test", "").replace("{data_dir}", self.data_dir)

    def judge_of(self, task: str) -> str:
        """The judge that was chosen for `task`; "" where none was."""
        return dict(entry.split("=", 1) for entry in self.task_judges).get(task, "")

    @property
    def trackers(self) -> list[str]:
        """What --report_to names, once each; "none" is none."""
        return [name for name in dict.fromkeys(self.report_to) if name != "none"]

    @property
    def samples_per_step(self) -> int:
        """Samples of one optimizer step, over all processes."""
        return self.per_device_batch_size * self.gradient_accumulation_steps * num_processes()


# Fields that say where and how fast, but not what comes out: a run may be resumed with others.
NOT_RESULTS = [field.name for field in fields(BaseConfig) if not field.metadata["decides"]]
