"""Headers of PLY files as programs write them, and what plyfile can read."""

from __future__ import annotations

import io
import os
import re
from typing import BinaryIO

PLY_HEADER = 1 << 16  # bytes that hold the header of any PLY file
_FIRST_LINE = re.compile(rb"(?:\xef\xbb\xbf)?ply[ \t]*(\r\n|\n|\r)", re.IGNORECASE)


def with_plain_header(file: BinaryIO) -> BinaryIO:
    """Return the file, or a copy in memory whose header plyfile can read.

    plyfile decodes headers as ASCII and takes nothing but a line end after ``ply`` and ``end_header``. Programs write
    comments in any encoding, blanks at line ends, empty lines and, in ascii files, a byte-order mark.
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
    """See that the file can hold the rows that its header promises: plyfile takes memory for them first.

    Raises:
        ValueError: it cannot, or a number of rows is no number.
        IndexError: a number of rows is missing.
    """
    header, size = file.read(PLY_HEADER).split(b"end_header")[0], file.seek(0, os.SEEK_END)
    file.seek(0)
    for element in re.split(rb"[\r\n]element ", header)[1:]:
        words = element.split()
        rows, values = int(words[1]), max(1, element.count(b"property "))
        if rows * values > size:
            raise ValueError(f"its header promises {rows} rows of {values} values, its size is {size} bytes")
