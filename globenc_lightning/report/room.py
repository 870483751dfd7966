"""Whether there is room to write where a logger writes; asked, not tried, since a trial would take the room itself."""

from __future__ import annotations

import errno
import os
import shutil
from typing import Any

resource: Any
try:
    import resource
except ImportError:  # Windows knows no such limits.
    resource = None

RESERVE = 16 * 2**20
"""So many bytes have to stay free beside what we write: they are for the training's own log."""


def require_room(logger: Any, size: int) -> None:
    """See to it that so many bytes can be written beside a logger's files, and the training's own log after them.

    TensorBoard writes in the background: once a write has failed there, every later one raises, the training's own
    too. So nothing is begun that may not end well. A quota that the file system does not tell cannot be seen.

    Args:
        logger: A Lightning logger or anything like one; nothing is asked where it has no local folder, `log_dir`.
        size: In bytes.

    Raises:
        OSError: There is no room on the disk, or files may not grow so far (`ulimit -f`).
    """
    place = getattr(logger, "log_dir", None)
    folder = os.fspath(place) if isinstance(place, str | os.PathLike) else ""
    if os.path.isdir(folder):
        require_free(folder, size)


def require_free(folder: str | os.PathLike[str], size: int) -> None:
    """See to it that so many bytes can be written into a folder, and the training's own log after them.

    Args:
        folder: It has to be there.
        size: In bytes.

    Raises:
        OSError: There is no room on the disk, or files may not grow so far (`ulimit -f`).
    """
    needed = size + RESERVE
    disk = shutil.disk_usage(folder)
    # Some network file systems do not know their size.
    if disk.total and disk.free < needed:
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} but the last {RESERVE >> 20} MB, left to other logs")
    limit = _longest_file()
    if limit is not None:
        longest = max((one.stat().st_size for one in os.scandir(folder) if one.is_file()), default=0)
        if longest + needed > limit:
            raise OSError(errno.EFBIG, f"{os.strerror(errno.EFBIG)} within {RESERVE >> 20} MB, left to other logs")


def _longest_file() -> int | None:
    """How many bytes a file may have in this process; None for as many as there is room for."""
    if resource is None:
        return None
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    return None if limit == resource.RLIM_INFINITY else int(limit)
