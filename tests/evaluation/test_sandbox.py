"""Hostile programs. Each would end by itself: what is measured is that it does not come to that."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from textwrap import dedent

import pytest
from helpers import ROOT

from configs.command_line import UserError
from evaluation import questions as questions_module
from evaluation import sandbox as sandbox_module
from evaluation.questions import Questions, judge_all, judge_program
from evaluation.sandbox import DISK_MIB, PROCESSES, SandboxFault, check_sandbox, passes_tests

SQUARE = "def f(x):\n    return x * x\n"
CUBE = "def f(x):\n    return x * x * x\n"
TESTS = ["assert f(2) == 4", "assert f(-3) == 9"]
NOBODY = 65534


pytestmark = pytest.mark.usefixtures("sandbox")


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


def comm(process: Path) -> str:
    try:
        return (process / "comm").read_text().strip()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def alive(name: str) -> list[Path]:
    """Processes of this machine that have the name."""
    return [process for process in Path("/proc").glob("[0-9]*") if comm(process) == name]


def wait_until(condition, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


# Names the program, to be found from outside; what is told to sleep ends by itself after 15 s.
MARK = f"box{uuid.uuid4().hex[:10]}"
LIBC = f"import ctypes, os, time\nlibc = ctypes.CDLL(None)\nlibc.prctl(15, b'{MARK}', 0, 0, 0)\n"
SLEEP = "\ntime.sleep(15)\n"
# Puts off its death signal and would live on by itself for a while.
DAEMON = LIBC + "libc.prctl(1, 0, 0, 0, 0)\n"
SHARED_MEMORY = """
libc.shmat.restype = ctypes.c_void_p
libc.shmget.argtypes = [ctypes.c_int, ctypes.c_size_t, ctypes.c_int]
libc.shmdt.argtypes = [ctypes.c_void_p]
got = 0
for _ in range(6):
    memory = libc.shmget(0, 100 << 20, 0o1600)
    if memory < 0:
        break
    where = libc.shmat(memory, None, 0)
    ctypes.memset(where, 1, 100 << 20)
    libc.shmdt(where)
    got += 100
"""
MEMORY_FILES = """
got, files = 0, []
try:
    for i in range(40):
        files.append(os.memfd_create(str(i)))
        got += os.write(files[-1], bytes(16 << 20)) >> 20
except OSError:
    pass
"""
THREAD = """
import threading
def f(x):
    found = []
    thread = threading.Thread(target=lambda: found.append(x * x))
    thread.start()
    thread.join()
    return found[0]
"""
POOL = """
from concurrent.futures import ThreadPoolExecutor
def f(x):
    with ThreadPoolExecutor(20) as pool:
        return sum(pool.map(lambda _: x, range(abs(x)))) * (x > 0 or -1)
"""
# Each is its supervisor's to reap, else there are soon no more processes to be had.
ORPHANS = """
for _ in range(60):
    if not os.fork():
        try:
            os.fork()
        finally:
            os._exit(sys.exc_info()[0] is not None)
    assert os.wait()[1] == 0
"""
SUPERVISOR = """
assert libc.ptrace(16, 1, 0, 0) == -1
for n in (1, 2, 9, 15, 19):
    os.kill(1, n)
