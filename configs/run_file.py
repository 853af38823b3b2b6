"""Files of settings in YAML or JSON: of one run, for --config, and tables of many, for --runs."""

import dataclasses
import difflib
import json
from functools import partial
from pathlib import Path
from typing import get_type_hints

import yaml

from configs.command_line import Knobs, UserError, as_flags, config_class, wrong_type
from configs.ending import one_line

# Of the machine and not of the experiment.
ONLY_GIVEN = ("runs", "jobs", "part")
# Of one command and not of the run.
ONLY_ONCE = ("overwrite", "dry_run", "push_to_hub")
RUN_FILE = (".yaml", ".yml", ".json")


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice: the last one would win without a word."""

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise yaml.YAMLError(f"{twice[0]} is given twice")
        return super().construct_mapping(node, deep)


def _read(option: str, path: str):
    """What stands in a file; `UserError` where it cannot be read."""
    parse = json.loads if path.endswith(".json") else partial(yaml.load, Loader=_Loader)
    try:
        return parse(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{option} {path}: it cannot be read ({one_line(error)})") from None


def read_config(name: str) -> tuple[type[Knobs], dict]:
    """(the configuration class that `--config` names, what a run file changes of it).

    A run file is a mapping from fields to values, in FILE.yaml or FILE.json; its `base` is a name
    for `--config` to start from. Whether its fields are right is for `check_fields` to say.
    """
    if not name.endswith(RUN_FILE):
        return config_class(name), {}
    values = _read("--config", name)
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UserError(f"--config {name}: give fields and their values, such as lr_slow: 0.0001")
    base = values.pop("base", "base")
    if not isinstance(base, str) or base.endswith(RUN_FILE):
        raise UserError(f"--config {name}: base is {base!r}: give a name such as smollm2")
    return config_class(base), values


def check_fields(name: str, values: dict, kinds: list[type]) -> dict:
    """The `values` of the run file `name`, as the fields of the dataclasses `kinds` hold them.

    Raises `UserError` with all that is no field or of a wrong type.
    """
    hints = {key: kind for of in kinds for key, kind in get_type_hints(of).items()}
    right, problems = {}, []
    for key, value in values.items():
        if key not in hints:
            close = difflib.get_close_matches(key, hints, n=1)
            hint = f"did you mean {close[0]}?" if close else "see --help"
            problems.append(f"unknown field {key}; {hint}")
            continue
        right[key] = _as_float(value) if hints[key] is float else value
        if problem := wrong_type(key, hints[key], right[key]):
            problems.append(problem)
    if problems:
        raise UserError("\n".join(f"--config {name}: {problem}" for problem in problems))
    return right


def _as_float(value):
    """YAML 1.1 takes 1e-4, without a point, for a text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def as_run_file(cfg, **further) -> str:
    """A run file in YAML with all fields of `cfg`, and `further` ones of the script."""
    values = {"base": cfg.config_name, **further, **dataclasses.asdict(cfg)}
    values = {key: value for key, value in values.items() if key not in ONLY_ONCE}
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=100)


def read_runs(wanted: str) -> dict[str, list[str]]:
    """Table -> its options as a command line, from FILE or FILE,TABLE,...

    A table is a mapping from options to values; where one has `<<: *other` it goes on from another.
    Raises `UserError` with all that is no such file. Unknown options are left to the parser.
    """
    path, *chosen = wanted.split(",")
    tables = _read("--runs", path)
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
