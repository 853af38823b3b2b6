"""Finished runs compared in tables, for a file and for a terminal of 120 columns."""

import itertools
import math
import statistics
from collections.abc import Callable, Iterable

from configs.command_line import UserError
from evaluation.finished import FinishedRun, by_method
from evaluation.matrix import known, mean
from evaluation.statistics import FEWEST_PAIRS, Difference, holm, least_p, paired_difference

Groups = dict[str, list[FinishedRun]]
Columns = dict[str, tuple[Callable[[FinishedRun], float], str]]

RESULTS: Columns = {
    "just learned ↓": (lambda run: run.metric("learning_loss"), ".3f"),
    "forgetting ↓": (lambda run: run.metric("forgetting"), "+.3f"),
    "BWT ↑": (lambda run: run.metric("backward_transfer"), "+.3f"),
    "final ↓": (lambda run: run.metric("average_final_loss"), ".3f"),
}
FURTHER: Columns = {
    "AIA ↓": (lambda run: run.metric("average_incremental_loss"), ".3f"),
    "retention ↑": (lambda run: run.metric("retention"), ".2f"),
    "drift, first 5 ↓": (lambda run: run.mean_drift("kl_first"), ".3f"),
    "drift, rest ↓": (lambda run: run.mean_drift("kl_rest"), ".3f"),
}
ACCURACIES: Columns = {
    "just learned ↑": (lambda run: run.accuracy("learning"), ".1f"),
    "forgetting ↓": (lambda run: run.accuracy("forgetting"), "+.1f"),
    "Last ↑": (lambda run: run.accuracy("last"), ".1f"),
    "Avg ↑": (lambda run: run.accuracy("avg"), ".1f"),
    "BWT ↑": (lambda run: run.accuracy("bwt"), "+.1f"),
    "FWT ↑": (lambda run: run.accuracy("fwt"), "+.1f"),
}
COSTS: Columns = {
    "samples a task": (lambda run: run.samples_kept(), ".4g"),
    "kept, MiB": (lambda run: run.mib_kept(), ",.1f"),
    "backward a step": (lambda run: run.samples_a_step("backward"), ".1f"),
    "forward a step": (lambda run: run.samples_a_step("forward"), ".1f"),
    "training, min": (lambda run: run.minutes(), ".1f"),
}
PAIRED: Columns = {
    "just learned, loss ↓": RESULTS["just learned ↓"],
    "forgetting, loss ↓": RESULTS["forgetting ↓"],
    "final mean, loss ↓": RESULTS["final ↓"],
    "just learned, accuracy ↑": ACCURACIES["just learned ↑"],
    "forgetting, accuracy ↓": ACCURACIES["forgetting ↓"],
    "final mean, accuracy ↑": ACCURACIES["Last ↑"],
}
SIGNIFICANT = 0.05


def deviation(values: list[float]) -> float:
    """The sample standard deviation of the known values; 0 of fewer than two."""
    numbers = known(values)
    return statistics.stdev(numbers) if len(numbers) > 1 else 0.0


def told(value: float, form: str) -> str:
    """Empty where there is no number."""
    return "" if math.isnan(value) else format(value, form)


