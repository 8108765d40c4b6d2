"""Reading from elsewhere: what passes is tried again, what does not pass is one line."""

from __future__ import annotations

import gc
import multiprocessing
import pickle
import random
import time
from email.utils import formatdate

import fsspec
import pytest
from bucket_server import KINDS, Bucket, Fault, forget_credentials, serve, serve_s3
from fsspec import AbstractFileSystem

from lalic.errors import LalicError
from lalic.remote import (
    Patience,
    Remote,
    RemoteError,
    RemoteMissing,
    RemoteRefused,
    RemoteTooLarge,
    is_url,
    join_url,
)
from lalic.remote_errors import retry_after

QUICK = Patience(attempts=5, first_delay=0.01, most_delay=0.05, silence=2.0)
DATA = random.Random(5).randbytes(300_000)


@pytest.fixture
def bucket():
    with serve(Bucket({"train/a.jpg": DATA, "odd name?#%.jpg": DATA[:100]})) as bucket:
        yield bucket


def place(bucket: Bucket, **changes) -> Remote:
    return Remote(bucket.url, **{"patience": QUICK, **changes})


def test_whole_and_part(bucket):
    remote = place(bucket)
    assert remote.read("train/a.jpg") == DATA
    assert remote.read("train/a.jpg", 1000, 5000) == DATA[1000:5000]
    assert remote.read("train/a.jpg", 7, 7) == b""
    assert remote.read("odd name?#%.jpg") == DATA[:100]
    assert remote.info("train/a.jpg").size == len(DATA)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part", [False, True], ids=["whole", "part"])
def test_what_passes_is_tried_again(bucket, kind, part):
    bucket.faults = [Fault(kind, "a.jpg", times=3)]
    if part:
        assert place(bucket).read("train/a.jpg", 10, 200_000) == DATA[10:200_000]
    elif kind == "short":
        # A whole file whose length the server misstates looks complete: its reader has to check it.
        assert DATA.startswith(place(bucket).read("train/a.jpg"))
    else:
        assert place(bucket).read("train/a.jpg") == DATA


def test_attempts_end_in_one_line(bucket):
    bucket.faults = [Fault("503", times=100)]
    with pytest.raises(RemoteError, match=r"a.jpg: the server answers 503 .*5 attempts") as caught:
        place(bucket).read("train/a.jpg")
    assert bucket.count("a.jpg") == 5 and "\n" not in str(caught.value)


def test_missing_is_not_tried_again(bucket):
    with pytest.raises(RemoteMissing, match=r"train/b.jpg: there is no such file"):
        place(bucket).read("train/b.jpg")
    assert bucket.count("b.jpg") == 1


@pytest.mark.parametrize("status", ["401", "403"])
def test_refused_is_not_tried_again(bucket, status):
    bucket.faults = [Fault(status, times=100)]
    with pytest.raises(RemoteRefused, match="access is refused"):
        place(bucket).read("train/a.jpg")
    assert bucket.count() == 1


def test_a_server_without_ranges_is_named(bucket):
    bucket.ranges = False
    with pytest.raises(RemoteError, match="does not send parts"):
        place(bucket).read("train/a.jpg", 5, 10)


@pytest.mark.parametrize(
    "told, least, most",
    [
        ("3", 3, 3),
        ("0.5", 0.5, 0.5),
        ("86400", 300, 300),
        (100, 50, 101),
        (-100, 0, 0),
        (1_000_000, 300, 300),
    ],
    ids=["seconds", "half a second", "a day", "a date", "a date that has passed", "a date far away"],
)
def test_retry_after_is_a_number_of_seconds_or_a_date(told, least, most):
    """Numbers stand for a date so many seconds from now."""
    error = OSError()
    error.headers = {"Retry-After": told if isinstance(told, str) else formatdate(time.time() + told, usegmt=True)}
    assert least <= retry_after(error) <= most


@pytest.mark.parametrize("told", ["nan", "inf", "-5", "", "soon", "Fri, 99 Foo 2026 00:00:00 GMT"])
def test_a_retry_after_that_says_nothing(told):
    error = OSError()
    error.headers = {"Retry-After": told}
    assert retry_after(error) is None


@pytest.mark.timeout(30)
def test_a_body_without_end_is_not_read_into_memory(bucket):
    bucket.endless = "train/a.jpg"
    with pytest.raises(RemoteTooLarge, match="is too large"):
        place(bucket).fetch("train/a.jpg", most=100_000)
    with pytest.raises(RemoteError, match="bytes came where 1000 were asked for"):
        place(bucket).read("train/a.jpg", 0, 1000)


def test_a_redirection_without_end_is_called_so(bucket):
    bucket.redirect = "a.jpg"
    with pytest.raises(RemoteError, match="sends from one address to the next without end"):
        Remote(bucket.url, patience=QUICK).read("a.jpg")


def test_a_long_wait_is_told_before_the_fourth_attempt(caplog, monkeypatch):
    monkeypatch.setattr("lalic.remote._SILENT", 0.02)
    with pytest.raises(RemoteError, match="3 attempts"):
        Remote("http://127.0.0.1:9", patience=Patience(attempts=3, first_delay=0.1)).read("a")
    assert len([record for record in caplog.records if record.levelname == "WARNING"]) == 1


def test_nobody_there():
    with pytest.raises(RemoteError, match="2 attempts"):
        Remote("http://127.0.0.1:9", patience=Patience(attempts=2, first_delay=0.01)).read("a")


