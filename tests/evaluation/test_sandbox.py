"""Hostile programs. Each would end by itself: what is measured is that it does not come to that."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from textwrap import dedent

import pytest
from helpers import ROOT

from configs.command_line import UserError
from evaluation import sandbox as sandbox_module
from evaluation.sandbox import DISK_MIB, PROCESSES, check_sandbox, passes_tests

SQUARE = "def f(x):\n    return x * x\n"
CUBE = "def f(x):\n    return x * x * x\n"
TESTS = ["assert f(2) == 4", "assert f(-3) == 9"]


@pytest.fixture(scope="module", autouse=True)
def sandbox():
    try:
        check_sandbox()
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture
def name():
    return f"box{uuid.uuid4().hex[:10]}"


def holds(program: str, *conditions: str, **limits) -> bool:
    """Whether the program, in a sandbox, runs to its end and the conditions are true then."""
    tests = [f"assert {condition}" for condition in conditions or ["True"]]
    return passes_tests(dedent(program), tests, **limits)


def named(name: str, program: str) -> str:
    """The program, to be found under this name from outside."""
    set_name = f"import ctypes\nctypes.CDLL(None).prctl(15, b'{name}', 0, 0, 0)\n"
    return set_name + dedent(program)


def alive(name: str) -> int:
    """Processes of this machine that have the name."""
    found = 0
    for path in Path("/proc").glob("[0-9]*/comm"):
        try:
            found += path.read_text().strip() == name
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def wait_until(condition, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


@pytest.mark.parametrize(
    "program",
    [
        SQUARE,
        "from __future__ import annotations\n" + SQUARE,
        SQUARE + "if __name__ == '__main__':\n    raise SystemExit(1)\n",
        "import dataclasses\n@dataclasses.dataclass\nclass A:\n    x: 'int'\n"
        "def f(x):\n    return A(x).x ** 2\n",
        # A thread that would keep the interpreter from ending.
        SQUARE + "import threading, time\nthreading.Thread(target=time.sleep, args=(20,)).start()",
    ],
)
def test_right_programs_pass(program):
    assert passes_tests(program, TESTS)


@pytest.mark.parametrize(
    "program",
    [
        "",
        CUBE,
        "def f(x):\n    return 4\n",
        "def f(x)\n    return x * x\n",
        SQUARE + "f(None)\n",
        SQUARE + "\0",
        SQUARE + "# \ud800",
        "f = lambda x: f(x)",
        "raise KeyboardInterrupt\n" + SQUARE,
        SQUARE + "import ctypes\nctypes.string_at(0)",
        SQUARE + "import os\nos.abort()",
        SQUARE + "import numpy",
    ],
)
def test_wrong_programs_fail(program):
    assert not passes_tests(program, TESTS)


def test_imports_serve_the_tests_and_not_the_program():
    tests = ["assert math.isclose(f(2), 4)"]
    assert passes_tests(SQUARE, tests, ["import math"])
    assert not passes_tests(SQUARE, tests)
    assert not passes_tests(SQUARE + "math.pi\n", tests, ["import math"])


def test_tests_that_say_nothing_are_refused():
    with pytest.raises(ValueError, match="no tests"):
        passes_tests(SQUARE, [])
    with pytest.raises(SyntaxError):
        passes_tests(SQUARE, ["assert f(2) =="])


WRITE_EVERYWHERE = """
import os
for text in (b"pass", b"begun", b"begun" + bytes(32)):
    for descriptor in range(64):
        try:
            os.write(descriptor, text)
        except OSError:
            pass
