"""Runs untrusted Python in bubblewrap. Runs in a worker of `rewards.processes`, which kills it with all it has started.

What the code finds: a read-only system without home, run and var; an empty /tmp of bounded size; no network; no
environment; its own process table. What it may do is bounded by rlimits and by a system call filter, for RLIMIT_NPROC
does not bind root: no new processes (threads yes), no sockets, no namespaces, no kernel keys.
"""

from __future__ import annotations

import json
import os
import platform
import secrets
import select
import shutil
import struct
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

INSTALL_HINT = (
    "Install bubblewrap (apt-get install bubblewrap, dnf install bubblewrap) on a Linux machine that allows user "
    "namespaces; in a container that may need --security-opt seccomp=unconfined"
)

Ending: TypeAlias = Literal["finished", "exited", "timeout", "output", "trouble"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxLimits:
    """What one run may use."""

    timeout_s: float
    """Wall time; the CPU time of all its threads is held to twice this."""
    memory_bytes: int
    """Address space, threads' stacks included."""
    disk_bytes: int
    """Size of /tmp, and of any file in it."""
    output_bytes: int
    """Standard output and error, each; a run that writes more is ended."""
    site_packages: bool
    """Whether the packages installed beside this interpreter can be imported."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxRun:
    """How a run ended."""

    ending: Ending
    """"finished": to the last line; "exited": earlier, by an exception, an exit or a signal; "output": it wrote more
    than allowed; "trouble": the sandbox itself failed, which says nothing about the code."""
    exit_code: int | None
    """Of the code; None where it was killed at a limit."""
    stdout: str
    """What the code wrote."""
    message: str
    """The last line of standard error, such as the exception."""


# Reads its order from a pipe that it closes, so that the code finds neither the tests nor the password by which the
# parent knows that the last line was reached: os._exit(0) is no success.
_HARNESS = r"""
def run():
    import json, os, resource, sys
    with os.fdopen(int(sys.argv[1]), "rb") as pipe:
        order = json.loads(pipe.read())
    for name, value in order["rlimits"].items():
        hard = resource.getrlimit(getattr(resource, name))[1]
        limit = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(getattr(resource, name), (limit, limit))
    sys.path[:] = order["path"]
    sys.argv[:] = ["program.py"]
    os.write(1, order["password"].encode())
    password, tests = order.pop("password"), order.pop("tests")
    scope = {"__name__": "__main__", "__builtins__": __builtins__}
    exec(compile(order.pop("code"), "program.py", "exec"), scope)
    for test in tests:
        exec(compile(test, "test.py", "exec"), scope)
    sys.stdout.flush()
    os.write(1, password.encode())
run()
"""


def run_code(code: str, tests: list[str], stdin: str, limits: SandboxLimits) -> SandboxRun:
    """Run code, then tests in the same scope, in a fresh sandbox; blocks until that is over."""
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        return SandboxRun(ending="trouble", exit_code=None, stdout="", message=f"bwrap is not on PATH. {INSTALL_HINT}")
    password = secrets.token_hex(16)
    order = {
        "code": code,
        "tests": tests,
        "password": password,
        "rlimits": _rlimits(limits),
        "path": _import_path(site_packages=limits.site_packages),
    }
    order_fd, stdin_fd = _memory_file(json.dumps(order).encode()), _memory_file(stdin.encode(errors="replace"))
    filter_fd = _memory_file(system_call_filter(platform.machine()))
    try:
        process = subprocess.Popen(
            [bwrap, *_confinement(limits, filter_fd), _interpreter(), "-I", "-S", "-c", _HARNESS, str(order_fd)],
            stdin=stdin_fd,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=(order_fd, filter_fd),
            env={},
        )
    except OSError as exc:
        return SandboxRun(ending="trouble", exit_code=None, stdout="", message=f"bwrap cannot be started: {exc}")
    finally:
        for fd in (order_fd, stdin_fd, filter_fd):
            os.close(fd)
    with process:
        try:
            stdout, stderr, stopped = _read_until_end(process, limits)
        finally:
            process.kill()
    return _ended(stdout, stderr, stopped, process.returncode, password)


def why_unavailable() -> str:
    """The reason that code cannot be run here, with what to do about it; empty where it can be."""
    if platform.system() != "Linux" or platform.machine() not in _MACHINES:
        return f"there is no sandbox for {platform.system()} on {platform.machine()}. {INSTALL_HINT}"
    if shutil.which("bwrap") is None:
        return f"bwrap is not on PATH. {INSTALL_HINT}"
    limits = SandboxLimits(
        timeout_s=30.0, memory_bytes=512 << 20, disk_bytes=1 << 20, output_bytes=1 << 16, site_packages=False
    )
    run = run_code("print(1)", [], "", limits)
    if run.ending != "finished":
        return f"bwrap does not work here ({run.ending}: {run.message or 'no message'}). {INSTALL_HINT}"
    return ""


def _read_until_end(process: subprocess.Popen[bytes], limits: SandboxLimits) -> tuple[bytes, bytes, Ending | None]:
    assert process.stdout is not None
    assert process.stderr is not None
    written = {process.stdout.fileno(): bytearray(), process.stderr.fileno(): bytearray()}
    streams = list(written.values())
    deadline = time.monotonic() + limits.timeout_s
    stopped: Ending | None = None
    open_fds = set(written)
    while open_fds and stopped is None:
        remaining = deadline - time.monotonic()
        ready, _, _ = select.select(list(open_fds), [], [], max(remaining, 0.0))
        if not ready:
            stopped = "timeout"
        for fd in ready:
            chunk = os.read(fd, 1 << 16)
            written[fd] += chunk
            if not chunk:
                open_fds.discard(fd)
            if len(written[fd]) > limits.output_bytes:
                stopped = "output"
    if stopped is None:
        try:
            process.wait(max(deadline - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            stopped = "timeout"
    return bytes(streams[0]), bytes(streams[1]), stopped


def _ended(stdout: bytes, stderr: bytes, stopped: Ending | None, exit_code: int, password: str) -> SandboxRun:
    lines = [line for line in stderr.decode(errors="replace").splitlines() if line.strip()]
    message = lines[-1].strip()[:300] if lines else ""
    mark = password.encode()
    if not stdout.startswith(mark):
        ending = "the sandbox did not start in time" if stopped else f"exit code {exit_code}"
        return SandboxRun(ending="trouble", exit_code=exit_code, stdout="", message=message or ending)
    text = stdout.removeprefix(mark)
    is_finished = stopped is None and exit_code == 0 and text.endswith(mark)
    return SandboxRun(
        ending=stopped or ("finished" if is_finished else "exited"),
        exit_code=None if stopped else exit_code,
        stdout=text.removesuffix(mark).decode(errors="replace"),
        message=message,
    )


def _rlimits(limits: SandboxLimits) -> dict[str, int]:
    return {
        "RLIMIT_AS": limits.memory_bytes,
        "RLIMIT_CPU": int(2 * limits.timeout_s) + 1,
        "RLIMIT_FSIZE": limits.disk_bytes,
        "RLIMIT_NOFILE": 64,
        "RLIMIT_CORE": 0,
    }


def _confinement(limits: SandboxLimits, filter_fd: int) -> list[str]:
    command = ["--unshare-user", "--unshare-all", "--uid", "65534", "--gid", "65534", "--cap-drop", "ALL"]
    command += ["--new-session", "--die-with-parent", "--clearenv", "--hostname", "sandbox"]
    command += ["--setenv", "PATH", "/usr/bin:/bin", "--setenv", "HOME", "/tmp", "--setenv", "LANG", "C.UTF-8"]
    for name in ("OMP", "OPENBLAS", "MKL"):  # each thread of theirs reserves address space
        command += ["--setenv", f"{name}_NUM_THREADS", "1"]
    command += ["--size", str(limits.disk_bytes), "--tmpfs", "/tmp"]  # first: an environment may lie in /tmp
    for folder in _system_folders(site_packages=limits.site_packages):
        target = os.readlink(folder) if os.path.islink(folder) else None
        command += ["--symlink", target, folder] if target else ["--ro-bind", folder, folder]
    command += ["--proc", "/proc", "--dev", "/dev", "--remount-ro", "/dev"]
    command += ["--remount-ro", "/", "--chdir", "/tmp"]
    return [*command, "--seccomp", str(filter_fd), "--"]


def _interpreter() -> str:
    # a virtual environment's python is a link to the one that can be started without the environment
    return os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)


def _system_folders(*, site_packages: bool) -> list[str]:
    folders = ["/usr", "/bin", "/lib", "/lib64", "/etc/ld.so.cache", sys.base_prefix]
    folders += [sys.prefix] if site_packages else []
    present = [folder for folder in folders if os.path.lexists(folder)]
    return [folder for folder in dict.fromkeys(present) if folder == "/usr" or not folder.startswith("/usr/")]


def _import_path(*, site_packages: bool) -> list[str]:
    inside = ("site-packages", "dist-packages")
    standard = [path for path in sys.path if path.startswith(sys.base_prefix) and not path.endswith(inside)]
    installed = [path for path in sys.path if path.endswith(inside)] if site_packages else []
    return [*standard, *installed]


def _memory_file(content: bytes) -> int:
    fd = os.memfd_create("order")
    with open(fd, "wb", closefd=False) as file:
        file.write(content)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


# Linux audit architecture and system call numbers (asm/unistd_64.h, asm-generic/unistd.h).
# A process may not fork (clone without CLONE_THREAD), open a socket, trace, reach the kernel's keys or go around the
# filter by io_uring; the mount and namespace calls are denied besides.
_MACHINES: dict[str, dict[str, Any]] = {
    "x86_64": {
        "arch": 0xC000003E,
        "clone": 56,
        "denied": [41, 57, 58, 101, 155, 165, 166, 248, 249, 250, 272, 298, 308, 321, 323, 425, 426, 427],
    },
    "aarch64": {
        "arch": 0xC00000B7,
        "clone": 220,
        "denied": [198, 117, 41, 40, 39, 217, 218, 219, 97, 241, 268, 280, 282, 425, 426, 427],
    },
}
_CLONE3 = 435
_CLONE_THREAD = 0x00010000
_EPERM, _ENOSYS = 1, 38
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000


def system_call_filter(machine: str) -> bytes:
    """The filter as a classic BPF program (linux/filter.h); denied calls fail with EPERM.

    Raises:
        KeyError: there is no table for this machine.
    """
    table = _MACHINES[machine]
    load_word, jump_equal, jump_at_least, jump_bits, answer = 0x20, 0x15, 0x35, 0x45, 0x06
    number_at, arch_at, flags_at = 0, 4, 16  # struct seccomp_data; the low half of the first argument
    deny = (answer, 0, 0, _ERRNO | _EPERM)
    program = [
        (load_word, 0, 0, arch_at),
        (jump_equal, 1, 0, table["arch"]),
        deny,
        (load_word, 0, 0, number_at),
        (jump_at_least, 0, 1, 0x40000000),  # the x32 calls, by which the numbers below could be gone around
        deny,
        # its flags are in memory, out of a filter's sight; told that it is unknown, the C library takes clone
        (jump_equal, 0, 1, _CLONE3),
        (answer, 0, 0, _ERRNO | _ENOSYS),
    ]
    for number in table["denied"]:
        program += [(jump_equal, 0, 1, number), deny]
    program += [
        (jump_equal, 0, 3, table["clone"]),
        (load_word, 0, 0, flags_at),
        (jump_bits, 1, 0, _CLONE_THREAD),
        deny,
        (answer, 0, 0, _ALLOW),
    ]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)
