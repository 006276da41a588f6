"""A data file of any size, read through an index on disk: where each sample stands, and how large it is.

The index is made once, in one pass that holds one sample at a time, and lies beside the data file (or, if
nothing can be written there, in the user's cache folder). Samples are then read from the data file itself,
one at a time, by whoever needs one: no process holds them all.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from flags import InputError

BLOCK = 1 << 22  # bytes read at a time
VERSION = 1
# A row per sample: its bytes in the file, its number (of the line, in JSON lines), images, bytes of text; and
# of what stands before its first answer: turns, images, bytes of text.
FIELDS = ("start", "size", "number", "images", "bytes", "turns_before", "images_before", "bytes_before")


def records(path: str | Path) -> Iterator[tuple[int, int, int, str, object]]:
    """(start, size, number, where, record) of a file that is one JSON list, or JSON objects one a line.

    The first character tells which, not the name: POPE's files, for one, are lines of objects named .json.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
            file.seek(0)
            yield from _list(path, file) if head.startswith(b"[") else _lines(path, file)
    except OSError as error:
        raise InputError(f"cannot read the data file {path}: {error.strerror}") from None


def where(path: str | Path, number: int, lines: bool) -> str:
    return f"{path} line {number}" if lines else f"{path} sample {number}"


def _lines(path: str | Path, file) -> Iterator[tuple[int, int, int, str, object]]:
    start = 0
    for number, line in enumerate(file, 1):
        text = _text(path, line, start)
        if text.strip("\ufeff \t\r\n"):
            place = where(path, number, True)
            yield start, len(line), number, place, parse(place, text.strip("\ufeff \t\r\n"))
        start += len(line)


def _list(path: str | Path, file) -> Iterator[tuple[int, int, int, str, object]]:
    """Objects of a JSON list, decoded out of a window that moves over the file."""
    decoder, window, number = json.JSONDecoder(), _Window(path, file), 0
    window.skip("\ufeff \t\r\n")
    window.take(1)  # "["
    window.skip()
    while window.next != "]":
        try:
            record, end = decoder.raw_decode(window.text, window.at)
        except json.JSONDecodeError as error:
            cut_off = error.msg.startswith("Unterminated string") or error.pos >= len(window.text) - 16
            if cut_off and not window.ended:
                window.more()
                continue
            raise InputError(f"{where(path, number, False)} is not valid JSON: {error.msg}") from None
        except RecursionError:
            place = where(path, number, False)
            raise InputError(f"{place} is not valid JSON: it is nested too deeply") from None
        if end == len(window.text) and not window.ended:  # a number may go on in the next block
            window.more()
            continue
        start = window.offset
        window.take(end - window.at)
        yield start, window.offset - start, number, where(path, number, False), record
        number += 1
        window.skip()
        if window.next == ",":
            window.take(1)
            window.skip()
        elif window.next != "]":
            place = where(path, number - 1, False)
            raise InputError(f"{place} is not followed by ',' or ']': is the file cut off?")
    window.take(1)
    window.skip()
    if window.next:
        raise InputError(f"{path} is not valid JSON: something follows its list")


class _Window:
    """The part of a file's text that is looked at: `text` from `at`, which is byte `offset` of the file."""

    def __init__(self, path: str | Path, file):
        self.path, self.file, self.text, self.at, self.offset = path, file, "", 0, 0
        self.decode, self.ended, self.read = codecs.getincrementaldecoder("utf-8")().decode, False, 0
        self.more()

    def more(self) -> None:
        """Drop what is behind and read on, as much again as there is: a long record is read few times."""
        self.text, self.at = self.text[self.at :], 0
        block = self.file.read(max(BLOCK, len(self.text)))
        self.ended = not block
        try:
            self.text += self.decode(block, final=self.ended)
        except UnicodeDecodeError as error:
            raise InputError(f"{self.path} is not UTF-8 text (near byte {self.read + error.start})") from None
        self.read += len(block)
        self.ascii = self.text.isascii()

    def take(self, n: int) -> None:
        self.offset += n if self.ascii else len(self.text[self.at : self.at + n].encode())
        self.at += n

    def skip(self, blanks: str = " \t\r\n") -> None:
        while True:
            while self.at < len(self.text) and self.text[self.at] in blanks:
                self.take(1)
            if self.at < len(self.text) or self.ended:
                return
            self.more()

    @property
    def next(self) -> str:
        return self.text[self.at : self.at + 1]


