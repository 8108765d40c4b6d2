"""What --input takes for what, and the small parts behind it: lists, gzip points, limits, checksums."""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import itertools
import json
import os
import random
import re
import zlib

import pytest
from bucket_server import Bucket, Fault, serve
from hypothesis import example, given
from hypothesis import strategies as st
from lalic.data_prep import gunzip
from lalic.data_prep.fetching import Fetcher
from lalic.data_prep.files import LocalFiles
from lalic.data_prep.gunzip import Gunzip, GzipError
from lalic.data_prep.keys import make_keys, possible_keys
from lalic.data_prep.lists import ImageIds, Listed, read_list
from lalic.data_prep.opening import OPENIMAGES, open_source, split_urls
from lalic.data_prep.remote_files import Access, RemoteFiles
from lalic.data_prep.streams import RemoteStream
from lalic.data_prep.throttle import Throttle

from lalic.errors import LalicError
from lalic.remote import Patience, Remote
from lalic.remote_sums import agrees, server_sum

HEADER = (
    "ImageID,Subset,OriginalURL,OriginalLandingURL,License,AuthorProfileURL,Author,Title,OriginalSize,OriginalMD5,"
    "Thumbnail300KURL,Rotation\n"
)
A, B, C = "000002b66c9c498e", "f9e0434389a1d4dd", "0fffffffffffffff"


def row(name: str, subset: str = "train", title: str = "A title") -> str:
    return (
        f"{name},{subset},https://farm1.example/1.jpg,https://www.example/1,https://creativecommons.org/licenses/by/2.0/,"
        f'https://www.example/people/x/,Some One,"{title}",211079,0Sad+xMj2ttXM1U8meEJ0A==,https://c1.example/1_z.jpg,0.0\n'
    )


def listed(text: str | bytes, subset: str | None = None) -> Listed:
    return read_list(io.BytesIO(text.encode() if isinstance(text, str) else text), "list", subset)


# Lists


@pytest.mark.parametrize(
    "text, names",
    [
        (f"{A}\n{B}\n", [f"train/{A}", f"train/{B}"]),
        (f"validation/{A}\r\n# a comment\r\n\r\ntest/{B}", [f"validation/{A}", f"test/{B}"]),
        (f"{A.upper()}\n{A}\n{B}\n{A}\n", [f"train/{A}", f"train/{B}"]),
        (HEADER + row(B) + row(A), [f"train/{B}", f"train/{A}"]),
        ("\ufeff" + HEADER + row(B, "test", 'with, comma and\nline "" end') + row(A), [f"test/{B}", f"train/{A}"]),
        (f"ImageID,Source,LabelName\n{A},x,/m/1\n{A},x,/m/2\n{C},x,/m/1\n{A},y,/m/3\n", [f"train/{A}", f"train/{C}"]),
        (f"Subset,ImageID\nchallenge2018,{A}\n", [f"challenge2018/{A}"]),
    ],
    ids=["bare", "downloader", "repeated", "csv", "csv-quoted", "annotations", "columns-elsewhere"],
)
@pytest.mark.parametrize("packed", [False, True], ids=["text", "gz"])
def test_lists_of_ids(text, names, packed):
    data = text.encode()
    found = listed(gzip.compress(data) if packed else data)
    assert found.kind == "ids" and list(found.entries) == [f"{name}.jpg" for name in names]
    assert list(found.entries.keys()) == names == make_keys(list(found.entries))


def test_what_is_not_taken_of_a_list_is_counted():
    text = f"ImageID,Subset\n{A},train\n{A},train\n{B},test\n{C},train\n{A},train\n"
    found = listed(text, "train")
    assert list(found.entries) == [f"train/{A}.jpg", f"train/{C}.jpg"]
    assert found.ignored == {"ids of other subsets": 1, "rows of ids listed before": 2}
    assert list(listed(f"{A}\n", "validation").entries) == [f"validation/{A}.jpg"]


def test_lists_of_urls_and_paths():
    assert listed("https://a/b.jpg\nhttp://c/d.jpg \nhttps://a/b.jpg").entries == ["https://a/b.jpg", "http://c/d.jpg"]
    assert listed("https://a/b.jpg").kind == "URLs" and listed("s3://a/b").kind == "URLs"
    assert listed("a/b.jpg\n c.jpg").entries == ["a/b.jpg", " c.jpg"] and listed("a").kind == "paths"
    assert listed(f"train/{A}.jpg").kind == "paths" and listed(A[1:]).kind == "paths"
    assert listed(b"\xff.jpg").entries == [os.fsdecode(b"\xff.jpg")]
    assert not listed("").entries and not listed("# nothing\n\n").entries


