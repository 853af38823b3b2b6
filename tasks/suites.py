"""Published suites of tasks for continual learning, in the folder layouts that they come in."""

from dataclasses import dataclass, field
from pathlib import Path

from configs.command_line import UserError
from tasks.own import read_rows
from tasks.source import Sample, WrongShape, texts

# O-LoRA's instructions by the group that a task's folder stands in (its instruction_config.json).
INSTRUCTIONS = {
    "NLI": 'What is the logical relationship between the "sentence 1" and the "sentence 2"?',
    "QQP": 'Whether the "first sentence" and the "second sentence" have the same meaning?',
    "SC": "What is the sentiment of the following paragraph?",
    "TC": "What is the topic of the following paragraph?",
    "BoolQA": "According to the following passage, is the question true or false?",
    "MultiRC": "According to the following passage and question, is the candidate answer true or "
    "false?",
    "WiC": "Given a word and two sentences, whether the word is used with the same sense in both "
    "sentence?",
}


def find_task_files(raw_dir: str, task: str) -> tuple[Path, Path]:
    """(training file, test file) of `task` below `raw_dir`, in any of the layouts.

    NAME/NAME_train.json (LLaMA-Factory, EasyCL), NAME/train.json (TRACE), GROUP/NAME/train.json
    (O-LoRA). Raises `UserError` where there is none.
    """
    root, problems = Path(raw_dir), []
    found = []
    for kind in ("train", "test"):
        names = [f"{task}/{task}_{kind}.json", f"{task}/{kind}.json", f"*/{task}/{kind}.json"]
        if kind == "test":
            # O-LoRA's sets of GLUE have no other answers that are known.
            names.append(f"*/{task}/dev.json")
        paths = [path for name in names for path in sorted(root.glob(name))]
        found += paths[:1]
        if not paths:
            problems.append(f"{task}: none of {', '.join(names)} is below {root}")
    if problems:
        raise UserError("\n".join(problems))
    return found[0], found[1]


@dataclass
class SuiteFile:
    """One file of a suite as a source; O-LoRA's have `options`, listed in a file beside it."""

    hub_id: str
    path: Path
    options: list[str] = field(default_factory=list)

    @property
    def options_path(self) -> Path:
        """Where O-LoRA lists them."""
        return self.path.with_name("labels.json")

    def load(self, raw_dir: str) -> tuple[list, str]:
        """(rows, "raw"). Raises `UserError` where the file cannot be read."""
        rows = read_rows(str(self.path), "train")
        if self.options_path.is_file():
            self.options = list(map(str, read_rows(str(self.options_path), "train")))
        return rows, "raw"

    def convert(self, row) -> Sample:
        """A sample of one row, whichever layout it comes from; raises `Drop`."""
        match row:
            case {"instruction": str(), "output": str()}:
                return Sample(*texts({"input": "", **row}, "instruction", "input", "output"))
            case {"prompt": str(prompt), "answer": str(answer)}:
                return Sample(prompt, "", answer)
            case {"sentence": str(sentence), "label": str(label)}:
                asked = INSTRUCTIONS.get(self.path.parent.parent.name, "")
                if not asked:
                    # COPA asks in the sentence itself.
                    return Sample(sentence, "", label)
                options = f"\nOption: {', '.join(self.options)}" if self.options else ""
                return Sample(f"{asked} Choose one from the option.{options}", sentence, label)
        raise WrongShape("none of instruction/output, prompt/answer, sentence/label")
