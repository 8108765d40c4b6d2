"""What is done already, so that a job that was stopped goes on where it was.

OUTPUT/.shard-state/job.json         the options and the input that the shards belong to
OUTPUT/.shard-state/000000.json      one record per finished shard, written after the shard is in its
place OUTPUT/.shard-state/complete.json    the sum of index.json, once all is done
OUTPUT/.shard-state/lock             held by the process that writes into OUTPUT
"""

from __future__ import annotations

import errno
import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lalic.data.index import INDEX_NAME
from lalic.errors import LalicError
from lalic.files import sha256_of, write_json, write_text

STATE_FOLDER = ".shard-state"

_COMPLETE = "complete.json"
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS}


@dataclass
class ShardRecord:
    """A finished shard, and the stretch of the candidates' order that went into it or was left out."""

    start: int
    stop: int
    last: bool = False
    """No shard follows."""
    shard: dict[str, Any] | None = None
    """The entry for the index, with a sha256 per sample; None when a last stretch had no usable image."""
    left_out: list[list[str]] = field(default_factory=list)
    """[path, reason, detail] of each."""

    @property
    def samples(self) -> list[dict[str, Any]]:
        return self.shard["samples"] if self.shard else []


class JobState:
    """The records of one output folder."""

    def __init__(self, output: Path, prefix: str) -> None:
        self.output, self.prefix = output, prefix
        self.folder = output / STATE_FOLDER

    @classmethod
    @contextmanager
    def open(cls, output: Path, job: dict[str, Any]) -> Iterator[JobState]:
        """Make or take up the folder for `job`, whose values decide on the result; hold it until the end.

        Raises:
            LalicError: another process works in the folder, or it belongs to another job.
        """
        state = cls(output, job["prefix"])
        try:
            state.folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise LalicError(f"--output {output}: is not a folder") from error
        with state._locked():
            state._take_up(job)
            state._remove_leavings()
            yield state

    def shard_name(self, number: int) -> str:
        return f"{self.prefix}-{number:06d}.tar"

    def finished(self, number: int, start: int) -> ShardRecord | None:
        """The record of a shard that begins at `start` and stands on the disk in full size, or None."""
        try:
            record = ShardRecord(**json.loads(self._record_path(number).read_text(encoding="utf-8")))
            if record.start != start:
                return None
            shard = record.shard
            if shard is not None and (self.output / shard["name"]).stat().st_size != shard["bytes"]:
                return None
            return record
        except FileNotFoundError:
            return None
        # A record that somebody cut or edited is as good as none: the shard is made again.
        except (ValueError, TypeError, KeyError):
            return None

    def save(self, number: int, record: ShardRecord) -> None:
        write_text(self._record_path(number), json.dumps(asdict(record), separators=(",", ":")) + "\n")

    def remove_from(self, number: int) -> None:
        """Remove shards numbered `number` and above: leavings of an earlier run on other images."""
        for path in (*self.folder.glob("[0-9]*.json"), *self.output.glob(f"{self.prefix}-*.tar")):
            digits = path.stem.rpartition("-")[2]
            if digits.isdecimal() and int(digits) >= number:
                path.unlink()

    def forget(self) -> None:
        """Remove all records, so that the next run begins anew."""
        for path in self.folder.glob("*.json"):
            path.unlink()

    def complete(self, index: Path) -> None:
        """Note that all is done and what `index` is then."""
        write_json(self.folder / _COMPLETE, {"index_sha256": sha256_of(index)})

    def is_complete(self, index: Path) -> bool:
        """Whether all was done before, and `index` is as it was left."""
        try:
            noted = json.loads((self.folder / _COMPLETE).read_text(encoding="utf-8"))
            return noted == {"index_sha256": sha256_of(index)}
        except (FileNotFoundError, ValueError):
            return False

    def _record_path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.json"

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with open(self.folder / "lock", "a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise LalicError(
                    f"--output {self.output}: another process is writing shards into it; wait for it to end"
                ) from None
            except OSError as error:
                # Some network file systems have no locks; there the user has to take care.
                if error.errno not in _NO_LOCKS:
                    raise
            yield

    def _take_up(self, job: dict[str, Any]) -> None:
        path = self.folder / "job.json"
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            found = sorted([*self.output.glob(INDEX_NAME), *self.output.glob(f"{self.prefix}-*.tar")])
            if found:
                raise LalicError(
                    f"--output {self.output}: holds {found[0].name}, but no record of how it was made; "
                    "use another --output, or remove it"
                ) from None
            write_json(path, job)
            return
        except ValueError as error:
            raise LalicError(f"{path} is damaged ({error}); use another --output, or remove this one") from error
        differences = sorted(name for name in {*before, *job} if before.get(name) != job.get(name))
        if differences:
            what = "; ".join(_difference(name, before.get(name), job.get(name)) for name in differences)
            raise LalicError(
                f"--output {self.output}: belongs to another job ({what}); use the same input and options, "
                "or another --output"
            )

    def _remove_leavings(self) -> None:
        """Temporary files of a run that was killed; the lock says that it is gone."""
        names = (f".{self.prefix}-*.tar.*.tmp", f".{INDEX_NAME}.*.tmp", ".left_out.csv.*.tmp")
        for path in (
            *self.folder.glob(".*.tmp"),
            *(path for name in names for path in self.output.glob(name)),
        ):
            path.unlink(missing_ok=True)


def _difference(name: str, before: object, now: object) -> str:
    if name == "images_sha256":
        return "the images have other names"
    flag = "the number of images" if name == "images" else "--" + name.replace("_", "-")
    return f"{flag} was {before}, is now {now}"
