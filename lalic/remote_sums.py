"""The sums that servers send along with a file, and whether the bytes agree with them."""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Mapping
from typing import NamedTuple

_MD5 = re.compile(r'"?([0-9a-f]{32})"?')


class Sum(NamedTuple):
    """What a server says that the bytes' digest is."""

    algorithm: str
    digest: bytes


def server_sum(headers: Mapping[str, str], *, s3: bool = False) -> Sum | None:
    """The sum of the whole body that the answer's headers (names in lower case) give, None if they give none.

    An ETag is taken for an MD5 only from S3 (`s3`, or an answer that says so), of a file that was uploaded in one
    piece and is not encrypted with a key of its own; elsewhere an ETag may be anything.
    """
    if headers.get("content-encoding", "identity") not in ("", "identity", "aws-chunked"):
        return None
    if found := _sum("sha256", headers.get("x-amz-checksum-sha256", ""), 32):
        return found
    if found := _sum("md5", headers.get("content-md5", ""), 16):
        return found
    if headers.get("x-goog-stored-content-encoding", "") == "identity":
        for part in headers.get("x-goog-hash", "").split(","):
            if part.strip().startswith("md5=") and (found := _sum("md5", part.strip()[4:], 16)):
                return found
    s3 = s3 or "x-amz-request-id" in headers or headers.get("server") == "AmazonS3"
    match = _MD5.fullmatch(headers.get("etag", ""))
    if not s3 or match is None or _encrypted(headers):
        return None
    return Sum("md5", bytes.fromhex(match[1]))


def agrees(data: bytes, expected: Sum) -> bool:
    """Whether `data` has that sum."""
    return hashlib.new(expected.algorithm, data, usedforsecurity=False).digest() == expected.digest


def _encrypted(headers: Mapping[str, str]) -> bool:
    """With SSE-KMS and with a customer's key, the ETag is no MD5."""
    kms = headers.get("x-amz-server-side-encryption", "").startswith("aws:kms")
    return kms or "x-amz-server-side-encryption-customer-algorithm" in headers


def _sum(algorithm: str, text: str, size: int) -> Sum | None:
    try:
        digest = base64.b64decode(text, validate=True)
    # Of a file uploaded in pieces: the sum of the pieces' sums, with their number behind it.
    except (binascii.Error, ValueError):
        return None
    return Sum(algorithm, digest) if len(digest) == size else None
