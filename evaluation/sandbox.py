"""Runs model-written Python away from everything else and says whether it passes its tests.

Three processes: the launcher outside; the supervisor, process 1 of PID, mount, network and IPC
namespaces of their own; and the program, its child, in a session of its own. The kernel lets the
program send neither of the others a signal that counts, and ends all of the namespace when the
supervisor ends: with the program, when the time is up, or when the launcher or the caller dies.
Everything mounted goes too.

The program sees the interpreter's folder and /usr, read only and without what is mounted inside
them, and an empty /tmp in memory; nothing else of the disk, no /proc, no /dev, no network. It is a
user of its own (started by root) or the user without any privilege (in a user namespace), and since
it is in a chroot it can make no user namespace. Time, memory, processes, open files and file sizes
are limited, the environment is empty, and what it prints goes nowhere. It can import the standard
library only.

This guards against programs that are wrong, clumsy or nosy, not against everything. Memory is
limited per process, so a program can take `PROCESSES` times that: no cgroup adds it up (version 2
has none to give beneath a group that holds processes, as that of a session does). What the kernel
keeps for it (the buffers of pipes and sockets, file locks) is not counted. It shares the kernel,
few of whose calls are refused. It shares the interpreter with its tests: one that searches the
frames of its callers, or returns objects that claim to equal everything, can pass without being
right.

What the machine does not give is found before the program begins and is no verdict. What it takes
away later is the program's failure: memory, where it runs out and the kernel ends the program
first, and time, where others take it.
"""

import _thread
import contextlib
import ctypes
import errno
import json
import math
import os
import resource
import signal
import struct
import subprocess
import sys
import types
from pathlib import Path

PROCESSES = 32
DISK_MIB = 16
NO_GROUP = 65534

# What imports need beside the interpreter's own folder; /lib and /lib64 are mostly links to /usr.
SYSTEM = ("/usr", "/lib", "/lib64")
# The new root covers a folder that is always there and then no longer needed.
ROOT = "/proc"

# From <linux/sched.h>, <linux/mount.h>, <linux/prctl.h> and <linux/capability.h>.
NEW_MOUNTS, NEW_IPC, NEW_USER = 0x20000, 0x8000000, 0x10000000
NEW_PIDS, NEW_NETWORK = 0x20000000, 0x40000000
READ_ONLY, NO_SUID, NO_DEVICES, REMOUNT, BIND, RECURSIVE, PRIVATE = 1, 2, 4, 32, 4096, 16384, 262144
PARENT_DEATH_SIGNAL, DUMPABLE, NO_NEW_PRIVILEGES, CAPABILITY_VERSION = 1, 4, 38, 0x20080522

# From <linux/filter.h>, <linux/seccomp.h> and <linux/audit.h>.
SET_SECCOMP, FILTER = 22, 2
LOAD, IF_EQUAL, IF_AT_LEAST, RETURN = 0x20, 0x15, 0x35, 0x06
ALLOW, REFUSE = 0x7FFF0000, 0x50000 | errno.ENOSYS
# By machine, its AUDIT_ARCH and the numbers of shmget, semget, msgget, memfd_create, memfd_secret,
# io_uring_setup and bpf: calls that take memory which counts towards no limit of a process.
REFUSED = {
    "x86_64": (0xC000003E, (29, 64, 68, 319, 447, 425, 321)),
    "aarch64": (0xC00000B7, (194, 190, 186, 279, 447, 425, 280)),
}


class SandboxFault(Exception):
    """The sandbox failed, not the program in it, of which nothing is known. One line."""


def passes_tests(
    program: str,
    tests: list[str],
    imports: list[str] = (),
    *,
    seconds: float = 5,
    memory_mib: int = 512,
) -> bool:
    """Whether the program and then each of the tests (asserts) run without raising.

    `imports` run between the two. `seconds` limits the time that passes and the CPU time of each
    process, `memory_mib` the address space of each. No process, file or mount is left. Raises
    SyntaxError where a test is not Python, ValueError without tests, and `SandboxFault` where the
    program could not be isolated or have what it is promised: nothing is ever run without that.
    """
    if not tests:
        raise ValueError("there are no tests to pass")
    texts = [program, *imports, *tests]
    for text in texts[1:]:
        compile(text, "<test>", "exec")
    request = {"texts": texts, "seconds": seconds, "memory": memory_mib << 20}
    try:
        done = subprocess.run(
            # Without site-packages, which the program is not to have.
            [sys.executable, "-I", "-S", "-B", __file__],
            input=json.dumps({**request, "caller": os.getpid()}).encode(),
            capture_output=True,
            # The launcher keeps the time; this is for one that hangs.
            timeout=seconds + 60,
            cwd="/",
            env={},
            start_new_session=True,
        )
    except subprocess.TimeoutExpired:
        raise SandboxFault("the launcher hangs") from None
    except OSError as error:
        raise SandboxFault(f"the launcher does not start: {error}") from error
    if done.stdout not in (b"pass", b"fail"):
        complaint = done.stderr.decode(errors="replace").strip() or "no reason given"
        raise SandboxFault(complaint.splitlines()[-1])
    return done.stdout == b"pass"


