"""Flags from dataclasses, errors, and which process this is."""

import dataclasses
import difflib
import importlib.util
import inspect
import math
import os
import re
import signal
import sys
from argparse import ArgumentDefaultsHelpFormatter
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

from transformers import HfArgumentParser


class UserError(Exception):
    """Something the user can mend. Each line of the message names one problem and its cure.

    Attributes:
        is_of_process: raised where the processes of a run have joined: each tells its own.
    """

    is_of_process = False


class NothingToDo(Exception):
    """The run is over before it began, and rightly so; the message says why."""


class Stopped(Exception):
    """A signal asked the run to stop; it has saved what it needs to go on."""

    def __init__(self, signal_number: int):
        super().__init__(f"stopped by {signal.Signals(signal_number).name}")
        self.exit_code = 128 + signal_number


def _from_launcher(name: str, least: int) -> int:
    """The number that torchrun or accelerate launch put into the environment, else `least`.

    Raises `UserError` where something else put anything else there.
    """
    text = os.environ.get(name) or str(least)
    if not re.fullmatch(r"\d{1,9}", text, re.ASCII) or int(text) < least:
        raise UserError(
            f"{name} is {text!r} in the environment, where torchrun puts a number from {least} on: "
            f"start with torchrun, or `unset {name}`"
        )
    return int(text)


def num_processes() -> int:
    """Processes of this run, as torchrun or accelerate launch started them."""
    return _from_launcher("WORLD_SIZE", 1)


def rank() -> int:
    """Number of this process among all of the run, from 0.

    Raises `UserError` where there are not so many: it would take a share that is nobody's.
    """
    number, of = _from_launcher("RANK", 0), num_processes()
    if number >= of:
        raise UserError(
            f"RANK is {number} and WORLD_SIZE {of} in the environment: start with torchrun, or "
            "`unset RANK WORLD_SIZE`"
        )
    return number


def local_rank() -> int:
    """Number of this process among those on this machine, from 0."""
    return _from_launcher("LOCAL_RANK", 0)


def processes_here() -> int:
    """Processes of the run on this machine."""
    return _from_launcher("LOCAL_WORLD_SIZE", 1)


def is_first() -> bool:
    """Whether this process writes and speaks for all."""
    return rank() == 0


def shows_progress() -> bool:
    """Whether this process draws progress bars."""
    return is_first() and bool(sys.stderr) and sys.stderr.isatty()


def knob(default, help: str, *, decides: bool = True, **bounds):
    """A field of a `Knobs` dataclass: its default, meaning and bounds side by side.

    Args:
        default: lists, dicts and functions become default factories.
        help: unit and meaning; "" leaves it without a flag.
        decides: whether it changes what comes out of a run. One that does not may be another when
            the run is resumed.
        bounds: of a number `at_least`, `above`, `below`, `at_most`, and `or_exactly` what is
            allowed beyond them; of a text `pattern`, (regular expression, the same in words);
            `not_empty` of a text or list.
    """
    return _field(default, {"help": help, "decides": decides, "bounds": bounds})


def _field(default, metadata) -> dataclasses.Field:
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    if callable(default):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def with_defaults(kind: type, defaults: dict) -> type:
    """The `Knobs` dataclass `kind` with other defaults for some of its fields."""
    return dataclasses.dataclass(type(kind.__name__, (kind,), dict(defaults)))


def default_of(field: dataclasses.Field):
    """The value that a dataclass field has where none is given."""
    make = field.default_factory
    return field.default if make is dataclasses.MISSING else make()


