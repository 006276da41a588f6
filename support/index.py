"""A data file of any size, read one sample at a time through an index on disk.

The index is made once for a file, by one process, and lies beside it (or, if nothing can be written there, in
the user's cache folder): the samples as lines, and a table of where each line stands and how large the sample
is. After that no process holds more than the samples that it works on.
"""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from support.flags import InputError

VERSION = 2
BLANK = b"\xef\xbb\xbf \t\r\n"  # a byte order mark is no data
Measure = Callable[[str, object], tuple[int, ...]]


def records(path: str | Path) -> Iterator[tuple[str, object]]:
    """(its place, the record) for every record of a JSON list, or of a file with one on each line.

    The first character tells which, not the name: POPE's files, for one, are lines and named .json.
    """
    try:
        with open(path, "rb") as file:
            begins_a_list = file.read(4096).lstrip(BLANK).startswith(b"[")
            file.seek(0)
            if begins_a_list:
                for number, record in enumerate(parse(str(path), file.read())):
                    yield f"{path} sample {number}", record
            else:
                for number, line in enumerate(file, 1):
                    if line.strip(BLANK):
                        yield f"{path} line {number}", parse(f"{path} line {number}", line)
    except OSError as error:
        raise InputError(f"cannot read the data file {path}: {error.strerror}") from None


def parse(place: str, text: bytes) -> object:
    try:
        return json.loads(text.strip(BLANK).decode())
    except UnicodeDecodeError as error:
        raise InputError(f"{place} is not UTF-8 text (byte {error.start}); is it a JSON file?") from None
    except ValueError as error:
        raise InputError(f"{place} is not valid JSON: {error}") from None
    except RecursionError:
        raise InputError(f"{place} is not valid JSON: it is nested too deeply") from None


class Index:
    """The samples of a data file, and `sizes` (samples, width): what `measure` says of each.

    `measure(place, record)` also checks the record. `checks` names what that depends on: an index that was
    made under other checks is not used.
    """

    def __init__(self, path: str, checks: str, width: int, measure: Measure):
        self.path, self._lines = Path(path), None
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:
            self._place(checks, measure)
        if dist.is_initialized():
            dist.barrier()  # the other ranks of this machine wait until it is there
        self.place = self._place(checks, measure)
        table = torch.from_file(str(self.place), size=self.place.stat().st_size // 8, dtype=torch.int64)
        self.sizes, self._spans = table.view(-1, width + 2).tensor_split([width], dim=1)

    def _place(self, checks: str, measure: Measure) -> Path:
        """Where the index is; it is made first if this very file has none."""
        try:
            status, real = os.stat(self.path), self.path.resolve()
        except OSError as error:
            raise InputError(f"cannot read the data file {self.path}: {error.strerror}") from None
        key = json.dumps([VERSION, str(real), status.st_size, status.st_mtime_ns, checks])
        name = f".{real.name}.{hashlib.sha256(key.encode()).hexdigest()[:16]}.index"
        cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "multimodal-distillation"
        places = [real.parent / name, cache / name]
        for place in places:
            if place.exists():
                return place
        for place in places:
            try:
                place.parent.mkdir(parents=True, exist_ok=True)
                self._make(place, measure)
            except OSError as error:
                failed = error
                continue
            for old in place.parent.glob(f".{real.name}.*"):
                if old.suffix in (".index", ".lines") and old.stat().st_mtime_ns < status.st_mtime_ns:
                    old.unlink(missing_ok=True)  # of an earlier state of the file
            return place
        raise InputError(f"cannot write an index of {real} to {real.parent} or {cache}: {failed.strerror}")

    def _make(self, place: Path, measure: Measure) -> None:
        table, start = array("q"), 0
        files = place.with_suffix(".lines"), place
        writing = [file.with_name(f"{file.name}.{os.getpid()}") for file in files]
        try:
            with open(writing[0], "wb") as lines, open(writing[1], "wb") as index:
                for where, record in records(self.path):
                    line = json.dumps([where.removeprefix(str(self.path)), record]).encode() + b"\n"
                    table.extend((*measure(where, record), start, len(line)))
                    start += lines.write(line)
                if not table:
                    raise InputError(f"{self.path} holds no sample")
                table.tofile(index)
                for file in lines, index:
                    file.flush()
                    os.fsync(file.fileno())
            for temporary, file in zip(writing, files):
                os.replace(temporary, file)
        finally:
            for file in writing:
                file.unlink(missing_ok=True)

    def read(self, i: int) -> tuple[str, object]:
        """(its place in the data file, the record) of sample `i`."""
        start, size = self._spans[i].tolist()
        if self._lines is None:  # pread: data processes share the open file, but not its position
            self._lines = os.open(self.place.with_suffix(".lines"), os.O_RDONLY)
        where, record = json.loads(os.pread(self._lines, size, start))
        return f"{self.path}{where}", record
