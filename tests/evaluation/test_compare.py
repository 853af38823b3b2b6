"""Finished runs in tables: by method, order and reading, and paired against a reference."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
from helpers import errors, write_run

import plot_loss
import train_slsd_seq
from evaluation.finished import brief_names
from evaluation.matrix import forgetting

NAN = math.nan
# Task 1 gets better before it gets worse; task 2 is forgotten a little.
LOSSES = [[5.0, 5.0, 5.0], [2.0, NAN, NAN], [1.5, 3.0, NAN], [2.5, 3.2, 1.0]]


def tables_in(text: str) -> list[dict[str, dict[str, str]]]:
    """Row name -> column -> cell, of each Markdown table in `text`; the name's is "" too."""
    tables = []
    for block in text.split("\n\n"):
        if block.startswith("|"):
            header, _, *rows = (
                [cell.strip() for cell in line.strip("|").split("|")]
                for line in block.strip().splitlines()
            )
            tables.append({row[0]: dict(zip(["", *header[1:]], row, strict=True)) for row in rows})
            tables[-1]["header"] = {"": header[0], **dict.fromkeys(header[1:], "")}
    return tables


def cells_of(text: str, name: str) -> dict[str, str]:
    """What all tables say of the method `name`; the first one to say it counts."""
    found: dict[str, str] = {}
    for table in tables_in(text):
        found = {**table.get(name, {}), **found}
    return found