class Knobs:
    """Base of every dataclass with flags: checks types and bounds on construction, all at once.

    A subclass changes a default with a plain `name = value`; help and bounds stay.
    """

    def __init_subclass__(cls):
        for base in filter(dataclasses.is_dataclass, cls.__mro__[1:]):
            for field in dataclasses.fields(base):
                value = cls.__dict__.get(field.name, dataclasses.MISSING)
                if value is dataclasses.MISSING or isinstance(value, dataclasses.Field):
                    continue
                own = inspect.get_annotations(cls)
                cls.__annotations__ = {field.name: get_type_hints(base)[field.name], **own}
                setattr(cls, field.name, _field(value, field.metadata))

    def __post_init__(self):
        problems = _wrong_types(self) or self.problems()
        if problems:
            raise UserError("\n".join(problems))

    def problems(self) -> list[str]:
        """A line for each impossible value; types are right already. Subclasses add theirs."""
        return [
            f"{field.name} is {getattr(self, field.name)!r}: give {wanted}"
            for field in dataclasses.fields(self)
            if (
                wanted := _out_of_bounds(
                    getattr(self, field.name), field.metadata.get("bounds", {})
                )
            )
        ]


def _out_of_bounds(value, bounds: dict) -> str:
    """What should have been given, or "" where the value is within the bounds."""
    if "pattern" in bounds:
        expression, words = bounds["pattern"]
        return "" if re.fullmatch(expression, value) else words
    if isinstance(value, str | list):
        items = [value] if isinstance(value, str) else value
        full = items and all(str(item).strip() for item in items)
        return "" if full or "not_empty" not in bounds else "a name"
    if isinstance(value, bool | dict) or value == bounds.get("or_exactly"):
        return ""
    fits = {
        "or_exactly": lambda limit: True,
        "at_least": lambda limit: value >= limit,
        "above": lambda limit: value > limit,
        "below": lambda limit: value < limit,
        "at_most": lambda limit: value <= limit,
    }
    # A whole number may be too large for a float.
    is_finite = isinstance(value, int) or math.isfinite(value)
    if is_finite and all(fits[name](limit) for name, limit in bounds.items()):
        return ""
    words = {
        "or_exactly": "{},",
        "at_least": "{} or more",
        "above": "more than {}",
        "below": "below {}",
        "at_most": "at most {}",
    }
    told = [words[name].format(limit) for name, limit in bounds.items()]
    return ", ".join(told).replace(",,", " or") or "a finite number"


def _wrong_types(knobs) -> list[str]:
    return [
        problem
        for name, kind in get_type_hints(type(knobs)).items()
        if (problem := wrong_type(name, kind, getattr(knobs, name)))
    ]


def wrong_type(name: str, kind, value) -> str:
    """A line where `value` is not of the type that the annotation `kind` of a field asks for."""
    return "" if _is_of(kind, value) else f"{name} is {value!r}: give {_in_words(kind)}"


def _is_of(kind, value) -> bool:
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_is_of(*get_args(kind), item) for item in value)
    if get_origin(kind) is dict:
        keys, values = get_args(kind)
        return isinstance(value, dict) and all(
            _is_of(keys, key) and _is_of(values, item) for key, item in value.items()
        )
    # Python counts True as an int and not 1 as a float.
    return type(value) is kind or (kind is float and type(value) is int)


def _in_words(kind) -> str:
    if get_origin(kind) is Literal:
        return ", ".join(map(str, get_args(kind)))
    if get_origin(kind) is list:
        return "a list of " + {str: "names", int: "whole numbers"}.get(get_args(kind)[0], "values")
    if get_origin(kind) is dict:
        return f"a mapping from names to {_in_words(get_args(kind)[1])}"
    return f"a value of type {kind.__name__}"


class Parser(HfArgumentParser):
    """Takes the dataclass fields that have a help text; what is wrong is a `UserError`.

    Args:
        headings: field -> the title that it stands under in the help.
    """

    def __init__(self, types=(), headings: dict[str, str] | None = None, **kwargs):
        self._headings, self._titled = headings or {}, {}
        super().__init__(types, allow_abbrev=False, **kwargs)

    def _parse_dataclass_field(self, parser, field):
        if not field.metadata.get("help"):
            return
        shown = _field(default_of(field), {"help": field.metadata["help"]})
        shown.name, shown.type = field.name, field.type
        if title := self._headings.get(field.name):
            if title not in self._titled:
                self._titled[title] = self.add_argument_group(title)
            parser = self._titled[title]
        super()._parse_dataclass_field(parser, shown)

    def error(self, message):
        raise UserError(f"{message}; see --help")


