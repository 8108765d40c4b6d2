"""What is done already, so that a job that was stopped goes on where it was.

OUTPUT/.shard-state/job.json         the options and the input that the shards belong to
OUTPUT/.shard-state/000000.json      one record per finished shard, written after the shard is in its place
OUTPUT/.shard-state/complete.json    the sum of index.json, once all is done
OUTPUT/.shard-state/lock             held by the process that writes into OUTPUT (`lease` on object stores)
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from lalic.data.index import INDEX_NAME
from lalic.errors import LalicError

from .output import OutputFolder

STATE_FOLDER = ".shard-state"

_COMPLETE = f"{STATE_FOLDER}/complete.json"
_JOB = f"{STATE_FOLDER}/job.json"
_LOCK = f"{STATE_FOLDER}/lock"

_SAMPLE_FIELDS = {"key", "ext", "offset", "size", "width", "height"}

# Options that came later: what they were before there was a choice.
_BEFORE = {"check": "full"}


@dataclass
class ShardRecord:
    """A finished shard, and the stretch of the candidates' order that went into it or was left out."""

    start: int
    stop: int
    last: bool = False
    """No shard follows."""
    shard: dict[str, Any] | None = None
    """The entry for the index, with sha256 and source per sample; None when a last stretch had no usable image."""
    left_out: list[list[str]] = field(default_factory=list)
    """[path, reason, detail] of each."""
    cursor: dict[str, Any] | None = None
    """Where the source goes on behind it, if that is not told by `stop`."""

    @property
    def samples(self) -> list[dict[str, Any]]:
        return self.shard["samples"] if self.shard else []