"""


@pytest.mark.parametrize(
    "program",
    [
        SQUARE + "import os\nos._exit(0)",
        SQUARE + "import sys\nsys.exit(0)",
        SQUARE + "raise SystemExit",
        "def f(x):\n    raise SystemExit(0)",
        "import os\ndef f(x):\n    os._exit(0)",
        "print('pass', end='', flush=True)\n" + CUBE,
        "print('pass', end='', flush=True)\nimport os\nos._exit(0)",
        WRITE_EVERYWHERE + CUBE,
        WRITE_EVERYWHERE + SQUARE,
        CUBE + "import atexit\natexit.register(print, 'pass', end='')",
        CUBE + "import sys\nsys.exit = print\nAssertionError = None",
        CUBE + "import sys\nsys.excepthook = lambda *_: print('pass', end='')",
        CUBE + "import builtins\nbuiltins.print = builtins.exec = builtins.compile = max",
        CUBE + "import builtins\nbuiltins.exec = lambda *_: None",
        CUBE + "import builtins\nbuiltins.AssertionError = type('Fine', (Exception,), {})",
        CUBE + "import os\nos._exit = os.write = lambda *_: None",
    ],
)
def test_a_verdict_cannot_be_claimed(program):
    assert not passes_tests(program, TESTS)


@pytest.mark.parametrize(
    "body",
    [
        "pass",
        "time.sleep(0.1)",
        "try:\n        raise SystemExit\n    except BaseException:\n        pass",
        # What floods the private pipe has to wait, since it is not read.
        "for n in range(3, 64):\n        try:\n            os.write(n, bytes(1 << 20))\n"
        "        except OSError:\n            pass",
    ],
)
def test_a_program_that_does_not_end_is_stopped(body):
    start = time.monotonic()
    head = "import os, signal, time\nfor n in (2, 15, 24):\n    signal.signal(n, signal.SIG_IGN)\n"
    loop = f"while time.monotonic() < {start + 20}:\n    {body}\n"
    assert not passes_tests(head + loop + SQUARE, TESTS, seconds=1)
    assert time.monotonic() - start < 10


def test_reading_stdin_ends():
    program = """
        import sys
        read = sys.stdin.read()
        try:
            input()
        except EOFError:
            ended = True
    """
    assert holds(program, "read == ''", "ended")


def test_gigabytes_of_output_are_dropped():
    program = """
        import os, sys
        for _ in range(4096):
            os.write(1, bytes(1 << 20))
            sys.stderr.write("x" * 1000)
    """
    assert holds(program)


def test_processes_are_limited():
    program = """
        import os, time
        born = 0
        for _ in range(200):
            try:
                child = os.fork()
            except BlockingIOError:
                break
            if not child:
                time.sleep(1)
                os._exit(0)
            born += 1
    """
    assert holds(program, f"0 < born < {PROCESSES}")


def test_no_process_survives(name):
    """Children in sessions of their own, deaf to signals: of a program that is stopped or done."""
    program = named(
        name,
        """
        import os, signal, time
        for _ in range(4):
            if not os.fork():
                os.setsid()
                for n in (1, 2, 15):
                    signal.signal(n, signal.SIG_IGN)
                ctypes.CDLL(None).prctl(1, 0)
                time.sleep(20)
                os._exit(0)
        """,
    )
    with ThreadPoolExecutor() as pool:
        stopped = pool.submit(holds, program + "time.sleep(20)", seconds=2)
        seen = 0
        while not stopped.done():
            seen = max(seen, alive(name))
            time.sleep(0.05)
    assert seen == 5 and not stopped.result() and alive(name) == 0
    assert holds(program) and alive(name) == 0


def test_a_killed_caller_takes_the_program_along(name):
    code = (
        "import sys\nfrom evaluation.sandbox import passes_tests\n"
        "passes_tests(sys.argv[1], ['0'], seconds=30)"
    )
    program = named(name, "import time\ntime.sleep(20)")
    caller = subprocess.Popen([sys.executable, "-c", code, program], cwd=ROOT)
    started = wait_until(lambda: alive(name), 15)
    caller.send_signal(signal.SIGKILL)
    caller.wait()
    assert started and wait_until(lambda: not alive(name), 10)


def test_memory_is_limited():
    program = """
        try:
            bytearray({} << 20)
            refused = False
        except MemoryError:
            refused = True
    """
    assert holds(program.format(100 << 10), "refused")
    assert holds(program.format(200), "not refused")
    assert holds(program.format(200), "refused", memory_mib=128)


def test_limits_cannot_be_lifted():
    program = """
        import resource
        names = ("CPU", "AS", "NPROC", "FSIZE", "NOFILE", "CORE")
        kinds = [getattr(resource, "RLIMIT_" + name) for name in names]
        limits = list(map(resource.getrlimit, kinds))
        refused = 0
        for kind, (_, hard) in zip(kinds, limits):
            try:
                resource.setrlimit(kind, (hard + 1, hard + 1))
            except (ValueError, OSError):
                refused += 1
    """
    assert holds(
        program,
        f"limits[:3] == [(2, 2), (512 << 20, 512 << 20), ({PROCESSES}, {PROCESSES})]",
        f"limits[3:] == [({DISK_MIB} << 20, {DISK_MIB} << 20), (64, 64), (0, 0)]",
        "refused == 6",
        seconds=1.5,
    )


def test_files_go_to_an_empty_folder_of_bounded_size():
    program = """
        import os
        before = os.listdir()
        with open("a", "w") as file:
            file.write("text")
        with open("a") as file:
            text = file.read()
        written = 0
        try:
            for i in range(64):
                with open(str(i), "wb", 0) as file:
                    written += file.write(bytes(1 << 20))
        except OSError as error:
            reason = error.strerror
    """
    assert holds(program, "before == []", "text == 'text'", "reason.startswith('No space')")
    assert holds(program, f"0 < written <= {DISK_MIB} << 20")


def test_nothing_outside_can_be_read_or_written(tmp_path, name, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("HF_TOKEN", "not to be seen")
    secret = tmp_path / "secret"
    secret.write_text("not to be seen")
    mounts = Path("/proc/self/mountinfo").read_text()
    folders = ["/", "/tmp", "/dev/shm", "/usr", sys.base_prefix]
    folders += map(str, (tmp_path, ROOT, Path.home(), Path.cwd()))
    program = f"""
        import os
        for folder in {folders}:
            try:
                os.makedirs(folder, exist_ok=True)
                open(os.path.join(folder, "{name}"), "w").close()
            except OSError:
                pass
        def complaint(folder):
            try:
                os.mkdir(os.path.join(folder, "{name}-folder"))
            except OSError as error:
                return error.strerror
    """
    unseen = [secret, ROOT / "README.md", "/proc", "/dev/null", "/etc/passwd"]
    assert holds(
        program,
        f"not any(map(os.path.exists, {list(map(str, unseen))}))",
        "'HF_TOKEN' not in os.environ",
        "complaint('/usr') == 'Read-only file system'",
        f"complaint({sys.base_prefix!r}) == 'Read-only file system'",
    )
    assert [folder for folder in folders if (Path(folder) / name).exists()] == []
    assert list(tmp_path.iterdir()) == [secret]
    assert Path("/proc/self/mountinfo").read_text() == mounts


def test_what_is_mounted_inside_usr_stays_out(tmp_path):
    if os.geteuid():
        pytest.skip("only root mounts")
    reach = "import os\nopen('/usr/local/games/found', 'w')\n"
    (tmp_path / "run.py").write_text(
        "from evaluation.sandbox import passes_tests\n"
        f"print(passes_tests('x = 1', ['assert x']), passes_tests({reach!r}, ['assert True']))"
    )
    mounted = "mount -t tmpfs -o mode=1777 none /usr/local/games && touch /usr/local/games/old"
    run = f"{mounted} && {sys.executable} {tmp_path}/run.py && ls /usr/local/games"
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", run],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["True", "False", "old"], done.stderr


def test_no_network(name):
    """Neither the loopback interface nor an abstract socket of this machine is reached."""
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_UNIX) as unix:
        unix.bind(f"\0{name}")
        unix.listen()
        for server in (tcp, unix):
            with socket.socket(server.family) as client:
                client.connect(server.getsockname())
            server.accept()[0].close()
            program = f"""
                import socket
                client = socket.socket({int(server.family)})
                client.settimeout(2)
                try:
                    client.connect({server.getsockname()!r})
                    reached = True
                except OSError:
                    reached = False
            """
            assert holds(program, "not reached")
            server.setblocking(False)
            with pytest.raises(BlockingIOError):
                server.accept()


def test_there_are_no_privileges_to_be_had():
    program = """
        import ctypes, os
        libc = ctypes.CDLL(None)
        def refused(name, *arguments):
            return libc[name](*arguments) == -1
    """
    assert holds(
        program,
        "os.getuid() != 0 and os.getpid() == 1",
        # In a user namespace of its own it could mount, and go beyond its limits.
        "refused('unshare', 1 << 28) and refused('unshare', 1 << 17)",
        "refused('mount', b'tmpfs', b'/tmp', b'tmpfs', 0, b'')",
        "refused('chroot', b'/tmp') and refused('setuid', 0) and refused('sethostname', b'a', 1)",
    )


def test_several_at_once():
    programs = [SQUARE, CUBE] * 6
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda program: passes_tests(program, TESTS, seconds=30), programs))
    assert found == [True, False] * 6


def test_without_isolation_nothing_is_run(tmp_path, monkeypatch):
    """The real launcher, but its new root cannot be mounted: one line that says what to mend."""
    source = Path(sandbox_module.__file__).read_text()
    broken = tmp_path / "launcher.py"
    broken.write_text(source.replace('ROOT = "/proc"', 'ROOT = "/no/such/folder"'))
    assert broken.read_text() != source
    monkeypatch.setattr(sandbox_module, "__file__", str(broken))
    program = f"open({str(tmp_path / 'ran')!r}, 'w').close()"
    for attempt in (check_sandbox, lambda: holds(program)):
        with pytest.raises(UserError, match="mount: No such file.*run as root, or let") as caught:
            attempt()
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_a_sandbox_that_fails_right_programs_is_none(monkeypatch):
    monkeypatch.setattr(sandbox_module, "passes_tests", lambda *_, **__: False)
    with pytest.raises(UserError, match="a right program fails"):
        check_sandbox()


def test_a_python_that_does_not_start_is_told(monkeypatch):
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(UserError, match="no reason given"):
        check_sandbox()
