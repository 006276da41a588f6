"""A data file of any size, read one sample at a time through an index on disk.

The index is made once for a file, by one process, in the user's cache folder: the samples as lines, and a
table of where each line stands and how large the sample is. No process holds more than what it works on.
"""

import hashlib
import json
import os
import shutil
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from support.flags import InputError, require

BLANK = b"\xef\xbb\xbf \t\r\n"  # a byte order mark is no data
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "multimodal-distillation"


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

    def __init__(self, path: str, checks: str, width: int, measure: Callable[[str, object], tuple[int, ...]]):
        self.path, self._lines = path, None
        try:
            real, status = os.path.realpath(path), os.stat(path)
        except OSError as error:
            raise InputError(f"cannot read the data file {path}: {error.strerror}") from None
        key = json.dumps([2, real, status.st_size, status.st_mtime_ns, checks])
        name = f"{os.path.basename(real)}.{hashlib.sha256(key.encode()).hexdigest()[:16]}"
        self.place = CACHE / name
        if int(os.environ.get("LOCAL_RANK", 0)) == 0 and not self.place.exists():
            try:
                self._make(measure)
            except OSError as error:
                advice = f"{error.strerror}; point XDG_CACHE_HOME to a folder with room"
                raise InputError(f"cannot write an index of {path} to {CACHE}: {advice}") from None
        if dist.is_initialized():
            dist.barrier()  # the other ranks of this machine wait until it is there
        size = (self.place / "table").stat().st_size // 8
        table = torch.from_file(str(self.place / "table"), size=size, dtype=torch.int64)
        self.sizes, self._spans = table.view(-1, width + 2).tensor_split([width], dim=1)

    def _make(self, measure: Callable[[str, object], tuple[int, ...]]) -> None:
        beside, table, start = self.place.with_name(f"{self.place.name}.{os.getpid()}"), array("q"), 0
        beside.mkdir(parents=True, exist_ok=True)
        try:
            with open(beside / "lines", "wb") as lines:
                for where, record in records(self.path):
                    line = json.dumps([where.removeprefix(self.path), record]).encode() + b"\n"
                    table.extend((*measure(where, record), start, len(line)))
                    start += lines.write(line)
            require(table, f"{self.path} holds no sample")
            (beside / "table").write_bytes(table.tobytes())
            beside.rename(self.place)
        finally:
            shutil.rmtree(beside, ignore_errors=True)

    def read(self, i: int) -> tuple[str, object]:
        """(its place in the data file, the record) of sample `i`."""
        start, size = self._spans[i].tolist()
        if self._lines is None:  # pread: data processes share the open file, but not its position
            self._lines = os.open(self.place / "lines", os.O_RDONLY)
        where, record = json.loads(os.pread(self._lines, size, start))
        return f"{self.path}{where}", record