class JobState:
    """The records of one output folder."""

    def __init__(self, output: OutputFolder, prefix: str) -> None:
        self.output, self.prefix = output, prefix

    @classmethod
    @contextmanager
    def open(cls, output: OutputFolder, job: dict[str, Any]) -> Iterator[JobState]:
        """Make or take up the folder for `job`, whose values decide on the result; hold it until the end.

        Raises:
            LalicError: another process works in the folder, or it belongs to another job.
        """
        state = cls(output, job["prefix"])
        output.prepare(STATE_FOLDER)
        with output.held(_LOCK):
            state._take_up(job)
            state._remove_leavings()
            yield state

    def shard_name(self, number: int) -> str:
        return f"{self.prefix}-{number:06d}.tar"

    def finished(self, number: int, start: int) -> ShardRecord | None:
        """The record of a shard that begins at `start` and stands in its place in full size, or None."""
        try:
            record = ShardRecord(**json.loads(self.output.read(_record_name(number))))
            if record.start != start or not _is_record(record, self.shard_name(number)):
                return None
            shard = record.shard
            if shard is not None and self.output.size(shard["name"]) != shard["bytes"]:
                return None
            return record
        except FileNotFoundError:
            return None
        # A record that somebody cut or edited is as good as none: the shard is made again.
        except (ValueError, TypeError, KeyError, AttributeError):
            return None

    def save(self, number: int, record: ShardRecord) -> None:
        text = json.dumps(vars(record), separators=(",", ":")) + "\n"
        self.output.write_text(_record_name(number), text)

    def remove_from(self, number: int) -> None:
        """Remove shards numbered `number` and above: leavings of an earlier run on other images."""
        for name in (*self._records(), *self._shards()):
            digits = PurePosixPath(name).stem.rpartition("-")[2]
            if digits.isdecimal() and int(digits) >= number:
                self.output.remove(name)

    def forget(self) -> None:
        """Remove all records, so that the next run begins anew."""
        for name in self.output.names(STATE_FOLDER):
            if name.endswith(".json"):
                self.output.remove(name)

    def complete(self, index: str) -> None:
        """Note that all is done and what `index` is then."""
        self._write_json(_COMPLETE, {"index_sha256": self.output.sha256(index)})

    def is_complete(self, index: str) -> bool:
        """Whether all was done before, and `index` is as it was left."""
        try:
            noted = json.loads(self.output.read(_COMPLETE))
            return noted == {"index_sha256": self.output.sha256(index)}
        except (FileNotFoundError, ValueError):
            return False

    def _records(self) -> list[str]:
        return [name for name in self.output.names(STATE_FOLDER) if re.fullmatch(r".*/\d+\.json", name)]

    def _shards(self) -> list[str]:
        own = re.compile(rf"{re.escape(self.prefix)}-\d{{6,}}\.tar")
        return [name for name in self.output.names() if own.fullmatch(name)]

    def _take_up(self, job: dict[str, Any]) -> None:
        try:
            before = json.loads(self.output.read(_JOB))
            if not isinstance(before, dict):
                raise ValueError("no JSON object")
        except FileNotFoundError:
            found = sorted([name for name in self.output.names() if name == INDEX_NAME] + self._shards())
            if found:
                raise LalicError(
                    f"--output {self.output.where}: holds {found[0]}, but no record of how it was made; "
                    "use another --output, or remove it"
                ) from None
            self._write_json(_JOB, job)
            return
        except ValueError as error:
            raise LalicError(
                f"{self.output.path(_JOB)} is damaged ({error}); use another --output, or remove this one"
            ) from error
        before = {**{name: value for name, value in _BEFORE.items() if name in job}, **before}
        differences = sorted(name for name in {*before, *job} if before.get(name) != job.get(name))
        if differences:
            what = _difference_in_kind(before, job) or "; ".join(
                _difference(name, before.get(name), job.get(name)) for name in differences
            )
            raise LalicError(
                f"--output {self.output.where}: belongs to another job ({what}); use the same input and options, "
                "or another --output"
            )

    def _remove_leavings(self) -> None:
        """Temporary files of a run that was killed; the lock says that it is gone."""
        files = re.compile(rf"\.({re.escape(self.prefix)}-.*\.tar|{re.escape(INDEX_NAME)}|.*\.csv(\.gz)?)\.\d+\.tmp")
        for name in self.output.names():
            if files.fullmatch(name):
                self.output.remove(name)
        for name in self.output.names(STATE_FOLDER):
            if re.fullmatch(r".*/\..*\.tmp", name):
                self.output.remove(name)
        self.output.remove_uploads(re.compile(rf"{re.escape(self.prefix)}-\d+\.tar|{re.escape(INDEX_NAME)}"))

    def _write_json(self, name: str, value: Any) -> None:
        self.output.write_text(name, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def _is_record(record: ShardRecord, name: str) -> bool:
    """Whether the record is one that this program writes, for the shard `name` or for a last stretch without one."""
    rows = all(len(row) == 3 and all(isinstance(cell, str) for cell in row) for row in record.left_out)
    if type(record.stop) is not int or type(record.last) is not bool or not rows:
        return False
    if record.cursor is not None and not isinstance(record.cursor, dict):
        return False
    shard = record.shard
    if shard is None:
        return record.last
    if shard["name"] != name or type(shard["bytes"]) is not int or not shard["samples"]:
        return False
    sums = [shard["sha256"], *(sample["sha256"] for sample in shard["samples"])]
    return all(len(bytes.fromhex(digest)) == 32 for digest in sums) and all(
        _SAMPLE_FIELDS <= sample.keys() for sample in shard["samples"]
    )


def _record_name(number: int) -> str:
    return f"{STATE_FOLDER}/{number:06d}.json"


def _difference_in_kind(before: dict[str, Any], now: dict[str, Any]) -> str:
    was, is_ = before.get("manifest_sha256"), now.get("manifest_sha256")
    if was == is_:
        return ""
    if was and is_:
        return "another --from-manifest"
    return "it was made with --from-manifest" if was else "it was made without --from-manifest"


def _difference(name: str, before: object, now: object) -> str:
    if name in ("images_sha256", "tars_sha256"):
        return f"the {name.partition('_')[0]} have other names"
    flag = f"the number of {name}" if name in ("images", "tars") else "--" + name.replace("_", "-")
    return f"{flag} was {before}, is now {now}"
