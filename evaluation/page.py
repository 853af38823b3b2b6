"""One HTML file that tells a finished run, or several side by side; it needs nothing else.

No script and no address in it: what a model or a log says is text.
"""

import base64
import html
import io
from pathlib import Path

from configs.ending import printable
from evaluation.finished import FinishedRun
from evaluation.logs import count, number, read_log, text
from evaluation.matrix import LOSS_SUMMARY, with_interval

STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem;
  color: #1a1a1a; background: #fff; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; } h3 { font-size: 1rem; }
table { border-collapse: collapse; margin: .5rem 0 1rem; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .7rem; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child { text-align: left; }
table.text th, table.text td { text-align: left; vertical-align: top; white-space: pre-wrap;
  overflow-wrap: anywhere; }
table.text td:first-child { white-space: nowrap; }
td.learned { font-weight: bold; }
div.wide { overflow-x: auto; } img { max-width: 100%; height: auto; }
p.note { color: #555; margin: .2rem 0; } summary { cursor: pointer; }
"""


def escaped(value) -> str:
    """A number, null or text as a cell says it."""
    if isinstance(value, float):
        return f"{value:.3f}"
    return "" if value is None else html.escape(printable(str(value)))


def table(header: list, rows: list[list], kind: str = "numbers") -> str:
    """Rows of cells; a tuple is (value, its class)."""
    lines = ["<tr>" + "".join(f"<th>{escaped(cell)}</th>" for cell in header) + "</tr>"]
    for row in rows:
        pairs = (cell if isinstance(cell, tuple) else (cell, "") for cell in row)
        cells = (
            f"<td class='{of}'>{escaped(v)}</td>" if of else f"<td>{escaped(v)}</td>"
            for v, of in pairs
        )
        lines.append("<tr>" + "".join(cells) + "</tr>")
    return f"<div class='wide'><table class='{kind}'>" + "\n".join(lines) + "</table></div>"


def from_markdown(tables: str) -> str:
    """What `compare_tables` gives: tables between paragraphs."""
    parts, rows = [], []
    for line in [*tables.splitlines(), ""]:
        if line.startswith("|"):
            rows.append([cell.strip() for cell in line.strip("|").split("|")])
            continue
        if rows:
            parts.append(table(rows[0], rows[2:]))
            rows = []
        if line.strip():
            parts.append(f"<p class='note'>{escaped(line)}</p>")
    return "\n".join(parts)


def picture(figure, title: str) -> str:
    """The figure inside the page."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f"<img alt='{escaped(title)}' src='data:image/png;base64,{data}'>"


def _matrix(run: FinishedRun) -> str:
    tasks, stages = run.summary["tasks"], ["base", *run.summary["stages"]]
    rows = [
        [
            stage,
            *(
                (loss, "learned" if stage == task else "")
                for task, loss in zip(tasks, losses, strict=True)
            ),
        ]
        for stage, losses in zip(stages, run.summary["matrix"], strict=True)
    ]
    summary = [
        [name, format(run.summary[key], form), meaning]
        for name, key, form, meaning in LOSS_SUMMARY
        if run.summary.get(key) is not None
    ]
    note = "<p class='note'>nats per response token, lower is better; bold: just learned</p>"
    return (
        note + table(["stage", *tasks], rows) + table(["over all tasks", "", ""], summary, "text")
    )


def _readings(run: FinishedRun) -> str:
    tasks = run.summary["tasks"]
    loss = {(r.get("branches", "latest"), r["eval_task"]): r["loss"] for r in run.losses}
    readings = dict.fromkeys(reading for reading, _ in loss)
    # What the model as it is makes of them stands in the matrix.
    return len(readings) > 1 and table(
        ["read as", *tasks], [[r, *(loss.get((r, t)) for t in tasks)] for r in readings]
    )


def counts(value) -> bool:
    return isinstance(value, dict) and all(map(count, value.values()))


def _routing(run: FinishedRun) -> str:
    kinds = {"stage": text, "eval_task": text, "answered_as": counts}
    lines = _optional(run, "seq_router.jsonl", kinds)
    tasks = run.summary["tasks"]
    last = [line for line in lines if line["stage"] == lines[-1]["stage"]]
    rows = [
        [line["eval_task"], *(line["answered_as"].get(task, 0) for task in tasks)] for line in last
    ]
    return rows and table(["held-out samples of, answered as", *tasks], rows)


def _scores(run: FinishedRun) -> str:
    kinds = {"stage": text, "task": text, "metric": text, "branches": text}
    kinds |= {"score": number, "low": number, "high": number}
    lines = run.scores or _optional(run, "seq_scores.jsonl", kinds)
    lines = [line for line in lines if line.get("stage", "") == lines[-1].get("stage", "")]
    readings = list(dict.fromkeys(line["branches"] for line in lines))
    rows: dict[tuple, list] = {}
    for line in lines:
        row = rows.setdefault((line["task"], line["metric"]), [None] * len(readings))
        row[readings.index(line["branches"])] = with_interval(line)
    note = "<p class='note'>0 to 100, higher is better, with 95 % intervals</p>"
    cells = [[f"{task} {metric}", *row] for (task, metric), row in rows.items()]
    return rows and note + table(["task and metric", *readings], cells)


def _answers(run: FinishedRun) -> str:
    kinds = {"stage": text, "task": text, "number": count, "reply": text}
    lines = _optional(run, "seq_samples.jsonl", kinds)
    parts = []
    for task, of_task in dict.fromkeys((line["task"], line["number"]) for line in lines):
        said = [
            [line["stage"], line["reply"]]
            for line in lines
            if (line["task"], line["number"]) == (task, of_task)
        ]
        parts.append(f"<h3>{escaped(task)}, question {of_task + 1}</h3>")
        parts.append(table(["after", "answer"], said, "text"))
    return "\n".join(parts)


def _optional(run: FinishedRun, name: str, kinds: dict) -> list[dict]:
    """Lines of a log that a run need not have."""
    path = run.folder / name
    has_lines = path.is_file() and path.stat().st_size
    return read_log(path, kinds, "python train_slsd_seq.py") if has_lines else []


def _settings(run: FinishedRun) -> str:
    rows = [[name, str(value)] for name, value in run.summary["config"].items()]
    return (
        f"<details><summary>settings</summary>{table(['setting', 'value'], rows, 'text')}</details>"
    )


SECTIONS = {
    "Losses": _matrix,
    "After the last stage, by reading": _readings,
    "Routing": _routing,
    "Scores": _scores,
    "Answers": _answers,
}


def write_page(path: Path, runs: dict[str, tuple[FinishedRun, list[str]]], compared: str) -> None:
    """Writes the page of `runs`, name -> (run, its pictures), below what compares them."""
    parts = [compared]
    for name, (run, pictures) in runs.items():
        # One alone is named by the title.
        parts += [f"<h2>{escaped(name)}</h2>"] if len(runs) > 1 else []
        parts += pictures
        for title, tell in SECTIONS.items():
            if told := tell(run):
                parts.append(f"<h3>{title}</h3>{told}")
        parts.append(_settings(run))
    title = "Runs" if len(runs) > 1 else f"Run {next(iter(runs))}"
    body = "\n".join(parts)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        f"<title>{escaped(title)}</title><style>{STYLE}</style></head>\n"
        f"<body><h1>{escaped(title)}</h1>\n{body}\n</body></html>\n",
        encoding="utf-8",
    )