@pytest.mark.parametrize(
    "root, message",
    [
        ("nosuch://x", "nosuch:// cannot be read"),
        ("http:///", "http:///: names no server"),
        ("s3:///shards", "s3:///shards: names no server or bucket"),
    ],
)
def test_no_such_place(root, message):
    with pytest.raises(LalicError, match=message):
        Remote(root, patience=Patience(attempts=1)).read("a")


def test_an_endpoint_goes_with_s3_only(bucket):
    with pytest.raises(RemoteError, match="goes with s3:// only"):
        Remote("memory://x", endpoint="http://127.0.0.1:1").read("a")
    with pytest.raises(RemoteError, match="goes with s3:// only"):
        place(bucket, endpoint="http://127.0.0.1:1").read("train/a.jpg")


def test_a_bucket_that_cannot_be_is_not_asked_for_again(monkeypatch, tmp_path):
    forget_credentials(monkeypatch, tmp_path)
    remote = Remote("s3://no such bucket", "http://127.0.0.1:1", patience=Patience(attempts=5, first_delay=0.01))
    with pytest.raises(RemoteError, match='Invalid bucket name "no such bucket"') as caught:
        remote.read("a")
    assert remote.retries == 0 and str(caught.value).isprintable()


def test_a_profile_that_is_not_there_is_one_line_at_once(monkeypatch, tmp_path):
    forget_credentials(monkeypatch, tmp_path)
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    # Another patience than elsewhere, so that the connection is a new one.
    remote = Remote("s3://photos", "http://127.0.0.1:1", patience=Patience(attempts=4, first_delay=0.011))
    with pytest.raises(RemoteError, match=r"profile \(nobody\) could not be found"):
        remote.read("a")
    assert remote.retries == 0


class _Elsewhere(AbstractFileSystem):
    """A file system whose errors are its own, as those of other packages are."""

    protocol = "elsewhere"
    failures = 0

    def cat_file(self, path, start=None, end=None, **_):
        if _Elsewhere.failures:
            _Elsewhere.failures -= 1
            raise Exception("the line is dead")
        return DATA[start:end]


def test_errors_of_any_file_system_are_tried_again_and_one_line():
    fsspec.register_implementation("elsewhere", _Elsewhere, clobber=True)
    remote = Remote("elsewhere://x", patience=Patience(attempts=3, first_delay=0.01))
    _Elsewhere.failures = 2
    assert remote.read("a", 5, 10) == DATA[5:10]
    _Elsewhere.failures = 3
    with pytest.raises(RemoteError, match="elsewhere://x/a: the line is dead, 3 attempts"):
        remote.read("a")


def test_what_is_known_of_a_file_is_asked_again_too(bucket):
    bucket.faults = [Fault("503", times=4)]
    assert place(bucket).info("train/a.jpg").size == len(DATA)
    with pytest.raises(RemoteMissing):
        place(bucket).info("train/b.jpg")
    bucket.faults = [Fault("drop", times=100)]
    with pytest.raises(RemoteError, match="5 attempts"):
        place(bucket).info("train/a.jpg")


def test_the_global_generator_is_left_alone(bucket):
    bucket.faults = [Fault("500", times=3)]
    random.seed(3)
    state = random.getstate()
    place(bucket).read("train/a.jpg")
    assert random.getstate() == state


def _read_a(remote: Remote) -> bytes:
    return remote.read("train/a.jpg", 0, 1000)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_works_in_other_processes(bucket, method):
    remote = place(bucket)
    assert remote.read("train/a.jpg", 0, 1000) == DATA[:1000]
    with multiprocessing.get_context(method).Pool(2) as pool:
        assert pool.map(_read_a, [remote] * 4, chunksize=1) == [DATA[:1000]] * 4
    assert pickle.loads(pickle.dumps(remote)) == remote


def test_s3_without_credentials(monkeypatch, tmp_path):
    forget_credentials(monkeypatch, tmp_path)
    with serve_s3() as endpoint:
        remote = Remote("s3://photos", endpoint=endpoint, patience=QUICK)
        remote.filesystem.pipe_file("s3://photos/train/a.jpg", DATA)
        assert remote.read("train/a.jpg") == DATA
        assert remote.read("train/a.jpg", 100, 70_000) == DATA[100:70_000]
        assert remote.info("train/a.jpg").size == len(DATA)
        with pytest.raises(RemoteMissing, match=r"train/b.jpg: there is no such file"):
            remote.read("train/b.jpg")
        with pytest.raises(RemoteMissing, match="no such file"):
            Remote("s3://nobucket", endpoint=endpoint, patience=QUICK).read("a")
    with pytest.raises(RemoteError, match="5 attempts"):
        remote.read("train/a.jpg")


def test_names():
    assert is_url("s3://bucket/x") and is_url("https://a/b") and not is_url("/a/b") and not is_url("a://b://"[:1])
    assert join_url("s3://b/", "a b?.tar") == "s3://b/a b?.tar"
    assert join_url("https://h/x", "a b?.tar") == "https://h/x/a%20b%3F.tar"


def _collect_and_read(remote: Remote) -> float:
    began = time.monotonic()
    gc.collect()
    _read_a(remote)
    gc.collect()
    return time.monotonic() - began


def test_a_forked_process_does_not_wait_for_its_parents_connections(bucket):
    """fsspec's finalizers, run in a child, wait a second for a thread that is not there."""
    for number in range(5):
        place(bucket, patience=Patience(attempts=5, first_delay=0.01, silence=2.0 + number)).read("train/a.jpg", 0, 9)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(_collect_and_read, [place(bucket)]) < 3.0  # five of them were five seconds