@pytest.mark.parametrize(
    "text, message",
    [
        (f"{A}\n{B}\nnonsense\n", "line 3 is no id of OpenImages"),
        (f"{A}\n{B[1:]}\n", "line 2 is no id"),
        (f"ImageID,x\n{A},1\nshort,1\n", "line 3 has no id of 16 hexadecimal digits under ImageID"),
        (f"x,ImageID\n1,{A}\n1\n", "line 3 has no id"),
        (f"ImageID,Subset\n{A},nosuch\n", "line 2 is of an unknown subset, 'nosuch'"),
        ("https://a/b\na/b.jpg\n", "line 2 is none of the URLs"),
        ("a/b.jpg\nhttps://a/b\n", "line 2 is none of the paths"),
        ("a.jpg\n\0\n", "is not a text file"),
        (gzip.compress(b"a.jpg\n" * 1000)[:-20], "is damaged or cut short"),
        ('ImageID\n"' + "x" * 200_000 + '"\n', "is not a CSV"),
    ],
)
def test_lists_that_are_none(text, message):
    with pytest.raises(LalicError, match=f"--input list: .*{message}"):
        listed(text)


def test_ids_are_arrays_and_not_strings():
    found = listed("ImageID\n" + "".join(f"{number:016x}\n" for number in range(1000, 0, -1))).entries
    assert isinstance(found, ImageIds) and found.ids.nbytes + found.subset.nbytes == 9000
    assert found[0] == f"train/{1000:016x}.jpg" and list(found[998:]) == [f"train/{n:016x}.jpg" for n in (2, 1)]


# What is what


def test_the_default_bucket_is_openimages(tmp_path):
    (tmp_path / "ids.csv").write_text(HEADER + row(A))
    source = open_source(tmp_path / "ids.csv")
    assert isinstance(source, RemoteFiles) and source.root == OPENIMAGES
    remote, name = source._locate(source.names[0])
    assert remote.url(name) == f"https://open-images-dataset.s3.amazonaws.com/train/{A}.jpg"


def test_a_list_elsewhere(tmp_path):
    with serve(Bucket({"lists/ids.csv": (HEADER + row(A) + row(B)).encode(), "lists/p.txt": b"a.jpg\n"})) as bucket:
        source = open_source(f"{bucket.url}/lists/ids.csv", bucket="https://mirror.example/x")
        assert list(source.names) == [f"train/{A}.jpg", f"train/{B}.jpg"]
        with pytest.raises(LalicError, match="a list elsewhere holds ids or URLs"):
            open_source(f"{bucket.url}/lists/p.txt")
        with pytest.raises(LalicError, match=r"none.csv: there is no such file"):
            open_source(f"{bucket.url}/lists/none.csv", Access(patience=Patience(attempts=1)))


def test_identity_does_not_depend_on_the_place(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / f"{A}.jpg").touch()
    (tmp_path / "ids.txt").write_text(A)
    (tmp_path / "urls.txt").write_text(f"https://one/base/train/{A}.jpg")
    folder, ids = open_source(tmp_path / "train"), open_source(tmp_path / "ids.txt", bucket=str(tmp_path))
    assert isinstance(ids, LocalFiles)
    assert folder.identity() == open_source(tmp_path / "urls.txt").identity()
    assert ids.identity() == open_source(tmp_path / "ids.txt", bucket="s3://elsewhere").identity()
    assert ids.identity() != folder.identity()


def test_urls_are_split_at_their_common_folder():
    assert split_urls(["https://h/a/b/1.jpg", "https://h/a/c/2.jpg"])[:2] == ("https://h/a", ["b/1.jpg", "c/2.jpg"])
    assert split_urls(["s3://b/1.jpg"])[:2] == ("s3://b", ["1.jpg"])
    root, names, servers = split_urls(["https://h/1.jpg", "http://g/1.jpg"])
    assert (root, names, servers) == (None, ["h/1.jpg", "g/1.jpg"], {"h": "https://h", "g": "http://g"})


def test_a_server_by_two_schemes_is_two_and_a_password_is_in_no_name():
    root, names, servers = split_urls(["https://h/1.jpg", "http://h/1.jpg"])
    assert (root, names) == (None, ["h/1.jpg", "http:h/1.jpg"])
    assert servers == {"h": "https://h", "http:h": "http://h"}
    assert split_urls(["http://me:secret@h/a/1.jpg"])[:2] == ("http://me:secret@h/a", ["1.jpg"])
    root, names, servers = split_urls(["http://me:secret@h/1.jpg", "http://g/1.jpg"])
    assert names == ["h/1.jpg", "g/1.jpg"] and servers["h"] == "http://me:secret@h"
    with pytest.raises(LalicError, match="http://h has two user names"):
        split_urls(["http://me:a@h/1.jpg", "http://me:b@h/1.jpg", "http://me:c@h/1.jpg"])


