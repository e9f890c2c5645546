"""One process writes into a run directory. Knows processes and one file; knows nothing of runs.

The kernel's lock on the file decides, and is gone with its process however that ends. The file also says who holds it:
for the message, for file systems that know no locks, and for the case that a killed run left a child of its own behind,
which still holds the lock by the file that it inherited.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from grpo.errors import ConfigError

SETTLING_S = 0.5
"""Between a process's taking the lock and its name in the file lie microseconds; who takes over waits longer."""
_NO_LOCKS = {errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK}


@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """A process, so that no other is taken for it."""

    host: str
    pid: int
    started: str
    """Boot of the machine and clock tick of the process's start; "" where the system does not say."""

    @property
    def may_be_alive(self) -> bool:
        """Whether it runs, or cannot be known to have ended: it is another machine's."""
        if self.host != socket.gethostname():
            return True
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:  # it lives, and is another user's
            pass
        return not self.started or self.started == _start_of(self.pid)  # else the number is another process's by now


def this_process() -> Owner:
    """Who we are."""
    return Owner(host=socket.gethostname(), pid=os.getpid(), started=_start_of(os.getpid()))


def owner_of(folder: Path) -> Owner | None:
    """Who holds a run directory, or held it when it was killed; None where nobody does, or nobody can be named."""
    try:
        file = os.open(folder / ".lock", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return _owner_in(file)
    finally:
        os.close(file)


class RunLock:
    """Owns the lock of one folder: `take`, then `release`; the process's end releases it too."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._path = folder, folder / ".lock"
        self._file: int | None = None

    def take(self) -> None:
        """Keep others out.

        Raises:
            ConfigError: another process runs here, and the message says which; or the folder cannot be written to.
        """
        try:
            file = _opened(self._path)
            try:
                if not _try_to_lock(file):
                    last = _owner_in(file)
                    if last is None or last.may_be_alive:
                        raise self._in_use(last)
                    os.close(file)
                    file = self._take_over(last)
                _write_owner(file)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.close(file)
                raise
        except OSError as exc:
            raise ConfigError(
                f"output_dir {self._folder} cannot be written: {exc}. {len(_record())} bytes were to be written."
            ) from exc
        self._file = file

    def release(self) -> None:
        """Let others in; does nothing where nothing was taken. The file stays: removing it would race."""
        file, self._file = self._file, None
        if file is not None:
            # where the kernel keeps no locks, this is what lets others in at once; where the disk refuses it, they find
            # the record of a process that has ended
            with contextlib.suppress(OSError):
                os.ftruncate(file, 0)
            os.close(file)

    def _take_over(self, last: Owner) -> int:
        """A locked file in the place of the one that a dead run's child still holds."""
        gate = _opened(self._path.with_name(".lock.takeover"))
        try:
            fcntl.flock(gate, fcntl.LOCK_EX)  # one at a time
            time.sleep(SETTLING_S)
            file = _opened(self._path)
            now = _owner_in(file)
            os.close(file)
            if now != last:
                raise self._in_use(now)
            fresh = self._path.with_name(".lock.new")
            file = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _write_owner(file)
            os.replace(fresh, self._path)
            return file
        finally:
            os.close(gate)

    def _in_use(self, owner: Owner | None) -> ConfigError:
        who = f" (process {owner.pid} on {owner.host})" if owner else ""
        sure = (
            f" If that machine has ended it, remove {self._path}."
            if owner and owner.host != socket.gethostname()
            else ""
        )
        return ConfigError(
            f"another process is running in {self._folder}{who}. Wait for its end, or start a new run under another "
            f"output_dir.{sure}"
        )


def _opened(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)


def _try_to_lock(file: int) -> bool:
    """Whether the lock is ours. Where the kernel keeps none, what the file says decides."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as exc:
        if exc.errno not in _NO_LOCKS:
            raise
        last = _owner_in(file)
        return last is None or not last.may_be_alive
    return True


def _write_owner(file: int) -> None:
    os.ftruncate(file, 0)
    os.pwrite(file, _record(), 0)
    os.fsync(file)


def _record() -> bytes:
    return json.dumps(asdict(this_process())).encode()


def _owner_in(file: int) -> Owner | None:
    """Who the file says holds it; None where it says nothing readable."""
    try:
        return Owner(**json.loads(os.pread(file, 4096, 0)))
    except (ValueError, TypeError):
        return None


def _start_of(pid: int) -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]  # field 22, proc_pid_stat(5)
    except (OSError, IndexError):  # no Linux
        return ""
    return f"{boot}/{ticks}"
