"""Who is at work in a machine's folder: locks of the system, which end with the process that holds them."""

import contextlib
import fcntl
import pathlib
from collections.abc import Callable, Iterator

from study.harness.files import DataError


@contextlib.contextmanager
def held(path: pathlib.Path, refusal: str) -> Iterator[Callable[[str], None]]:
    """Hold the lock `path` to the end of the block, which may `tell` what it does; see `holder`.

    Raises RuntimeError with `refusal` if another process holds it, DataError, naming the path, where the file cannot be
    written or its file system has no locks.
    """
    with contextlib.ExitStack() as stack:
        try:
            stream = stack.enter_context(open(path, "a", encoding="utf-8"))
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(refusal) from None
        except OSError as error:
            raise DataError(
                f"{path} cannot be written and locked: {error.strerror}; MACO_ROOT may name a folder elsewhere"
            ) from None

        def tell(doing: str) -> None:
            stream.truncate(0)
            stream.write(doing)
            stream.flush()

        tell("")
        yield tell


def holder(path: pathlib.Path) -> str | None:
    """What the process that holds the lock `path` told last; None where none does. Needs no right to write."""
    if not path.exists():
        return None
    with open(path, encoding="utf-8") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return stream.read()
        except OSError:
            return None  # where nothing can be locked, nobody holds it
    return None
