"""The one way in which a bad input ends a program: one clear line and a non-zero exit."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from collections.abc import Callable
from typing import NoReturn


class LalicError(Exception):
    """A problem that the user can mend. Its text says what is wrong and what to do, in one line."""


def fail(message: object) -> NoReturn:
    """Print `error: message` as one line on stderr and exit with status 2.

    The line is also added to the file that LALIC_ERROR_FILE names: launchers keep the status to themselves, and a job
    script wants to know whether the program found something to complain of or crashed.
    """
    line = f"error: {' '.join(str(message).split())}"
    print(line, file=sys.stderr, flush=True)
    if path := os.environ.get("LALIC_ERROR_FILE"):
        with contextlib.suppress(OSError), open(path, "a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(line + "\n")
    raise SystemExit(2)


def for_terminal(name: str) -> str:
    """A name of a file or sample, with the control characters escaped that a terminal would obey."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)


def run_main(main: Callable[[], int | None]) -> NoReturn:
    """Run a program's `main` and turn the errors that users cause into one line.

    Set LALIC_TRACEBACK=1 to see the traceback instead. Anything that is not foreseen keeps its traceback.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A file's name that this terminal's encoding does not have is no reason to end in the last line.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        status = main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:
        # The reader of our output went away (`| head`): close quietly, as other command-line tools do.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    except LalicError as error:
        if os.environ.get("LALIC_TRACEBACK"):
            raise
        fail(error)
    except OSError as error:
        if os.environ.get("LALIC_TRACEBACK") or error.errno not in _FORESEEN:
            raise
        fail(f"{_FORESEEN[error.errno]}: {error.filename2 or error.filename or error}")
    except RuntimeError as error:
        if os.environ.get("LALIC_TRACEBACK") or not is_out_of_memory(error):
            raise
        fail(f"not enough memory: take a smaller picture, batch or crop, or gradient checkpointing ({error})")
    raise SystemExit(status or 0)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether PyTorch could not allocate memory, of a GPU or of this machine."""
    return type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator: " in str(error)


_FORESEEN = {
    errno.ENOSPC: "no space left on the device (free some and run the same command again)",
    errno.EDQUOT: "the disk quota is used up (free some and run the same command again)",
    errno.EACCES: "permission denied",
    errno.EROFS: "the file system is read-only",
    errno.ENOENT: "no such file or folder",
    errno.ENOTDIR: "not a folder",
    errno.EISDIR: "is a folder, a file was expected",
}
