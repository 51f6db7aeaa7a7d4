"""Who is at work in a machine's folder: locks of the system, which end with the process that holds them."""

import contextlib
import fcntl
import pathlib
from collections.abc import Iterator

from maco_lib.study.files import DataError


@contextlib.contextmanager
def held(path: pathlib.Path, refusal: str) -> Iterator[None]:
    """Hold the lock `path` to the end of the block; RuntimeError with `refusal` if another process holds it.

    Raises DataError, naming the path, where the file cannot be written or its file system has no locks.
    """
    try:
        stream = open(path, "a", encoding="utf-8")  # noqa: SIM115 - closed below, whatever the lock says
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror}") from None
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(refusal) from None
        except OSError as error:
            raise DataError(
                f"{path} cannot be locked ({error.strerror}): its file system has no flock; "
                "set MACO_ROOT to a folder on another one"
            ) from None
        yield


def is_held(path: pathlib.Path) -> bool:
    """Whether a process holds the lock `path`; needs no right to write."""
    if not path.exists():
        return False
    with open(path, encoding="utf-8") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False  # where nothing can be locked, nobody holds it
    return False