"""
RIGHT = {
    "plain": SQUARE,
    "annotations": "from __future__ import annotations\n" + SQUARE,
    "main": SQUARE + "if __name__ == '__main__':\n    raise SystemExit(1)\n",
    "dataclass": "import dataclasses\n@dataclasses.dataclass\nclass A:\n    x: 'int'\n"
    "def f(x):\n    return A(x).x ** 2\n",
    "thread": THREAD,
    "thread that stays": LIBC + SQUARE + "import threading\n"
    "threading.Thread(target=time.sleep, args=(15,)).start()",
    "pool": POOL,
    "command": SQUARE + "import subprocess\nsubprocess.run(['/usr/bin/true'], check=True)",
    "orphans": LIBC + "import sys" + ORPHANS + SQUARE,
    "own session": LIBC + SQUARE + "assert os.getsid(0) == os.getpid() == os.getpgrp() > 1",
    "daemon": DAEMON + SQUARE + "os.fork() or time.sleep(15)",
    "signals to process 1": DAEMON + SQUARE + SUPERVISOR,
    "kill all others": DAEMON + SQUARE + "os.fork() or time.sleep(15)\nos.kill(-1, 9)",
    "stop all others": DAEMON + SQUARE + "os.fork() or time.sleep(15)\nos.kill(-1, 19)",
}
WRONG = {
    "empty": "",
    "cube": CUBE,
    "constant": "def f(x):\n    return 4\n",
    "syntax": "def f(x)\n    return x * x\n",
    "raises": SQUARE + "f(None)\n",
    "zero byte": SQUARE + "\0",
    "surrogate": SQUARE + "# \ud800",
    "recursion": "f = lambda x: f(x)",
    "interrupt": "raise KeyboardInterrupt\n" + SQUARE,
    "crash": SQUARE + "import ctypes\nctypes.string_at(0)",
    "abort": SQUARE + "import os\nos.abort()",
    "numpy": SQUARE + "import numpy",
    "memory": SQUARE + "bytearray(1 << 30)",
    "kill group": LIBC + SQUARE + "os.kill(0, 9)" + SLEEP,
    "kill group, deaf": DAEMON + SQUARE + "os.kill(0, 9)" + SLEEP,
    "kill group by child": DAEMON + SQUARE + "os.fork() or os.kill(0, 9)" + SLEEP,
    "stop group": LIBC + SQUARE + "os.kill(0, 19)" + SLEEP,
    "stop group, deaf": DAEMON + SQUARE + "os.kill(0, 19)" + SLEEP,
    "kill all by child": DAEMON + SQUARE + "os.fork() or os.kill(-1, 9)" + SLEEP,
    "limit of process 1": DAEMON
    + SQUARE
    + "import resource\nresource.prlimit(1, resource.RLIMIT_CPU, (0, 0))"
    + SLEEP,
    "shared memory": LIBC + SQUARE + SHARED_MEMORY + "assert got",
    "memory files": LIBC + SQUARE + MEMORY_FILES + "assert got",
    "memory files by number": LIBC + SQUARE + "intel = os.uname().machine == 'x86_64'\n"
    "assert libc.syscall(319 if intel else 279, b'a', 0) >= 0",
}
PROGRAMS = RIGHT | WRONG
ASK = """
import json, resource, sys
from concurrent.futures import ThreadPoolExecutor
from sandbox import passes_tests
def verdict(case):
    try:
        return passes_tests(*case, seconds=2)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
if len(sys.argv) > 1:
    resource.setrlimit(resource.RLIMIT_NPROC, (int(sys.argv[1]),) * 2)
cases = json.load(sys.stdin)
if len(cases) == 1:
    print(json.dumps([verdict(cases[0])]))
else:
    with ThreadPoolExecutor(4) as pool:
        print(json.dumps(list(pool.map(verdict, cases))))
"""


@contextlib.contextmanager
def processes(number: int, user: int | None):
    """So many more of the user."""
    started = [subprocess.Popen(["sleep", "60"], user=user) for _ in range(number)]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def asked(programs: list[str], user: int | None, *limit: str) -> list:
    """What a caller of its own, of this user, is told of each; where it is told nothing, why."""
    with tempfile.TemporaryDirectory() as folder:
        # Where others can read it, which the repository need not be.
        os.chmod(folder, 0o755)
        shutil.copy(sandbox_module.__file__, folder)
        groups = {} if user is None else {"user": user, "group": user, "extra_groups": []}
        python = sys.executable if user is None else shutil.which("python3", path="/usr/bin:/bin")
        done = subprocess.run(
            [python or pytest.skip("no python3 for others"), "-c", ASK, *limit],
            input=json.dumps([[program, TESTS] for program in programs]),
            capture_output=True,
            text=True,
            cwd=folder,
            **groups,
        )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def nobody():
    """Another user than these tests', who may make namespaces."""
    if os.geteuid():
        pytest.skip("only root can become another user")
    (told,) = asked([SQUARE], NOBODY)
    if any(reason in str(told) for reason in ("not permitted", "denied", "No space")):
        pytest.skip(f"users cannot make namespaces here: {told}")
    return NOBODY


