"""The methods by name, and the command line with their knobs: each file here is one method."""

import dataclasses
import functools
import importlib
import pkgutil
import sys
from pathlib import Path

from configs.command_line import (
    UserError,
    default_of,
    import_file,
    parse_dataclasses,
    value_of_option,
    with_defaults,
)
from configs.run_file import check_fields, read_config
from methods.method import Method


def _method_in(module, name: str) -> type[Method] | None:
    """The subclass that `module` defines, with `name` where it has none of its own."""
    own = [
        thing
        for thing in vars(module).values()
        if isinstance(thing, type)
        and issubclass(thing, Method)
        and thing.__module__ == module.__name__
        and thing is not Method
    ]
    if len(own) > 1:
        raise UserError(f"{module.__file__}: define one subclass of Method, not {len(own)}")
    for method in own:
        method.name = method.__dict__.get("name") or name
    return own[0] if own else None


def _methods_here() -> dict[str, type[Method]]:
    names = sorted(found.name for found in pkgutil.iter_modules(__path__))
    found = (_method_in(importlib.import_module(f"methods.{name}"), name) for name in names)
    return {method.name: method for method in found if method}


METHODS = _methods_here()


@functools.cache
def find_method(name: str) -> type[Method]:
    """The method `name`, out of METHODS or in a Python file; `UserError` where there is none."""
    if name in METHODS:
        return METHODS[name]
    if not name.endswith(".py") or not Path(name).is_file():
        raise UserError(
            f"--method {name}: give {', '.join(METHODS)}, or a Python file with one of your own"
        )
    method = _method_in(import_file(name), Path(name).stem)
    if method is None:
        raise UserError(f"--method {name}: it defines no subclass of methods.method.Method")
    return method


def _knobs_of(method: type[Method], base: type) -> list[type]:
    """The knob dataclasses of `method`, with the defaults that the configuration `base` gives."""
    return [_with_defaults(knobs, base) for knobs in method.knobs]


@functools.cache
def _with_defaults(knobs: type, base: type) -> type:
    names = [field.name for field in dataclasses.fields(knobs) if hasattr(base, field.name)]
    return with_defaults(knobs, {name: getattr(base, name) for name in names})


def run_config(base: type, *methods: type[Method]) -> type:
    """The configuration class `base` with the knobs of `methods`."""
    knobs = [kind for method in methods for kind in _knobs_of(method, base)]
    return dataclasses.make_dataclass(base.__name__, [], bases=(base, *dict.fromkeys(knobs)))


def knob_names(method: type[Method]) -> set[str]:
    """The fields of a configuration that only some methods use, and `method` among them."""
    own = {field.name for kind in method.knobs for field in dataclasses.fields(kind)}
    return {*method.uses, *own}


def parse_config(argv, *more_types, description: str, every_method: bool = False) -> tuple:
    """(config, *instances of `more_types`) from the command line.

    `--config NAME` takes the dataclass in `configs/NAME_config.py`, or what a run file makes of
    one; other flags change its fields. The config has the knobs of its method, and the parser those
    of all, under headings.

    Args:
        every_method: the config has the knobs of every method, for a run of several.

    Raises `UserError` for whatever is wrong, also for a knob of a method that is not the one given.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    name = value_of_option(argv, "--config") or "base"
    base, in_file = read_config(name)
    of_file = str(in_file.get("method", default_of(_fields(base)["method"])))
    own = value_of_option(argv, "--method") or of_file
    methods = METHODS | {method: find_method(method) for method in (of_file, own)}
    users = _users(methods)
    if in_file:
        plain = run_config(base, *methods.values())
        in_file = check_fields(name, in_file, [plain, *more_types])
        if problems := _of_others(in_file, plain, {of_file, own}, users):
            raise UserError("\n".join(f"--config {name}: {problem}" for problem in problems))
        base = with_defaults(base, in_file)
        more_types = [_with_defaults(kind, base) for kind in more_types]
    options = {
        "default": "base",
        "metavar": "NAME",
        "help": "takes configs/NAME_config.py, or a run file NAME.yaml or NAME.json",
    }
    everything = run_config(base, *methods.values())
    # What is wrong is told by the configuration that is made of it.
    everything.problems = lambda _: []
    kind = everything if every_method else run_config(base, methods[own])

    return parse_dataclasses(
        argv,
        everything,
        *more_types,
        description=description,
        headings={field: f"with --method {', '.join(names)}" for field, names in users.items()},
        extra=[("--config", options)],
        finish=lambda given: _chosen(given, kind, own, {} if every_method else users),
    )


def _users(methods: dict[str, type[Method]]) -> dict[str, list[str]]:
    """Knob -> the methods that it belongs to, of those that belong to some."""
    users: dict[str, list[str]] = {}
    for name, method in methods.items():
        for field in knob_names(method):
            users.setdefault(field, []).append(name)
    return users


def _of_others(values: dict, kind: type, own: set[str], users: dict[str, list[str]]) -> list[str]:
    """A line for each of `values` that is not its default in `kind`, and no knob of `own`."""
    mine = " or ".join(sorted(own))
    return [
        f"--{name} belongs to --method {', '.join(users[name])}, and this run's is {mine}: leave "
        "it out, or choose one of them"
        for name in users
        if name in values
        and own.isdisjoint(users[name])
        and values[name] != default_of(_fields(kind)[name])
    ]


def _chosen(given, kind: type, own: str, users: dict[str, list[str]]):
    """The configuration of class `kind` with the values of `given`, which has every knob there is.

    `users` tells which methods each knob belongs to: those that are not this one's must have their
    defaults. Raises `UserError` with all that is wrong.
    """
    problems = _of_others(vars(given), type(given), {own}, users)
    try:
        cfg = kind(**{name: getattr(given, name) for name in _fields(kind)})
    except UserError as error:
        problems += str(error).splitlines()
    if problems:
        raise UserError("\n".join(problems))
    return cfg


def _fields(kind: type) -> dict[str, dataclasses.Field]:
    return {field.name: field for field in dataclasses.fields(kind)}