def parse_dataclasses(
    argv, *types, description: str, headings=None, extra=(), finish=lambda first: first
) -> tuple:
    """Instances of the `Knobs` dataclasses `types`, filled from `argv` (default: `sys.argv[1:]`).

    Every field is a flag of its own name.

    Args:
        headings: field -> title in the help, for those that do not stand with the others.
        extra: (flag, keyword arguments) of options that belong to no dataclass.
        finish: makes what is returned first of the first instance.

    Raises `UserError` with all that is unknown, malformed or out of bounds.
    """
    parser = Parser(
        types,
        headings,
        description=description,
        # A fixed width keeps the help the same wherever it is printed.
        formatter_class=lambda prog: ArgumentDefaultsHelpFormatter(prog, width=100),
        usage="%(prog)s [--option value ...]",
    )
    for flag, kwargs in extra:
        parser.add_argument(flag, **kwargs)
    given, unknown = parser.parse_known_args(list(sys.argv[1:] if argv is None else argv))
    if unknown:
        known = [option for action in parser._actions for option in action.option_strings]
        close = difflib.get_close_matches(unknown[0].split("=")[0], known, n=1)
        hint = f"did you mean {close[0]}?" if close else "see --help"
        raise UserError(f"unknown option {unknown[0]}; {hint}")
    instances, problems = [], []
    for kind in types:
        names = [field.name for field in dataclasses.fields(kind) if hasattr(given, field.name)]
        try:
            instance = kind(**{name: getattr(given, name) for name in names})
            instances.append(instance if instances or problems else finish(instance))
        except UserError as error:
            problems += str(error).splitlines()
    if problems:
        raise UserError("\n".join(problems))
    return tuple(instances)


def value_of_option(argv: list[str], option: str) -> str | None:
    """What follows the last `option` in `argv`; None without it. For what decides the parser."""
    value = None
    for i, word in enumerate(argv):
        if word == option:
            value = argv[i + 1] if i + 1 < len(argv) else ""
        elif word.startswith(f"{option}="):
            value = word.split("=", 1)[1]
    return value


def as_flags(settings: dict) -> list[str]:
    """Fields of a configuration as options of a command line."""
    flags = []
    for name, value in settings.items():
        flags += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return flags


def import_file(path: str | Path):
    """The module in the Python file `path`; `UserError` where it cannot be imported."""
    path = Path(path)
    spec = importlib.util.spec_from_file_location(f"own_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look up annotations that are text in the module of that name.
    sys.modules[module.__name__] = module
    try:
        spec.loader.exec_module(module)
    except (OSError, SyntaxError, ImportError) as error:
        raise UserError(f"{path} cannot be imported ({error})") from error
    return module


def config_class(name: str) -> type[Knobs]:
    """The dataclass in `configs/NAME_config.py`, or in the Python file `name`.

    It knows `name` as its `config_name`.
    """
    folder = Path(__file__).parent
    path = Path(name) if name.endswith(".py") else folder / f"{name}_config.py"
    if not path.is_file() or (path.parent == folder and path.suffix != ".py"):
        known = sorted(path.name.removesuffix("_config.py") for path in folder.glob("*_config.py"))
        raise UserError(f"--config {name}: there is no such file; give {' or '.join(known)}")
    if path.resolve().parent == folder:
        module = importlib.import_module(f"configs.{path.stem}")
    else:
        module = import_file(path)
    found = [
        thing
        for thing in vars(module).values()
        if dataclasses.is_dataclass(thing) and thing.__module__ == module.__name__
    ]
    if len(found) != 1:
        raise UserError(f"{path}: define one subclass of BaseConfig, not {len(found)}")
    found[0].config_name = name
    return found[0]
