"""The page of finished runs: what stands in it, that it needs nothing else; in a browser."""

import json
import math
import re
import shutil
import subprocess

import pytest
from helpers import errors, write_run

import plot_loss

NAN = math.nan
MATRIX = [[3.0, 2.0], [1.0, NAN], [1.25, 0.5]]
SAID = "<script>alert(1)</script>\x1b[31m & more"


def write_logged(folder, **settings):
    """A finished run with its further logs."""
    lines = {
        "seq_train_loss": [{"stage": s, "step": 1, "loss": 2.0} for s in "AB"],
        "seq_router": [
            {"stage": "B", "eval_task": task, "answered_as": {task: 7}} for task in "AB"
        ],
        "seq_samples": [{"stage": s, "task": "A", "number": 0, "reply": SAID} for s in "AB"],
        "seq_scores": [
            {"stage": "B", "task": "A", "metric": "exact", "branches": "latest"}
            | {"score": 62.5, "low": 50.0, "high": 75.0}
        ],
    }
    run = write_run(folder, MATRIX, readings={"own": 0.875}, **settings)
    for name, rows in lines.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def write_page(tmp_path, *runs) -> str:
    assert plot_loss.main(["report", *runs, "--log_dir", str(tmp_path / "out")]) == 0
    return (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_a_page_tells_a_run_and_what_it_says_is_text(tmp_path):
    page = write_page(tmp_path, write_logged(tmp_path / "seq_lora"))
    assert "<script" not in page and "&lt;script&gt;alert(1)" in page and "\x1b" not in page
    # Nothing is fetched: pictures are inside.
    assert re.findall(r"(?:src|href)='(?!data:image/png;base64,)", page) == []
    assert page.count("data:image/png") == 2
    for told in ("62.5 [50.0, 75.0]", "<td class='learned'>0.500</td>", "0.875", "<td>7</td>"):
        assert told in page
    assert "question 1" in page and "<td>ds_lora</td>" in page


def test_several_runs_are_compared_and_one_without_more_logs_has_less(tmp_path):
    runs = [write_logged(tmp_path / "a"), write_logged(tmp_path / "b", seed=2)]
    bare = tmp_path / "c"
    runs.append(write_run(bare, MATRIX, method="replay"))
    (bare / "seq_train_loss.jsonl").write_text('{"stage": "A", "step": 1, "loss": 2.0}\n')
    page = write_page(tmp_path, *runs)
    assert page.count("data:image/png") == 1 + 2 * 3 and page.count("<h2>") == 3
    assert page.count(">Answers<") == 2 and "just learned" in page


def test_a_damaged_log_is_one_line(tmp_path, capsys):
    run = write_logged(tmp_path / "seq_lora")
    for answered in ({}, {"answered_as": ["A"]}):
        line = {"stage": "B", "eval_task": "A", **answered}
        (tmp_path / "seq_lora" / "seq_router.jsonl").write_text(json.dumps(line) + "\n")
        assert plot_loss.main(["report", run, "--log_dir", str(tmp_path)]) == 2
        assert "answered_as" in errors(capsys)[0]


def test_a_run_that_is_not_finished_has_no_page(tmp_path, capsys):
    assert plot_loss.main(["report", "--log_dir", str(tmp_path)]) == 2
    assert "is the run of that folder finished?" in errors(capsys)[0]


BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)


@pytest.mark.skipif(BROWSER is None, reason="no chromium here")
def test_a_browser_shows_it(tmp_path):
    write_page(tmp_path, write_logged(tmp_path / "seq_lora"))
    flags = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking"
    flags += " --disable-component-update --disable-sync --dump-dom"
    place = f"--user-data-dir={tmp_path / 'browser'}"
    page = f"file://{tmp_path}/out/report.html"
    done = subprocess.run(
        [BROWSER, *flags.split(), place, page], capture_output=True, text=True, timeout=60
    )
    assert "<h1>Run seq_lora, seed 1</h1>" in done.stdout and "<img" in done.stdout
