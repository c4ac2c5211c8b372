"""The right to write into a folder, which one process at a time has, and which ends with the process."""

import contextlib
import os
import socket

from ..errors import UserError

NAME = 'run.lock'
FAR = 1 << 20  # the byte that Windows locks: what is locked cannot be read


class FolderLock:
    """A locked file in a folder: it says who holds it, is gone after `release`, and binds nobody once that is dead.

    Where the file system knows no locks, there is none.

    Raises:
        UserError: another process holds it.
    """

    def __init__(self, folder: str):
        self.path = os.path.join(folder, NAME)
        while True:
            self.file = open(self.path, 'a+', encoding='utf-8')
            if not self._lock():
                self.file.seek(0)
                holder = self.file.read().strip() or 'unknown'
                self.file.close()
                raise UserError(
                    f'another run ({holder}) writes to {folder}: wait for it or stop it, or name another --experiment'
                )
            if os.name != 'posix' or self._is_there():
                break
            self.file.close()  # its owner removed it between our opening and our locking
        self.file.truncate(0)
        self.file.write(f'process {os.getpid()} on {socket.gethostname()}\n')
        self.file.flush()

    def release(self) -> None:
        with contextlib.suppress(OSError):
            if os.name == 'posix':
                os.remove(self.path)
        self.file.close()

    def _is_there(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self.file.fileno()), os.stat(self.path))
        except FileNotFoundError:
            return False

    def _lock(self) -> bool:
        try:
            if os.name == 'nt':
                import msvcrt

                self.file.seek(FAR)
                msvcrt.locking(self.file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
            else:
                import fcntl

                fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a forked child does not inherit it
        except (BlockingIOError, PermissionError):
            return False
        except OSError:
            pass
        return True