@pytest.fixture(scope="module", params=["as it is", "nobody"])
def user(request):
    return request.getfixturevalue("nobody") if request.param == "nobody" else None


@pytest.fixture(scope="module")
def verdicts(user):
    """Of all `PROGRAMS`, beside 40 processes of nobody; and the processes left."""
    with processes(40, None if os.geteuid() else NOBODY):
        found = dict(zip(PROGRAMS, asked(list(PROGRAMS.values()), user), strict=True))
    return {**found, "left": alive(MARK)}


@pytest.mark.parametrize("what", PROGRAMS)
def test_verdicts_are_right_whoever_asks(verdicts, what):
    assert verdicts[what] is (what in RIGHT)


def test_nothing_is_left_of_any(verdicts):
    assert verdicts["left"] == []


def test_a_machine_short_of_processes_is_a_fault_and_no_failure(nobody):
    """The user's own limit leaves two or three more, and a program is promised `PROCESSES`."""
    with processes(40, nobody):
        (verdict,) = asked([SQUARE], nobody, "45")
    assert verdict == f"SandboxFault: {PROCESSES} processes at once are not to be had"


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


def test_a_program_that_does_not_end_is_stopped():
    start = time.monotonic()
    head = "import os, signal, time\nfor n in (2, 15, 24):\n    signal.signal(n, signal.SIG_IGN)\n"
    bodies = [
        "pass",
        "time.sleep(0.1)",
        "try:\n        raise SystemExit\n    except BaseException:\n        pass",
        # What floods the private pipe has to wait, since it is not read.
        "for n in range(3, 64):\n        try:\n            os.write(n, bytes(1 << 20))\n"
        "        except OSError:\n            pass",
    ]
    loops = [f"{head}while time.monotonic() < {start + 20}:\n    {body}\n" for body in bodies]
    with ThreadPoolExecutor() as pool:
        passed = pool.map(lambda loop: passes_tests(loop + SQUARE, TESTS, seconds=1), loops)
        assert list(passed) == [False] * 4
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
            seen = max(seen, len(alive(name)))
            time.sleep(0.05)
    assert seen == 5 and not stopped.result() and alive(name) == []
    assert holds(program) and alive(name) == []


DEAF = "ctypes.CDLL(None).prctl(1, 0, 0, 0, 0)\n"


@pytest.mark.parametrize("program", ["", DEAF, DEAF + "import os\nos.fork() or os.setsid()\n"])
@pytest.mark.parametrize("victim", ["caller", "launcher"])
def test_a_killed_caller_takes_the_program_along(name, victim, program):
    """One that has put off its death signal too."""
    code = (
        "import sys\nfrom evaluation.sandbox import passes_tests\n"
        "passes_tests(sys.argv[1], ['0'], seconds=30)"
    )
    program = named(name, program + "import time\ntime.sleep(15)")
    caller = subprocess.Popen(
        [sys.executable, "-c", code, program], cwd=ROOT, stderr=subprocess.PIPE
    )
    try:
        assert wait_until(lambda: alive(name), 15)
        # Were memory to run out now, the kernel would end this and not the caller.
        assert (alive(name)[0] / "oom_score_adj").read_text() == "1000\n"
        (launcher,) = children(caller.pid)
        os.kill(launcher if victim == "launcher" else caller.pid, signal.SIGKILL)
        told = caller.communicate()[1]
        assert wait_until(lambda: not alive(name), 5)
        assert (b"SandboxFault: no reason given" in told) == (victim == "launcher")
    finally:
        caller.kill()
        caller.wait()