def test_compare_means_over_seeds_and_draws(tmp_path, capsys):
    better = [[5.0, 5.0, 5.0], [2.0, NAN, NAN], [1.5, 3.0, NAN], [1.7, 3.0, 1.0]]
    moved = [
        {"stage": "C", "probe_task": "A", "teacher": "A", "kl_first": 0.5, "kl_rest": 0.1},
        {"stage": "C", "probe_task": "B", "teacher": "B", "kl_first": 0.7, "kl_rest": None},
        {"stage": "C", "probe_task": "B", "teacher": "A", "kl_first": 9.0, "kl_rest": 9.0},
        {"stage": "B", "probe_task": "A", "teacher": "A", "kl_first": 9.0, "kl_rest": 9.0},
    ]
    runs = [
        write_run(tmp_path / "one,lr=3" / "seed1", LOSSES, moved, {"own": 2.0}),
        write_run(tmp_path / "one,lr=3" / "seed2", better, moved, {"own": 2.2}, seed=2),
        write_run(tmp_path / "other" / "seed1", better),
        write_run(tmp_path / "joint", [[5.0] * 3, [NAN] * 3, [NAN] * 3, [2.0, 2.0, 2.0]]),
    ]
    assert plot_loss.main(["compare", *runs, "--log_dir", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    written = (tmp_path / "out" / "compare.md").read_text()
    assert written in printed
    cells = cells_of(written, "one")
    assert cells["runs"] == "2" and cells["training, min"] == "3.0"
    values = [forgetting(LOSSES), forgetting(better)]
    assert cells["forgetting ↓"] == f"{np.mean(values):+.3f} ± {np.std(values, ddof=1):.3f}"
    assert cells["just learned ↓"] == "2.000 ± 0.000"
    assert (
        cells["drift, first 5 ↓"] == "0.600 ± 0.000" and cells["drift, rest ↓"] == "0.100 ± 0.000"
    )
    alone = cells_of(written, "other")
    assert alone["forgetting ↓"] == f"{forgetting(better):+.3f}" and not alone["drift, rest ↓"]
    assert cells_of(written, "base")["final ↓"] == "5.000"
    assert not cells_of(written, "joint")["forgetting ↓"]
    assert "| one    | 2.067 ± 0.236 | 2.100 ± 0.141 |" in written
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "compare.md",
        "compare.pdf",
        "compare.png",
    }


def test_methods_of_several_seeds_need_not_share_their_readings(tmp_path, capsys):
    """A bank has `own` but no `slow`: its row is empty there, in the table and in the figure."""
    readings = {"ds_lora": {"own": 2.0, "slow": 3.0}, "bank": {"own": 2.0}}
    runs = [
        write_run(tmp_path / method / f"seed{seed}", LOSSES, (), readings[method], seed=seed)
        for method in readings
        for seed in (1, 2)
    ]
    assert plot_loss.main(["compare", *runs, "--log_dir", str(tmp_path)]) == 0
    bank = cells_of(capsys.readouterr().out, "bank")
    assert (bank["own"], bank["slow"]) == ("2.000 ± 0.000", "")


def test_logs_from_before_there_were_readings_are_compared(tmp_path):
    run = Path(write_run(tmp_path / "old", LOSSES))
    log = run / "seq_eval_loss.jsonl"
    log.write_text(log.read_text().replace('"branches": "latest", ', ""))
    assert "branches" not in log.read_text()
    summary = json.loads((run / "seq_summary.json").read_text())
    del summary["is_one_model"]
    (run / "seq_summary.json").write_text(json.dumps(summary))
    assert plot_loss.main(["compare", str(run), "--log_dir", str(tmp_path)]) == 0


def test_what_cannot_be_compared_is_one_line(tmp_path, capsys):
    first = write_run(tmp_path / "one" / "seed1", LOSSES)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "seq_summary.json").write_text("{}")
    for other, message in (
        (str(tmp_path / "empty"), "is the run of that folder finished?"),
        (str(tmp_path / "broken"), "is no summary of a run"),
        (
            write_run(tmp_path / "one" / "seed2", LOSSES, seed=2, kd_lambda=3.0),
            "is not like",
        ),
        (write_run(tmp_path / "two", [[5.0, 5.0], [2.0, NAN], [2.0, 3.0]]), "differ in tasks"),
        (write_run(tmp_path / "three", [[4.0, 5.0, 5.0], *LOSSES[1:]]), "differ in tasks, base"),
        (write_run(tmp_path / "again" / "one" / "seed3", LOSSES), "have the same seed"),
    ):
        assert plot_loss.main(["compare", first, other, "--log_dir", str(tmp_path)]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith("error: ") and message in line


def test_a_bank_is_told_by_its_own_loras(tmp_path):
    run = write_run(tmp_path / "bank", LOSSES, (), {"own": 1.5}, is_one_model=False)
    assert plot_loss.main(["compare", run, "--log_dir", str(tmp_path)]) == 0
    bank = cells_of((tmp_path / "compare.md").read_text(), "bank")
    assert bank["just learned ↓"] == "2.000" and not bank["forgetting ↓"] + bank["final ↓"]
    assert (bank["latest"], bank["own"]) == ("2.233", "1.500")


def test_scores_are_compared_where_they_are_there(tmp_path):
    def scored(folder, score, **config):
        run = write_run(folder, LOSSES, **config)
        line = {
            "task": "A",
            "metric": "exact",
            "branches": "own",
            "score": score,
            "low": 20,
            "high": 70,
        }
        (folder / "scores_C.jsonl").write_text(json.dumps(line) + "\n")
        return run

    runs = [scored(tmp_path / "one", 45.4), write_run(tmp_path / "none", LOSSES)]
    runs += [scored(tmp_path / "two" / f"seed{s}", 40 + s, seed=s) for s in (1, 3)]
    assert plot_loss.main(["compare", *runs, "--log_dir", str(tmp_path)]) == 0
    text = (tmp_path / "compare.md").read_text()
    assert (
        "| one    | own     | 45 [20, 70] |" in text
        and "| two    | own     | 42.0 ± 1.4  |" in text
    )
    assert "| none   | own" not in text


def test_runs_of_two_virtual_environments_are_compared(tmp_path):
    places = [{"model_name": f"/{p}/m.gguf", "data_dir": f"/{p}/data"} for p in ("a", "b")]
    runs = [
        write_run(tmp_path / "one" / f"seed{s}", LOSSES, seed=s, **place)
        for s, place in enumerate(places)
    ]
    assert plot_loss.main(["compare", *runs, "--log_dir", str(tmp_path)]) == 0


def test_names_keep_the_settings_that_tell_methods_apart():
    assert brief_names(["a,x=1,y=2", "a,x=1,y=3@o", "b,x=1", "b", "c,z=1@o", "c,z=1"]) == [
        *("a,y=2", "a,y=3@o"),
        *("b,x=1", "b"),
        *("c@o", "c"),
    ]


def worse(by: float) -> list[list[float]]:
    """LOSSES whose last stage forgets more."""
    return [*LOSSES[:-1], [LOSSES[-1][0] + by, LOSSES[-1][1] + by, LOSSES[-1][2]]]


ACCURACY = [[30.0] * 3, [80.0, NAN, NAN], [70.0, 90.0, NAN], [60.0, 85.0, 70.0]]


def test_methods_are_paired_with_a_reference_over_order_and_seed(tmp_path):
    """By hand: each pair differs by 0.1, so that the interval is a point; six pairs reach 0.05."""
    runs = []
    for order in ("", "@BAC", "@CBA"):
        tasks = list(order.removeprefix("@") or "ABC")
        for seed in (1, 2):
            own = {"tasks": tasks, "seed": seed, "accuracy": ACCURACY}
            # The base is the same on each task, whichever order.
            for name, by in (("ref,lr=1", 0.2), ("ours", 0.1), ("same", 0.2)):
                by += seed / 100
                runs.append(
                    write_run(tmp_path / f"{name}{order}" / f"seed{seed}", worse(by), **own)
                )
    runs.append(write_run(tmp_path / "few" / "seed2", LOSSES, seed=2))
    runs.append(write_run(tmp_path / "none" / "seed9", LOSSES, seed=9))
    log_dir = ["--log_dir", str(tmp_path)]
    assert plot_loss.main(["compare", *runs, *log_dir, "--against", "ref,lr=1"]) == 0
    text = (tmp_path / "compare.md").read_text()
    assert "Fewer than 6 pairs, so no interval: few (1), none (0)." in text
    # Two methods with six pairs: 2 x 2/2^6 is more than 0.05.
    assert "Too few pairs for a corrected p of 0.05, however clear" in text
    assert "with 6 p is 2/2^6 = 0.0312 at least, and 0.0625 corrected for 2 methods." in text
    paired = {table["header"][""]: table for table in tables_in(text)}
    learned, forgotten = paired["just learned, loss ↓"], paired["forgetting, loss ↓"]
    assert learned["ours"]["difference"] == "+0.000" and "ref" not in learned
    share = f"{-0.1 / forgetting(worse(0.215)):+.1%}"
    assert list(forgotten["ours"].values())[1:] == [
        *("6", "-0.100", "[-0.100, -0.100]"),
        *(f"{share} [{share}, {share}]", "0.0312", "0.0625"),
    ]
    assert forgotten["few"]["pairs"] == "1" and "none" not in forgotten
    assert not forgotten["few"]["95 % interval"] + forgotten["few"]["p"]
    assert paired["final mean, accuracy ↑"]["ours"]["difference"] == "+0.0"
    assert "few" not in paired["final mean, accuracy ↑"]
    # The orders beside one another, and their mean.
    assert cells_of(text, "ours@all")["runs"] == "6"
    assert cells_of(text, "ours@BAC")["Last ↑"] == "71.7 ± 0.0"
    # By the brief name too; without accuracies there is no table of them.
    assert plot_loss.main(["compare", *runs[-2:], *log_dir, "--against", "few"]) == 0
    assert "accuracy" not in (tmp_path / "compare.md").read_text()


def test_a_reference_that_is_not_there_is_one_line(tmp_path, capsys):
    run = write_run(tmp_path / "one" / "seed1", LOSSES)
    argv = ["compare", run, "--log_dir", str(tmp_path), "--against", "two"]
    assert plot_loss.main(argv) == 2
    assert errors(capsys) == ["error: --against two: give one of these runs: one"]
    assert plot_loss.main(["seq", "--against", "one"]) == 2
    assert errors(capsys) == ["error: --against one belongs to compare and report: leave it out"]


def test_what_a_method_keeps_and_reads_is_told(tmp_path):
    costs = [
        {
            "samples_kept": 4 * (stage + 1),
            "bytes_kept": 2**20 * (stage + 1),
            "samples_a_step": {"backward": 8.0 + 4 * bool(stage), "forward": 1.0},
        }
        for stage in range(3)
    ]
    runs = [write_run(tmp_path / "keeps", LOSSES, costs=costs), write_run(tmp_path / "x", LOSSES)]
    assert plot_loss.main(["compare", *runs, "--log_dir", str(tmp_path)]) == 0
    text = (tmp_path / "compare.md").read_text()
    keeps, older = cells_of(text, "keeps"), cells_of(text, "x")
    # As the third task begins: two tasks' samples.
    assert (keeps["samples a task"], keeps["kept, MiB"]) == ("4", "2.0")
    assert (keeps["backward a step"], keeps["forward a step"]) == ("10.7", "1.0")
    # Runs from before this was noted.
    assert not older["samples a task"] + older["kept, MiB"] + older["backward a step"]
    assert older["training, min"] == "3.0"


def test_the_tables_fit_a_terminal(tmp_path):
    name = "slsd_plus,memory_per_task=0.05"
    runs = [
        write_run(
            *(tmp_path / f"{name},b=2{order}" / f"seed{seed}", LOSSES),
            **{"accuracy": ACCURACY, "seed": seed},
        )
        for order in ("", "@order", "@other")
        for seed in (1, 2)
    ]
    runs.append(write_run(tmp_path / name.replace("0.05", "0.5,b=2") / "seed1", LOSSES))
    argv = ["compare", *runs, "--log_dir", str(tmp_path), "--against", f"{name},b=2"]
    assert plot_loss.main(argv) == 0
    lines = (tmp_path / "compare.md").read_text().splitlines()
    assert max(len(line) for line in lines if line.startswith("|")) <= 120


def test_a_joint_run_is_compared_with_a_sequence(flags, tmp_path):
    """Real summaries: all tasks are one stage of the first."""
    names = ["joint", "seq_lora"]
    for name in names:
        here = {"log_dir": tmp_path / name, "save_dir": tmp_path / "checkpoints" / name}
        more = {"task_order": ["T1_general", "T2_math"], "max_steps_per_task": 1, **here}
        assert train_slsd_seq.main(flags(method=name, **more)) == 0
    runs = [str(tmp_path / name) for name in names]
    assert plot_loss.main(["compare", *runs, "--log_dir", str(tmp_path)]) == 0
    text = (tmp_path / "compare.md").read_text()
    assert cells_of(text, "joint")["final ↓"] and not cells_of(text, "joint")["forgetting ↓"]


def test_light_evaluation_measures_the_two_ends_of_each_task(flags, tmp_path, capsys):
    """The same training, and of its matrix the cells that learning, forgetting and the end need."""
    tasks = ["T1_general", "T2_math", "T3_code"]
    changes = {
        "full": {},
        "light": {"light_evaluation": True},
        "other": {"light_evaluation": True, "eval_samples_per_task": 3},
    }
    summaries = {}
    for name, more in changes.items():
        here = {"log_dir": tmp_path / name, "save_dir": tmp_path / "checkpoints" / name}
        more = {"eval_samples_per_task": 4, **more}
        assert train_slsd_seq.main(flags(task_order=tasks, method="ewc", **here, **more)) == 0
        summaries[name] = json.loads((tmp_path / name / "seq_summary.json").read_text())
    full, light = summaries["full"], summaries["light"]
    both_ends = [(1, 0), (2, 1), (3, 0), (3, 1), (3, 2)]
    for t, i in itertools.product(range(4), range(3)):
        expected = full["matrix"][t][i] if (t, i) in both_ends else None
        assert light["matrix"][t][i] == expected
    for metric in ("learning_loss", "backward_transfer", "average_final_loss"):
        assert light[metric] == full[metric]
    adapters = [
        (tmp_path / "checkpoints" / name / "seq_T3_code" / "adapter_model.safetensors").read_bytes()
        for name in ("full", "light")
    ]
    assert adapters[0] == adapters[1]
    runs, there = {name: str(tmp_path / name) for name in changes}, ["--log_dir", str(tmp_path)]
    assert plot_loss.main(["compare", runs["light"], *there]) == 0
    capsys.readouterr()
    for other, why in (("full", "light_evaluation"), ("other", "eval_samples_per_task 4 -> 3")):
        assert plot_loss.main(["compare", runs["light"], runs[other], *there]) == 2
        (line,) = errors(capsys)
        assert why in line
    assert plot_loss.main(["report", runs["light"], *there]) == 0
