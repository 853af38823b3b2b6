"""How a script ends: exit codes, what is said of a fault, and signals."""

import contextlib
import functools
import os
import signal
import sys
import threading

from configs.command_line import NothingToDo, Stopped, UserError, is_first

# By a scheduler, and by a terminal that closes; Windows has no SIGHUP.
STOPPING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))


def one_line(error: BaseException) -> str:
    """What an error says, or of what kind it is."""
    return " ".join(str(error).split()) or type(error).__name__


def printable(text: str) -> str:
    """`text` with a space for each character that would steer a terminal; lines and tabs stay."""
    return "".join(c if c.isprintable() or c in "\n\t" else " " for c in text)


def _prepare_streams() -> None:
    """What a terminal cannot show must not end a run, and nor must a stream that is closed."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            # Else the next file to be opened gets its number, and what is said there.
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def _interrupt(number: int, frame) -> None:
    while frame and frame.f_code.co_name != "__del__":
        frame = frame.f_back
    if frame is None:
        raise KeyboardInterrupt(number)
    # Python prints what a destructor raises, and goes on: again when it is through.
    threading.Timer(0.01, os.kill, (os.getpid(), number)).start()


@contextlib.contextmanager
def _told_to_stop():
    """Within the block SIGTERM and SIGHUP end the script as Ctrl-C does: it tidies up."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in STOPPING:
            # What is ignored, as by nohup, stays so.
            if signal.getsignal(number) is signal.SIG_DFL:
                before[number] = signal.signal(number, _interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _exit_code(main, argv) -> int:
    """That of `main(argv)`, after what there is to say of it."""
    try:
        try:
            main(argv)
        finally:
            # Now, where it is known what to do about a reader that has gone.
            sys.stdout.flush()
    except NothingToDo as reason:
        print(reason, flush=True)
    except UserError as error:
        # Until the processes of a run have joined, each of them says the same.
        if error.is_of_process or _speaks():
            _tell(*(f"error: {printable(line)}" for line in str(error).split("\n") if line))
        return 2
    except Stopped as stop:
        _tell(f"{stop}; the same command goes on from the last saved step")
        return stop.exit_code
    except BrokenPipeError:
        # Whoever read what was printed has gone, as `head` does; nor can the rest be flushed.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (OSError, MemoryError, RuntimeError) as error:
        reason = _what_ran_out(error)
        if not reason:
            raise
        _tell(f"error: {printable(reason)}; the last saved state is whole")
        return 2
    except KeyboardInterrupt as interrupt:
        _tell("interrupted")
        return 128 + (interrupt.args[0] if interrupt.args else signal.SIGINT)
    return 0


def _what_ran_out(error: Exception) -> str:
    """In words, where the machine failed and not the program: disk, folder, memory; else ""."""
    if isinstance(error, OSError):
        return str(error) if error.errno is not None else ""
    is_full = isinstance(error, MemoryError) or is_out_of_memory(error)
    return "out of memory" if is_full else ""


def is_out_of_memory(error: Exception) -> bool:
    """Whether torch, or a library beneath it, found no room; for a CPU it has no class of its own.

    cuBLAS and cuDNN allocate behind torch's back, and torch raises what they return.
    """
    signs = ("out of memory", "can't allocate memory", "STATUS_ALLOC_FAILED")
    return any(sign in str(error) for sign in signs)


def _speaks() -> bool:
    try:
        return is_first()
    except UserError:
        return True


def _tell(*lines: str) -> None:
    """Prints to stderr, which may have gone with the terminal."""
    with contextlib.suppress(OSError):
        print(*lines, sep="\n", file=sys.stderr, flush=True)


def command_line(main):
    """Decorates a script's `main(argv=None)`: returns its exit code.

    0 done; 2 on `UserError`, which prints `error: ...` a line, and where disk or memory fail; 130
    on Ctrl-C, 143 on SIGTERM, 129 on SIGHUP; 141 where nobody reads what it prints.
    """

    @functools.wraps(main)
    def wrapped(argv=None) -> int:
        _prepare_streams()
        with _told_to_stop():
            return _exit_code(main, argv)

    return wrapped