def test_several_servers(tmp_path):
    with serve(Bucket({"x/1.jpg": b"one"})) as one, serve(Bucket({"y/1.jpg": b"two"})) as two:
        (tmp_path / "urls.txt").write_text(f"{one.url}/x/1.jpg\n{two.url}/y/1.jpg\n")
        source = open_source(tmp_path / "urls.txt")
        assert [data for _, data in source.find(set(make_keys(source.names)))] == [b"one", b"two"]


def readable(name: str) -> str:
    """What stays of a name in its key, however it is made unique."""
    return re.sub(r"[^A-Za-z0-9_/-]", "_", os.path.splitext(name)[0])[-75:].lstrip("_/") or "image"


@example(names=["0", ":0"])
@given(st.lists(st.text(min_size=1, max_size=12), max_size=8, unique=True))
def test_keys_of_members_are_those_of_files_where_no_two_are_alike(names):
    keys = make_keys(names)
    for name, key in zip(names, keys, strict=True):
        possible = possible_keys(name, "x.tar")
        assert len(set(possible)) == len(possible)
        if sum(readable(other) == readable(name) for other in names) == 1:
            assert possible[0] == key


# Streams


def unpack(file) -> bytes:
    return b"".join(iter(lambda: file.read(10_000), b""))


@pytest.mark.parametrize("level", [0, 1, 6, 9])
@pytest.mark.parametrize("size", [0, 1, 1000, 300_000])
@pytest.mark.parametrize("members", [1, 3])
def test_gzip_is_taken_up_at_every_point(level, size, members):
    """Against Python's own gzip; stored, fixed and dynamic blocks, several members, padding behind them."""
    generator = random.Random(size + level)
    parts = [
        generator.randbytes(size // 2) + bytes(generator.choices(b"abcdefgh", k=size // 2)) for _ in range(members)
    ]
    data, packed = b"".join(parts), b"".join(gzip.compress(part, level) for part in parts) + bytes(100)
    stream = Gunzip(io.BytesIO(packed), spacing=20_000)
    assert unpack(stream) == data == gzip.decompress(packed)
    for point in json.loads(json.dumps(stream.points)):
        again = Gunzip(io.BytesIO(packed), point)
        assert again.tell() == point.get("output", 0)
        assert unpack(again) == (data[point.get("output", 0) :])
    if size > 100_000:
        assert len(stream.points) > 2 * members


def test_gzip_points_reach_back_no_further_than_their_spacing():
    data = random.Random(2).choices(range(200), k=2_000_000)
    stream = Gunzip(io.BytesIO(gzip.compress(bytes(data))), spacing=100_000)
    unpack(stream)
    places = [point.get("output", 0) for point in stream.points]
    # A point can only lie between two deflate blocks.
    assert max(b - a for a, b in itertools.pairwise(places)) < 100_000 + 100_000


@pytest.mark.parametrize("with_libz", [True, False])
@pytest.mark.parametrize("damage", ["cut", "half", "sum", "middle", "nothing"])
def test_damaged_gzip(damage, with_libz, monkeypatch):
    if not with_libz:
        monkeypatch.setattr(gunzip, "_libz", lambda: None)
    data = bytes(random.Random(3).choices(range(64), k=500_000))
    packed = bytearray(gzip.compress(data))
    if damage == "nothing":
        assert unpack(Gunzip(io.BytesIO(packed))) == data
        return
    if damage in ("cut", "half"):
        del packed[-1 if damage == "cut" else len(packed) // 2 :]
    else:
        packed[-6 if damage == "sum" else len(packed) // 2] ^= 0x10
    with pytest.raises(GzipError, match="cut short" if damage in ("cut", "half") else "damaged"):
        unpack(Gunzip(io.BytesIO(packed)))


def test_the_sum_is_checked_from_a_point_on_too():
    data = bytes(random.Random(4).choices(range(64), k=500_000))
    packed = bytearray(gzip.compress(data))
    stream = Gunzip(io.BytesIO(packed), spacing=50_000)
    unpack(stream)
    packed[-6] ^= 1
    with pytest.raises(GzipError, match="its sum does not agree"):
        unpack(Gunzip(io.BytesIO(packed), stream.points[4]))


def test_a_remote_stream_reads_chunks_once_and_survives_cuts():
    data = random.Random(5).randbytes(200_000)
    with serve(Bucket({"f": data}, faults=[Fault("any", chance=0.3, times=1e9)])) as bucket:
        remote = Remote(bucket.url, patience=Patience(attempts=20, first_delay=0.01, most_delay=0.02, silence=5))
        with RemoteStream(remote, "f", len(data), Throttle(), ahead=3, chunk=7_000) as raw:
            stream = io.BufferedReader(raw, 1000)
            assert unpack(stream) == data and stream.read(10) == b""
            stream.seek(123_456)
            assert stream.read(50_000) == data[123_456:173_456]
    with serve(Bucket({"f": data})) as bucket:
        with RemoteStream(Remote(bucket.url), "f", len(data), Throttle(), ahead=2, chunk=7_000) as raw:
            raw.seek(100_001)
            assert raw.read(5) == data[100_001:100_006]
        starts = sorted(int(asked.removeprefix("bytes=").partition("-")[0]) for _, _, asked in bucket.requests)
        assert starts == [100_001, 107_001, 114_001][: len(starts)]


# Limits and sums


def test_the_throttle_keeps_the_mean_rate():
    now = 0.0
    slept = []

    def sleep(seconds: float) -> None:
        nonlocal now
        slept.append(seconds)
        now += seconds

    throttle = Throttle(1000, None, clock=lambda: now, sleep=sleep)
    for _ in range(10):
        throttle.before_request()
        throttle.took(500)
    assert now == pytest.approx(4.5)
    now = 100.0
    throttle = Throttle(None, 4, clock=lambda: now, sleep=sleep)
    for _ in range(9):
        throttle.before_request()
    assert now == pytest.approx(102.0)
    # What was not used is not saved up.
    now = 1000.0
    for _ in range(5):
        throttle.before_request()
    assert now == pytest.approx(1001.0)


def test_answers_come_in_order_and_no_more_than_allowed_are_under_way():
    import threading
    import time

    under_way = most = taken = 0
    lock = threading.Lock()

    def fetch(item: int) -> int:
        nonlocal under_way, most
        with lock:
            under_way += 1
            most = max(most, under_way)
            assert item - taken <= 12
        time.sleep(random.Random(item).uniform(0, 0.01))
        with lock:
            under_way -= 1
        if item == 50:
            raise KeyError(item)
        return item

    fetcher = Fetcher(fetch, 6, ahead=12)
    results = []
    with pytest.raises(KeyError):
        for result in fetcher.stream(range(100)):
            results.append(result)
            taken += 1
    fetcher.close()
    assert results == list(range(50)) and 2 < most <= 6


MD5 = hashlib.md5(b"data").hexdigest()
MD5_64 = base64.b64encode(hashlib.md5(b"data").digest()).decode()


@pytest.mark.parametrize(
    "headers, s3, algorithm",
    [
        ({"etag": f'"{MD5}"'}, True, "md5"),
        ({"etag": f'"{MD5}"'}, False, None),
        ({"etag": f'"{MD5}"', "server": "AmazonS3"}, False, "md5"),
        ({"etag": f'"{MD5}"', "x-amz-request-id": "1"}, False, "md5"),
        ({"etag": f'"{MD5}-2"'}, True, None),
        ({"etag": f'W/"{MD5}"'}, True, None),
        ({"etag": f'"{MD5}"', "x-amz-server-side-encryption": "aws:kms"}, True, None),
        ({"etag": f'"{MD5}"', "x-amz-server-side-encryption": "AES256"}, True, "md5"),
        ({"etag": f'"{MD5}"', "x-amz-server-side-encryption-customer-algorithm": "AES256"}, True, None),
        ({"etag": f'"{MD5}"', "content-encoding": "gzip"}, True, None),
        ({"content-md5": MD5_64}, False, "md5"),
        ({"content-md5": "nonsense"}, False, None),
        ({"x-amz-checksum-sha256": base64.b64encode(hashlib.sha256(b"data").digest()).decode()}, False, "sha256"),
        ({"x-amz-checksum-sha256": "abc=-2", "etag": f'"{MD5}"'}, True, "md5"),
        ({"x-goog-hash": f"crc32c=AAAAAA==,md5={MD5_64}", "x-goog-stored-content-encoding": "identity"}, False, "md5"),
        ({"x-goog-hash": f"md5={MD5_64}", "x-goog-stored-content-encoding": "gzip"}, False, None),
        ({}, True, None),
    ],
)
def test_the_sums_of_servers(headers, s3, algorithm):
    found = server_sum(headers, s3=s3)
    assert (found.algorithm if found else None) == algorithm
    if found:
        assert agrees(b"data", found) and not agrees(b"date", found)


def test_zlib_is_the_one_that_python_has():
    """The structure that is handed to libz is checked by zlib itself, by its version and size."""
    assert gunzip._libz() is not None and zlib.crc32(b"") == 0
