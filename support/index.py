"""A data file of any size, read one sample at a time through an index on disk.

The index is made once for a file, by one process, in the user's cache folder: the samples as lines, and a
table of where each line stands and how large the sample is. After that no process holds more than the samples
that it works on.
"""

import hashlib
import json
import os
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from support.flags import InputError, require

BLANK = b"\xef\xbb\xbf \t\r\n"  # a byte order mark is no data
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "multimodal-distillation"
Measure = Callable[[str, object], tuple[int, ...]]


def records(path: str | Path) -> Iterator[tuple[str, object]]:
    """(its place, the record) for every record of a JSON list, or of a file with one on each line.

    The first character tells which, not the name: POPE's files, for one, are lines and named .json.
    """
    try:
        with open(path, "rb") as file:
            is_list = file.read(4096).lstrip(BLANK).startswith(b"[")
            file.seek(0)
            if is_list:
                yield from ((f"{path} sample {k}", r) for k, r in enumerate(parse(f"{path}", file.read())))
                return
            for number, line in enumerate(file, 1):
                if line.strip(BLANK):
                    yield f"{path} line {number}", parse(f"{path} line {number}", line)
    except OSError as error:
        raise InputError(f"cannot read the data file {path}: {error.strerror}") from None


def parse(place: str, text: bytes) -> object:
    try:
        return json.loads(text.strip(BLANK).decode())
    except (ValueError, RecursionError) as error:  # also where it is not UTF-8
        raise InputError(f"{place} is not valid JSON: {error}") from None


class Index:
    """The samples of a data file, and `sizes` (samples, width): what `measure` says of each.

    `measure(place, record)` also checks the record. `checks` names what that depends on: an index that was
    made under other checks is not used.
    """

    def __init__(self, path: str, checks: str, width: int, measure: Measure):
        self.path, self._lines = Path(path), None
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:
            self._find_or_make(checks, measure)
        if dist.is_initialized():
            dist.barrier()  # the other ranks of this machine wait until it is there
        self.place = self._find_or_make(checks, measure)
        table = torch.from_file(str(self.place), size=self.place.stat().st_size // 8, dtype=torch.int64)
        self.sizes, self._spans = table.view(-1, width + 2).tensor_split([width], dim=1)

    def _find_or_make(self, checks: str, measure: Measure) -> Path:
        try:
            real, status = self.path.resolve(), os.stat(self.path)
        except OSError as error:
            raise InputError(f"cannot read the data file {self.path}: {error.strerror}") from None
        key = json.dumps([2, str(real), status.st_size, status.st_mtime_ns, checks])
        place = CACHE / f"{real.name}.{hashlib.sha256(key.encode()).hexdigest()[:16]}.index"
        if place.exists():
            return place
        try:
            CACHE.mkdir(parents=True, exist_ok=True)
            self._make(place, measure)
        except OSError as error:
            advice = "point XDG_CACHE_HOME to a folder with room"
            raise InputError(
                f"cannot write an index of {real} to {CACHE}: {error.strerror}; {advice}"
            ) from None
        return place

    def _make(self, place: Path, measure: Measure) -> None:
        table, start, files = array("q"), 0, (place.with_suffix(".lines"), place)
        beside = [file.with_name(f"{file.name}.{os.getpid()}") for file in files]
        try:
            with open(beside[0], "wb") as lines, open(beside[1], "wb") as index:
                for where, record in records(self.path):
                    line = json.dumps([where.removeprefix(f"{self.path}"), record]).encode() + b"\n"
                    table.extend((*measure(where, record), start, len(line)))
                    start += lines.write(line)
                require(len(table) > 0, f"{self.path} holds no sample")
                table.tofile(index)
            for written, file in zip(beside, files):
                os.replace(written, file)
        finally:
            for file in beside:
                file.unlink(missing_ok=True)

    def read(self, i: int) -> tuple[str, object]:
        """(its place in the data file, the record) of sample `i`."""
        start, size = self._spans[i].tolist()
        if self._lines is None:  # pread: data processes share the open file, but not its position
            self._lines = os.open(self.place.with_suffix(".lines"), os.O_RDONLY)
        where, record = json.loads(os.pread(self._lines, size, start))
        return f"{self.path}{where}", record
