"""Settings, their flags, and how a script ends.

Each script imports this before anything that takes seconds: until its `main` has begun, Ctrl-C
ends it without a traceback.
"""

import sys


def _quietly(kind, error, trace) -> None:
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = _quietly