def check_sandbox() -> None:
    """Raises `UserError` where programs cannot be isolated; takes a fraction of a second."""
    program = "import collections, decimal, hashlib, heapq, itertools, math, re"
    try:
        passed = passes_tests(program, ["assert math.gcd(12, 18) == 6"], seconds=60)
    except SandboxFault as fault:
        raise _no_sandbox(str(fault)) from fault
    if not passed:
        raise _no_sandbox("a right program fails; the interpreter may need libraries elsewhere")


def _no_sandbox(reason: str) -> Exception:
    # Imported here: the launcher runs this file, and torch would cost it seconds.
    from configs.command_line import UserError

    return UserError(
        f"model-written programs cannot be run in isolation on this machine ({reason}): run as "
        "root, or let users make namespaces (sysctl kernel.unprivileged_userns_clone=1 "
        "kernel.apparmor_restrict_unprivileged_userns=0); a container needs --cap-add SYS_ADMIN "
        "and --security-opt apparmor=unconfined"
    )


def _call(name: str, *arguments: int | str | bytes) -> None:
    """Calls a function of libc; raises OSError where it fails."""
    libc = ctypes.CDLL(None, use_errno=True)
    as_c = [ctypes.c_ulong(a) if isinstance(a, int) else os.fsencode(a) for a in arguments]
    if libc[name](*as_c) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{name}: {os.strerror(error)}")


def _lone_user() -> int:
    """A user whom no other process has: limits on processes count all of a user's.

    Out of the upper eighth of those that this process can become, below 2^31: 0x70000000 and up,
    which no distribution gives away, unless a container has fewer.
    """
    first, _, count = map(int, Path("/proc/self/uid_map").read_text().split()[-3:])
    end = min(first + count, 1 << 31)
    # Where root is the only one, setresuid will say that there is no other.
    return end - end // 8 + int.from_bytes(os.urandom(4), "little") % max(end // 8, 1)


def _isolate() -> None:
    """Takes privileges, files and network from this process; its children get PIDs of their own.

    The process must have one thread. Raises OSError where the machine does not allow it.
    """
    user, group = os.geteuid(), os.getegid()
    lone = None if user else _lone_user()
    # Where the machine runs out of memory the kernel shall end the program and nothing else.
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    spaces = NEW_MOUNTS | NEW_IPC | NEW_PIDS | NEW_NETWORK
    _call("unshare", spaces | NEW_USER if user else spaces)
    if user:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    os.umask(0o022)
    _call("mount", "none", "/", "", RECURSIVE | PRIVATE, "")
    size = f"mode=755,size={DISK_MIB}m,nr_inodes=4096"
    _call("mount", "tmpfs", ROOT, "tmpfs", NO_SUID | NO_DEVICES, size)
    for folder in dict.fromkeys((*SYSTEM, sys.base_prefix, sys.base_exec_prefix)):
        inside = ROOT + folder
        if folder in SYSTEM and os.path.islink(folder):
            os.symlink(os.readlink(folder), inside)
        elif os.path.isdir(folder):
            os.makedirs(inside, exist_ok=True)
            # What is mounted inside it stays out; where the kernel refuses a user that, it fails.
            _call("mount", folder, inside, "", BIND, "")
            # Flags of a bind mount are heeded only now.
            flags = BIND | REMOUNT | READ_ONLY | NO_SUID | NO_DEVICES
            _call("mount", "none", inside, "", flags, "")
    os.makedirs(f"{ROOT}/tmp", exist_ok=True)
    os.chmod(f"{ROOT}/tmp", 0o1777)
    os.chroot(ROOT)
    os.chdir("/tmp")
    if not user:
        os.setgroups([])
        os.setresgid(NO_GROUP, NO_GROUP, NO_GROUP)
        os.setresuid(lone, lone, lone)
    _call("capset", struct.pack("Ii", CAPABILITY_VERSION, 0), bytes(24))
    _call("prctl", NO_NEW_PRIVILEGES, 1, 0, 0, 0)


def _limit(seconds: float, memory: int) -> None:
    for kind, limit in {
        resource.RLIMIT_CPU: math.ceil(seconds),
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_NPROC: PROCESSES,
        resource.RLIMIT_FSIZE: DISK_MIB << 20,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
    }.items():
        hard = resource.getrlimit(kind)[1]
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(kind, (limit, limit))


