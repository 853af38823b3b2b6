"""Runs model-written Python away from everything else and says whether it passes its tests.

The program is process 1 of PID, mount, network and IPC namespaces of its own: killing it kills all
that it started, and everything mounted goes with it. It sees the interpreter's folder and /usr,
read only and without what is mounted inside them, and an empty /tmp in memory; nothing else of the
disk, no /proc, no /dev, no network. It is nobody (started by root) or the user without any
privilege (in a user namespace), and since it is in a chroot it can make no user namespace. Time,
memory, processes, open files and file sizes are limited, the environment is empty, and what it
prints goes nowhere. It can import the standard library only.

This guards against programs that are wrong, clumsy or nosy, not against everything. Memory is
limited per process, so a program can take `PROCESSES` times that. It shares the kernel, whose calls
are not filtered. It shares the interpreter with its tests: one that searches the frames of its
callers, or returns objects that claim to equal everything, can pass without being right.
"""

import ctypes
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
NOBODY = 65534

# What imports need beside the interpreter's own folder; /lib and /lib64 are mostly links to /usr.
SYSTEM = ("/usr", "/lib", "/lib64")
# The new root covers a folder that is always there and then no longer needed.
ROOT = "/proc"

# From <linux/sched.h>, <linux/mount.h>, <linux/prctl.h> and <linux/capability.h>.
NEW_MOUNTS, NEW_IPC, NEW_USER = 0x20000, 0x8000000, 0x10000000
NEW_PIDS, NEW_NETWORK = 0x20000000, 0x40000000
READ_ONLY, NO_SUID, NO_DEVICES, REMOUNT, BIND, RECURSIVE, PRIVATE = 1, 2, 4, 32, 4096, 16384, 262144
PARENT_DEATH_SIGNAL, NO_NEW_PRIVILEGES, CAPABILITY_VERSION = 1, 38, 0x20080522


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
    SyntaxError where a test is not Python, ValueError without tests, and `UserError` where this
    machine offers no isolation: nothing is ever run without it.
    """
    if not tests:
        raise ValueError("there are no tests to pass")
    texts = [program, *imports, *tests]
    for text in texts[1:]:
        compile(text, "<test>", "exec")
    request = {"texts": texts, "seconds": seconds, "memory": memory_mib << 20}
    done = subprocess.run(
        # Without site-packages, which the program is not to have.
        [sys.executable, "-I", "-S", "-B", __file__],
        input=json.dumps(request).encode(),
        capture_output=True,
        # The launcher keeps the time; this is for one that hangs.
        timeout=seconds + 60,
        cwd="/",
        env={},
        start_new_session=True,
    )
    if done.stdout not in (b"pass", b"fail"):
        complaint = done.stderr.decode(errors="replace").strip() or "no reason given"
        raise _no_sandbox(complaint.splitlines()[-1])
    return done.stdout == b"pass"


def check_sandbox() -> None:
    """Raises `UserError` where programs cannot be isolated; takes a fraction of a second."""
    program = "import collections, decimal, hashlib, heapq, itertools, math, re"
    if not passes_tests(program, ["assert math.gcd(12, 18) == 6"], seconds=60):
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


def _isolate() -> None:
    """Takes privileges, files and network from this process; its children get PIDs of their own.

    The process must have one thread. Raises OSError where the machine does not allow it.
    """
    user, group = os.geteuid(), os.getegid()
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
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
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


def _launch() -> None:
    """Reads the request from stdin, runs it isolated, and prints "pass" or "fail".

    Prints neither where the program could not be started; stderr says why.
    """
    request = json.load(sys.stdin)
    nowhere = os.open(os.devnull, os.O_RDWR)
    reader, writer = os.pipe()
    token = os.urandom(32)
    _isolate()
    # A killed caller takes this process along, and this process the program. Only now: a change
    # of user or privileges would clear it.
    _call("prctl", PARENT_DEATH_SIGNAL, signal.SIGKILL)
    # A blocked signal waits to be asked for: none is missed between the fork and the wait.
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
    program = os.fork()
    if not program:
        _call("prctl", PARENT_DEATH_SIGNAL, signal.SIGKILL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
        _limit(request["seconds"], request["memory"])
        os.close(reader)
        os.write(writer, b"begun")
        for standard in range(3):
            os.dup2(nowhere, standard)
        _run(request["texts"], writer, token)
    signal.sigtimedwait([signal.SIGCHLD], request["seconds"])
    os.kill(program, signal.SIGKILL)
    # Returns when the last process of the namespace is gone.
    os.waitpid(program, 0)
    os.close(writer)
    # One bounded read: whatever else the program wrote there makes it a failure.
    said = os.read(reader, 4096)
    if said:
        print("pass" if said == b"begun" + token else "fail", end="")


if __name__ == "__main__":
    _launch()