def children(parent: int) -> list[int]:
    return list(map(int, Path(f"/proc/{parent}/task/{parent}/children").read_text().split()))


def launch(launcher: Path, program: str, caller: int) -> subprocess.CompletedProcess:
    request = {"texts": [program, "0"], "seconds": 9, "memory": 512 << 20, "caller": caller}
    command = [sys.executable, "-I", "-S", "-B", str(launcher)]
    return subprocess.run(command, input=json.dumps(request).encode(), capture_output=True)


def test_nothing_runs_for_a_caller_or_launcher_that_died_early(tmp_path, name):
    """Before the kernel was asked to tell of its death."""
    program = named(name, "import time\ntime.sleep(6)")
    told = launch(Path(sandbox_module.__file__), program, caller=os.getpid() + 1)
    assert (told.stdout, told.stderr) == (b"", b"the caller is gone\n")
    late = Path(sandbox_module.__file__).read_text()
    for before, inserted in {
        "        _supervise(": "        import time\n        time.sleep(0.3)\n",
        "    begun = os.read": "    os.kill(os.getpid(), signal.SIGKILL)\n",
    }.items():
        assert late.count(before) == 1
        late = late.replace(before, inserted + before)
    broken = tmp_path / "launcher.py"
    broken.write_text(late)
    start = time.monotonic()
    assert launch(broken, program, os.getpid()).returncode == -signal.SIGKILL
    # The supervisor holds the standard streams and had them read until now.
    assert time.monotonic() - start < 4 and not alive(name)


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
        "os.getuid() != 0 and os.getpid() != 1",
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
    with pytest.raises(UserError, match="mount: No such file.*run as root, or let") as caught:
        check_sandbox()
    assert "\n" not in str(caught.value)
    with pytest.raises(SandboxFault, match=r"^[^\n]*mount: No such file[^\n]*$"):
        holds(program)
    assert not (tmp_path / "ran").exists()


def test_a_sandbox_that_fails_right_programs_is_none(monkeypatch):
    monkeypatch.setattr(sandbox_module, "passes_tests", lambda *_, **__: False)
    with pytest.raises(UserError, match="a right program fails"):
        check_sandbox()


def test_a_python_that_does_not_start_is_told(monkeypatch):
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(UserError, match="no reason given"):
        check_sandbox()


def test_a_launcher_that_hangs_is_a_fault(tmp_path, monkeypatch):
    slow = tmp_path / "launcher.py"
    slow.write_text("import time\ntime.sleep(20)")
    monkeypatch.setattr(sandbox_module, "__file__", str(slow))
    with pytest.raises(SandboxFault, match="hangs"):
        holds("", seconds=-59)


def test_answers_that_cannot_be_judged_are_told_and_in_no_score(monkeypatch, capsys):
    def judged(program, *_):
        if program == "lost":
            raise SandboxFault("no process to be had")
        return program == "right"

    monkeypatch.setattr(questions_module, "passes_tests", judged)
    asked = Questions("mbpp", "T3_code", [{"tests": ["0"], "imports": []}] * 3, judge_program)
    with pytest.warns(UserWarning, match="could not be judged: no process to be had"):
        of_replies, scores = judge_all(asked, ["right", "lost", "wrong"])
    assert of_replies == [{"pass@1": 1.0}, {}, {"pass@1": 0.0}]
    assert (scores["pass@1"]["score"], scores["pass@1"]["n"]) == (50, 2)
    assert "mbpp: 1 of 3 answers could not be judged" in capsys.readouterr().err
    with pytest.warns(UserWarning):
        assert judge_all(asked, ["lost"] * 3) == ([{}] * 3, {})
