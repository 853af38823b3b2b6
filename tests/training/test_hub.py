"""What is uploaded where it is asked for, and what an upload that fails leaves."""

import pytest
from helpers import errors
from huggingface_hub.errors import OfflineModeIsEnabled

import run_experiments
import train_single_task
import train_slsd_seq
from training import hub

TASKS = ["T1_general", "T2_math"]
SHORT = {"task_order": TASKS, "max_steps_per_task": 1, "eval_samples_per_task": 1}


class FakeHub:
    """Keeps what it is given: (folder's name, its place in the repository)."""

    def __init__(self):
        self.uploaded, self.made, self.fault, self.is_there = [], [], None, False

    def __call__(self):
        return self

    def repo_exists(self, name):
        return self.is_there

    def create_repo(self, name, private, exist_ok):
        assert private and exist_ok
        self.made.append(name)

    def upload_folder(self, repo_id, folder_path, path_in_repo):
        if self.fault and len(self.uploaded) == 1:
            raise self.fault
        assert (folder_path / "adapter_model.safetensors").exists()
        assert repo_id == "me/mine"
        self.uploaded.append((folder_path.name, path_in_repo))


@pytest.mark.parametrize("fault", [OfflineModeIsEnabled, RuntimeError, ValueError])
def test_stages_are_uploaded_and_one_that_failed_is_tried_again(flags, monkeypatch, capsys, fault):
    fake = FakeHub()
    monkeypatch.setattr(hub, "HfApi", fake)
    monkeypatch.setattr(hub, "get_token", lambda: "token")
    argv = flags(**SHORT, push_to_hub="me/mine")
    fake.fault = fault("the hub is\nfar")
    assert train_slsd_seq.main(argv) == 2
    (line,) = errors(capsys)
    assert "the hub is far; all is saved here, and the same command tries again" in line
    fake.fault, fake.uploaded = None, []
    assert train_slsd_seq.main(argv) == 0
    assert "uploaded 2 checkpoints to https://huggingface.co/me/mine" in capsys.readouterr().out
    stages = [f"seq_{task}" for task in TASKS]
    assert fake.uploaded == [*zip(stages, stages, strict=True), (stages[1], None)]
    # It is finished now.
    assert train_slsd_seq.main(argv) == 0 and len(fake.made) == 2
    assert "`hf upload` uploads what is there" in capsys.readouterr().out
    fake.uploaded = []
    single = flags(**SHORT, push_to_hub="me/mine", num_epochs=5)
    assert train_single_task.main([*single, "--task", "T2_math"]) == 0
    names = {name for name, _ in fake.uploaded}
    assert names and all(name.startswith("single_T2_math_epoch") for name in names)


def test_what_cannot_be_uploaded_is_told_at_the_start(flags, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(hub, "get_token", lambda: None)
    for name, fault in (("mine", "give OWNER/NAME"), ("a/b/c", "give"), ("me/mine", "log in")):
        assert train_slsd_seq.main(flags(**SHORT, push_to_hub=name)) == 2
        assert f"--push_to_hub {name}: {fault}" in errors(capsys)[0]
    fake = FakeHub()
    monkeypatch.setattr(hub, "HfApi", fake)
    monkeypatch.setattr(hub, "get_token", lambda: "token")
    # Another run's, or the user's own.
    fake.is_there = True
    assert train_slsd_seq.main(flags(**SHORT, push_to_hub="me/mine")) == 2
    assert "me/mine is there already" in errors(capsys)[0]
    argv = [*flags(push_to_hub="me/mine"), "--methods", "seq_lora", "slsd"]
    assert run_experiments.main(argv) == 2
    assert "--push_to_hub is for one run" in errors(capsys)[0]
    assert not list(tmp_path.rglob("*.jsonl"))