def _refuse_calls() -> None:
    """Makes the calls `REFUSED` fail from now on, and all those of another machine's numbering."""
    machine = os.uname().machine
    if machine not in REFUSED:
        raise OSError(errno.ENOSYS, f"the kernel calls of {machine} are not known here")
    architecture, numbers = REFUSED[machine]
    # (operation, steps ahead where true, where false, operand); the last step refuses.
    last = len(numbers) + 5
    steps = [
        (LOAD, 0, 0, 4),
        (IF_EQUAL, 0, last - 2, architecture),
        (LOAD, 0, 0, 0),
        # The other numbering of x86_64, x32.
        (IF_AT_LEAST, last - 4, 0, 0x40000000),
        *((IF_EQUAL, last - at - 1, 0, number) for at, number in enumerate(numbers, 4)),
        (RETURN, 0, 0, ALLOW),
        (RETURN, 0, 0, REFUSE),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    _call("prctl", SET_SECCOMP, FILTER, struct.pack("HP", len(steps), ctypes.addressof(code)))


def _rehearse() -> None:
    """Raises OSError where this machine does not let the program have all its processes.

    Else it would fail for want of a thread, though right: where other limits are narrower, or where
    the user's other processes count (before Linux 5.14).
    """
    child = os.fork()
    if not child:
        try:
            # Threads count like processes and are had sooner. The launcher, the supervisor and
            # this process count too.
            _thread.stack_size(1 << 18)
            for _ in range(resource.getrlimit(resource.RLIMIT_NPROC)[0] - 3):
                _thread.start_new_thread(signal.pause, ())
            os._exit(0)
        finally:
            os._exit(1)
    if os.waitpid(child, 0)[1]:
        raise OSError(f"{PROCESSES} processes at once are not to be had")


def _run(texts: list[str], verdict: int, token: bytes) -> None:
    """Writes the token to the descriptor `verdict` after all texts ran; ends the process."""
    # Bound here, since the program may put others in their place.
    run, write, leave = exec, os.write, os._exit
    try:
        tests = [compile(text, "<test>", "exec") for text in texts[1:]]
        # A module of its own, where dataclasses and pickle look for it, and not `__main__`.
        module = sys.modules["program"] = types.ModuleType("program")
        run(compile(texts[0], "<program>", "exec"), module.__dict__)
        for test in tests:
            run(test, module.__dict__)
        write(verdict, token)
    finally:
        # Whatever was raised, SystemExit too; neither threads nor exit handlers are waited for.
        leave(0)


def _supervise(request: dict, verdict: int, nowhere: int, token: bytes) -> None:
    """Runs the program in a child, reaps what that leaves behind, and ends when it has ended.

    Says "begun" to the descriptor `verdict` just before; nothing where it does not come to that,
    and stderr says why.
    """
    try:
        _call("prctl", PARENT_DEATH_SIGNAL, signal.SIGKILL)
        _limit(request["seconds"], request["memory"])
        _rehearse()
        program = os.fork()
        if not program:
            # Else signals to its process group would be for its supervisor and the launcher too.
            os.setsid()
            signal.pthread_sigmask(signal.SIG_SETMASK, [])
            _refuse_calls()
            for standard in range(3):
                os.dup2(nowhere, standard)
            # Fails where the launcher died before its supervisor had asked for a death signal.
            os.write(verdict, b"begun")
            _run(request["texts"], verdict, token)
        while os.wait()[0] != program:
            pass
    except Exception as error:
        print(error, file=sys.stderr, flush=True)
    finally:
        os._exit(0)


def _launch() -> None:
    """Reads the request from stdin, runs it isolated, and prints "pass" or "fail".

    Prints neither where the program could not be started; stderr says why.
    """
    request = json.load(sys.stdin)
    nowhere = os.open(os.devnull, os.O_RDWR)
    reader, writer = os.pipe()
    token = os.urandom(32)
    _isolate()
    # A killed caller takes this process along, and this process the supervisor. Only now: a change
    # of user or privileges would clear it.
    _call("prctl", PARENT_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != request["caller"]:
        sys.exit("the caller is gone")
    # The program, of the same user, is not to reach into the memory of its supervisor.
    _call("prctl", DUMPABLE, 0)
    # Blocked for good: SIGCHLD waits to be asked for, and none disturbs the supervisor.
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    supervisor = os.fork()
    if not supervisor:
        os.close(reader)
        _supervise(request, writer, nowhere, token)
    os.close(writer)
    begun = os.read(reader, len(b"begun"))
    if begun:
        signal.sigtimedwait([signal.SIGCHLD], request["seconds"])
    os.kill(supervisor, signal.SIGKILL)
    # Returns when the last process of the namespace is gone.
    os.waitpid(supervisor, 0)
    if begun:
        # One bounded read: whatever else the program wrote there makes it a failure.
        print("pass" if os.read(reader, 4096) == token else "fail", end="")


if __name__ == "__main__":
    _launch()
