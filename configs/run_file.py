"""A file of runs: tables of experiments, in YAML, with the options of a command line by name."""

from pathlib import Path

import yaml

from configs.command_line import UserError, as_flags

# Of the machine and not of the experiment.
ONLY_GIVEN = ("runs", "jobs", "part")


def read_runs(wanted: str) -> dict[str, list[str]]:
    """Table -> its options as a command line, from FILE or FILE,TABLE,...

    A table is a mapping from options to values; where one has `<<: *other` it goes on from another.
    Raises `UserError` with all that is no such file. Unknown options are left to the parser.
    """
    path, *chosen = wanted.split(",")
    try:
        tables = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, ValueError) as error:
        raise UserError(
            f"--runs {path}: it cannot be read ({' '.join(str(error).split())})"
        ) from None
    is_tables = isinstance(tables, dict) and all(isinstance(t, dict) for t in tables.values())
    if not tables or not is_tables:
        raise UserError(f"--runs {path}: give tables of options, such as mine: {{seeds: [1, 2]}}")
    if unknown := [name for name in chosen if name not in tables]:
        raise UserError(f"--runs {path}: no table {unknown[0]}; give some of {', '.join(tables)}")
    tables = {str(name): tables[name] for name in chosen or tables}
    if problems := [
        f"--runs {path}, {name}: {problem}"
        for name, options in tables.items()
        for problem in _problems(name, options)
    ]:
        raise UserError("\n".join(problems))
    return {name: as_flags(options) for name, options in tables.items()}


def _problems(name: str, options: dict) -> list[str]:
    found = [] if name.isidentifier() else ["name it with letters, digits and _: it is a folder"]
    for key, value in options.items():
        values = value if isinstance(value, list) else [value]
        if key in ONLY_GIVEN:
            found.append(f"{key} is for the command line: leave it out")
        elif not values or not all(isinstance(v, str | int | float) for v in values):
            found.append(f"{key} is {value!r}: give a value or a list of some")
    return found