def _text(path: str | Path, data: bytes, offset: int) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 text (byte {offset + error.start}); is it a JSON file?"
        ) from None


def parse(place: str, text: str | bytes) -> object:
    try:
        return json.loads(text)
    except ValueError as error:
        raise InputError(f"{place} is not valid JSON: {error}") from None
    except RecursionError:
        raise InputError(f"{place} is not valid JSON: it is nested too deeply") from None


class Index:
    """The samples of a data file. `sizes(where, record)` checks a record and gives the last five FIELDS."""

    def __init__(self, path: str, checks: str, sizes: Callable[[str, object], tuple[int, ...]]):
        self.path, self._handle = path, None
        if not dist.is_initialized() or dist.get_rank() == 0:
            self._open(checks, sizes)
        if dist.is_initialized():
            dist.barrier()  # the others wait until it is there
        self.table, self.lines = self._open(checks, sizes)

    def _open(self, checks: str, sizes: Callable) -> tuple[torch.Tensor, bool]:
        """(samples, FIELDS) int64, mapped from the file; made first if this very data file has none."""
        try:
            status = os.stat(self.path)
        except OSError as error:
            raise InputError(f"cannot read the data file {self.path}: {error.strerror}") from None
        key = {"version": VERSION, "path": os.path.realpath(self.path), "bytes": status.st_size,
               "changed": status.st_mtime_ns, "checks": checks}  # fmt: skip
        name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
        beside = Path(self.path).resolve()
        cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "multimodal-distillation"
        places = [beside.parent / f".{beside.name}.{name}.index", cache / f"{beside.name}.{name}.index"]
        place = next((p for p in places if p.exists()), None)
        if place is None:
            place = self._make(places, sizes)
        table = torch.from_file(str(place), size=place.stat().st_size // 8, dtype=torch.int64)
        return table[1:].view(-1, len(FIELDS)), bool(table[0])

    def _make(self, places: list[Path], sizes: Callable) -> Path:
        with open(self.path, "rb") as file:
            lines = not file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
        table = array("q", [lines])
        for start, size, number, place, record in records(self.path):
            table.extend((start, size, number, *sizes(place, record)))
        for place in places:
            try:
                place.parent.mkdir(parents=True, exist_ok=True)
                writing = place.with_name(f"{place.name}.{os.getpid()}")
                with open(writing, "wb") as file:
                    table.tofile(file)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(writing, place)
            except OSError as error:
                failed = error
            else:
                for old in place.parent.glob(
                    f".{Path(self.path).name}.*.index"
                ):  # of an earlier state of the file
                    if old != place and old.stat().st_mtime_ns < os.stat(self.path).st_mtime_ns:
                        old.unlink(missing_ok=True)
                return place
        raise InputError(
            f"cannot write an index of {self.path} to {places[0]} or {places[1]}: {failed.strerror}"
        )

    def __len__(self) -> int:
        return len(self.table)

    def column(self, field: str) -> torch.Tensor:
        return self.table[:, FIELDS.index(field)]

    def read(self, i: int) -> tuple[str, object]:
        """(where it stands, the record) of sample `i`, from the file."""
        start, size, number = self.table[i, :3].tolist()
        if self._handle is None:  # pread: processes share the handle, but not its position
            self._handle = os.open(self.path, os.O_RDONLY)
        place = where(self.path, number, self.lines)
        data = os.pread(self._handle, size, start)
        if len(data) != size:
            raise InputError(f"{place}: the file became shorter while it was in use")
        return place, parse(place, data.decode().strip("\ufeff \t\r\n"))
