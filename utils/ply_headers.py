"""Make the headers of PLY files from any program readable for plyfile."""

from __future__ import annotations

import io
import os
import re
from typing import BinaryIO

PLY_HEADER = 1 << 16  # longer headers (in bytes) are not recognized
_FIRST_LINE = re.compile(rb"(?:\xef\xbb\xbf)?ply[ \t]*(\r\n|\n|\r)", re.IGNORECASE)


def with_plain_header(file: BinaryIO) -> BinaryIO:
    """Return the file, or an in-memory copy whose header plyfile can read.

    plyfile decodes headers as ASCII and accepts only a line end after ``ply`` and ``end_header``, but programs write
    comments in any encoding, trailing spaces, empty lines and, in ascii files, a byte-order mark.
    """
    start = file.read(PLY_HEADER)
    file.seek(0)
    first = _FIRST_LINE.match(start)
    if first is None:
        return file
    newline = first[1]
    last = re.search(re.escape(newline) + rb"[ \t]*end_header[ \t]*" + re.escape(newline), start)
    if last is None:
        return file
    lines = start[first.end() : last.start()].split(newline)
    plain = [line.strip().decode("ascii", "replace").replace("\ufffd", "?").encode() for line in lines if line.strip()]
    header = newline.join([b"ply", *plain, b"end_header", b""])
    if start.startswith(header):
        return file
    file.seek(last.end())
    return io.BytesIO(header + file.read())


def check_sizes(file: BinaryIO) -> None:
    """Check that the file is large enough for the rows its header promises; plyfile would allocate them first.

    Raises:
        ValueError: the file is too small, or a row count is not a number.
        IndexError: a row count is missing.
    """
    header, size = file.read(PLY_HEADER).split(b"end_header")[0], file.seek(0, os.SEEK_END)
    file.seek(0)
    for element in re.split(rb"[\r\n]element ", header)[1:]:
        words = element.split()
        rows, values = int(words[1]), max(1, element.count(b"property "))
        if rows * values > size:
            raise ValueError(f"its header promises {rows} rows of {values} values, its size is {size} bytes")
