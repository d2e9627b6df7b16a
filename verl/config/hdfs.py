"""Paths on HDFS: nothing is read from there or written to it, and the error says what to do instead."""

from __future__ import annotations

from collections.abc import Iterator

_SCHEME = "hdfs://"


def no_input(key: str, path: str | None) -> Iterator[str]:
    """The problem of reading from `path`; null passes."""
    if path is not None and path.startswith(_SCHEME):
        yield f"{key}={path}: HDFS is not supported; copy it to a local folder and name that"


def no_output(key: str, path: str | None) -> Iterator[str]:
    """The problem of writing to `path`; null passes."""
    if path is not None and path.startswith(_SCHEME):
        yield f"{key}={path}: nothing is written to HDFS; name a local or mounted folder, and copy from there"