def spread(values: list[float], form: str) -> str:
    """Mean and, of several, sample standard deviation; empty where there is no number."""
    text = told(mean(values), form)
    if len(known(values)) > 1:
        text += f" ± {format(deviation(values), form.lstrip('+'))}"
    return text


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """An aligned Markdown table."""
    table = [header, *rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in table
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def readings_in(runs: Iterable[FinishedRun]) -> list[str]:
    """The readings that some of the runs has, "latest" first."""
    names = (row.get("branches", "latest") for run in runs for row in run.losses)
    return list(dict.fromkeys(["latest", *names]))


def with_readings(groups: Groups) -> Groups:
    """The groups that have more than one reading."""
    return {name: runs for name, runs in groups.items() if len(readings_in(runs)) > 1}


def over_orders(groups: Groups) -> Groups:
    """The runs by method, those of all orders together."""
    return {
        method: list(itertools.chain(*of_method.values()))
        for method, of_method in by_method(groups).items()
    }


def spreads(runs: list[FinishedRun], columns: Columns) -> list[str]:
    """A cell for each column, over `runs`."""
    return [spread([value(run) for run in runs], form) for value, form in columns.values()]


def means(runs: list[FinishedRun], columns: Columns) -> list[str]:
    """A cell for each column: the mean alone."""
    return [told(mean(map(value, runs)), form) for value, form in columns.values()]


def by_name(groups: Groups, header: list[str], cells: Callable) -> str:
    """A table with a row for each group."""
    return markdown(["method", *header], [[name, *cells(runs)] for name, runs in groups.items()])


def rows_of(groups: Groups, columns: Columns) -> list[list[str]]:
    """A row for each group, and the mean over orders of a method that has several."""
    rows = []
    for method, of_method in by_method(groups).items():
        for name, runs in of_method.items():
            rows.append([name, str(len(runs)), *spreads(runs, columns)])
        if len(of_method) > 1:
            of_all = (
                spread([mean(map(value, runs)) for runs in of_method.values()], form)
                for value, form in columns.values()
            )
            number = sum(map(len, of_method.values()))
            rows.append([f"{method}@all", str(number), *of_all])
    return rows


def compare_tables(groups: Groups, reference: str = "") -> str:
    """All groups by metric, reading, cost and score, and against the method `reference`."""
    methods = over_orders(groups)
    # Light evaluation leaves it out.
    bases = (run.summary["matrix"][0] for runs in groups.values() for run in runs)
    base = next((told(mean(row), ".3f") for row in bases if None not in row), "")
    of_base = ["base", "", *(base if name == "final ↓" else "" for name in RESULTS)]
    parts = [
        "Losses in nats per response token, mean ± standard deviation over seeds, @all over the "
        "orders' means; ↓ lower is better, ↑ higher.",
        markdown(["method", "runs", *RESULTS], [of_base, *rows_of(groups, RESULTS)]),
        "Further, over all runs of a method:",
        by_name(methods, list(FURTHER), lambda runs: spreads(runs, FURTHER)),
        "What a method keeps as its last task begins: samples of each earlier task, and MiB in all "
        "beside the branches (a bank keeps those of every task, consolidation lets slow grow). "
        "Samples read a step, with a backward and forward only, its own among them. Of the runs "
        "that share a prefix store the first one fills it, and trains for longer.",
        by_name(methods, list(COSTS), lambda runs: means(runs, COSTS)),
    ]
    if several := with_readings(methods):
        readings = readings_in(itertools.chain(*several.values()))
        of_each: Columns = {r: (lambda run, r=r: run.reading(r), ".3f") for r in readings}
        parts += [
            "Final loss by reading:",
            by_name(several, readings, lambda runs: spreads(runs, of_each)),
        ]
    if accuracies := {
        # FWT is not known of runs that did not look ahead.
        name: (value, form)
        for name, (value, form) in ACCURACIES.items()
        if known(value(run) for runs in groups.values() for run in runs)
    }:
        parts += [
            "Accuracy, 0 to 100, of the likeliest among the options (papers mostly score what is "
            "generated); Last, Avg, BWT and FWT as papers define them (negative = worse).",
            markdown(["method", "runs", *accuracies], rows_of(groups, accuracies)),
        ]
    if any(run.scores for runs in groups.values() for run in runs):
        parts += [
            "Scores after the last stage, 0 to 100, higher is better: with the 95 % interval of "
            "one seed, or mean ± standard deviation of several.",
            markdown(*score_table(groups)),
        ]
    if reference:
        parts += paired_tables(methods, reference)
    return "\n\n".join(parts) + "\n"


def paired_tables(methods: Groups, reference: str) -> list[str]:
    """Every method minus `reference` over the pairs of runs that share order and seed.

    Raises `UserError` where no method has that name, as in the tables or as of its folder.
    """
    named = [
        method
        for method, runs in methods.items()
        if reference in (method, runs[0].name.partition("@")[0])
    ]
    if not named:
        raise UserError(f"--against {reference}: give one of these runs: {', '.join(methods)}")
    theirs = methods[named[0]]
    others = {name: runs for name, runs in methods.items() if name != named[0]}
    shared = {run.pair for run in theirs}
    pairs = {name: len(shared & {run.pair for run in runs}) for name, runs in others.items()}
    parts = [
        f"Against {named[0]}, paired over (order, seed): a method's number minus the reference's, "
        "the 95 % bootstrap interval over orders and seeds, both relative to the reference, p by "
        "flipping signs as if pairs were independent, and p corrected for the methods of the table "
        "(Holm). All of it holds for these held-out samples, which all runs share.",
    ]
    differences: dict[str, dict[str, Difference]] = {}
    for metric, (value, _) in PAIRED.items():
        found = {
            name: paired_difference(*({run.pair: value(run) for run in x} for x in (runs, theirs)))
            for name, runs in others.items()
        }
        differences[metric] = {name: of for name, of in found.items() if of}
    parts += _too_few(pairs, [found for found in differences.values() if found])
    for metric, found in differences.items():
        if found:
            header = [metric, "pairs", "difference", "95 % interval", "relative", "p", "p, Holm"]
            form = f"+{PAIRED[metric][1].lstrip('+')}"
            parts.append(markdown(header, _rows_of_differences(found, form)))
    return parts


def _interval(low: float, high: float, form: str) -> str:
    return "" if math.isnan(low) else f"[{format(low, form)}, {format(high, form)}]"


def _relative(of: Difference) -> str:
    interval = _interval(of.low / of.theirs, of.high / of.theirs, "+.1%")
    return f"{of.mean / of.theirs:+.1%} {interval}".rstrip()


def _rows_of_differences(found: dict[str, Difference], form: str) -> list[list[str]]:
    corrected = holm({name: difference.p for name, difference in found.items()})
    return [
        [
            name,
            str(of.pairs),
            told(of.mean, form),
            _interval(of.low, of.high, form),
            # A share of nothing, or of less, says nothing.
            _relative(of) if of.theirs > 0 else "",
            told(of.p, ".4f"),
            told(corrected[name], ".4f"),
        ]
        for name, of in found.items()
    ]


def _too_few(pairs: dict[str, int], tables: list[dict[str, Difference]]) -> list[str]:
    """What cannot be said with so many pairs of each method, and so many methods in a table."""
    lines = []
    if few := [f"{name} ({number})" for name, number in pairs.items() if number < FEWEST_PAIRS]:
        lines.append(f"Fewer than {FEWEST_PAIRS} pairs, so no interval: {', '.join(few)}.")
    most = max(pairs.values(), default=0)
    # The smallest table is corrected least.
    fewest = min((sum(of.pairs > 1 for of in found.values()) for found in tables), default=0)
    least = least_p(most)
    if fewest and least * fewest > SIGNIFICANT:
        which = "p" if least > SIGNIFICANT else "corrected p"
        lines.append(
            f"Too few pairs for a {which} of {SIGNIFICANT}, however clear the difference: with "
            f"{most} p is 2/2^{most} = {least:.4f} at least, and {min(1, fewest * least):.4f} "
            f"corrected for {fewest} methods."
        )
    return lines


def score_table(groups: Groups) -> tuple[list[str], list[list[str]]]:
    """(header, rows): a row for each method and reading, a column for each score."""
    cells: dict[tuple[str, str], dict[str, list[dict]]] = {}
    for name, runs in groups.items():
        for line in (line for run in runs for line in run.scores):
            column = f"{line['task']} {line['metric']}"
            of_row = cells.setdefault((name, line["branches"]), {})
            of_row.setdefault(column, []).append(line)
    columns = list(dict.fromkeys(column for of_row in cells.values() for column in of_row))

    def cell(lines: list[dict]) -> str:
        if len(lines) == 1:
            (line,) = lines
            return f"{line['score']:.0f} [{line['low']:.0f}, {line['high']:.0f}]"
        return spread([line["score"] for line in lines], ".1f")

    rows = [[*key, *(cell(of_row.get(c, [])) for c in columns)] for key, of_row in cells.items()]
    return ["method", "read as", *columns], rows
