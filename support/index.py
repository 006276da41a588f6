"""A data file of any size, read one sample at a time through an index on disk.

The index is made once for a file, by one process, in the user's cache folder: the samples as lines, and a
table of where each line stands and how large the sample is. No process holds more than what it works on.
"""

import hashlib
import json
import os
import tempfile
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from support.flags import InputError, require
from support.run import fingerprint

BLANK = b"\xef\xbb\xbf \t\r\n"  # a byte order mark is no data
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "multimodal-distillation"


def records(path: str | Path, skip_bad: bool = False) -> Iterator[tuple[str, object]]:
    """(its place, the record) for every record of a JSON list, or of a file with one on each line. The first
    character tells which, not the name: POPE's files, for one, are lines and named .json. With `skip_bad` an
    InputError takes the place of a line that is no JSON.
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
                    place = f"{path} line {number}"
                    yield place, parse(place, line, skip_bad)
    except OSError as error:
        raise InputError(f"cannot read the data file {path}: {error.strerror}") from None


def parse(place: str, text: bytes, skip_bad: bool = False) -> object:
    try:
        return json.loads(text.strip(BLANK).decode())
    except (ValueError, RecursionError) as error:  # also where it is not UTF-8
        wanted = "wanted are a list of samples, or one sample on each line, unpacked; not a list of files"
        problem = InputError(f"{place} is not valid JSON: {error}; {wanted}")
    if not skip_bad:
        raise problem
    return problem


class Index:
    """The samples of a data file, and `sizes` (samples, width): what `measure` says of each.

    `measure(place, record)` also checks the record: the first InputError is the index's own, or with
    `skip_bad` all of them are kept in `bad` and their samples left out. `checks` names what `measure` depends
    on: an index that was made under other checks, or by another checks.py, is not used.
    """

    def __init__(self, path: str, checks: str, width: int, measure: Callable[[str, object], tuple[int, ...]],
                 skip_bad: bool = False):
        self.path, self.skip_bad = path, skip_bad
        require(CACHE.parts[0] != "~", f"no home for an index of {path}: set XDG_CACHE_HOME to a folder")
        first = not dist.is_initialized() or int(os.environ.get("LOCAL_RANK", 0)) == 0  # on this machine
        try:
            real, edited = Path(path).resolve(), os.stat(path).st_mtime_ns
            code = fingerprint(str(Path(__file__).with_name("checks.py")))
            key = json.dumps([7, code, str(real), fingerprint(path), edited, checks, skip_bad])
            self.place = CACHE / f"{real.name}.{hashlib.sha256(key.encode()).hexdigest()[:16]}"
            if first and not self.place.exists():
                self._make(measure)
        except OSError as error:
            index = f"an index of it in {CACHE}, for which XDG_CACHE_HOME may name a folder with room"
            raise InputError(f"cannot read the data file {path}, or make {index}: {error}") from None
        if dist.is_initialized():
            dist.barrier()  # the other ranks of this machine wait until it is there
        table, self.bad = torch.load(self.place / "table", weights_only=True, mmap=True)
        self.sizes, self._spans = table.view(-1, width + 2).tensor_split([width], dim=1)

    def _make(self, measure: Callable[[str, object], tuple[int, ...]]) -> None:
        CACHE.mkdir(parents=True, exist_ok=True)
        table, start, bad = array("q"), 0, []
        with tempfile.TemporaryDirectory(prefix=f"{self.place.name}.", dir=CACHE) as folder:
            beside = Path(folder)
            with open(beside / "lines", "wb") as lines:
                for where, record in records(self.path, self.skip_bad):
                    try:
                        if isinstance(record, InputError):
                            raise record
                        measured = measure(where, record)
                    except InputError as error:
                        if not self.skip_bad:
                            raise
                        bad.append(str(error))
                        continue
                    line = json.dumps([where.removeprefix(self.path), record]).encode() + b"\n"
                    table.extend((*measured, start, len(line)))
                    start += lines.write(line)
            require(table, "; ".join([f"{self.path} holds no sample that can be used", *bad[:1]]))
            torch.save((torch.frombuffer(table, dtype=torch.int64), bad), beside / "table")
            beside.chmod(0o755)
            try:
                beside.rename(self.place)
            except OSError:
                if not self.place.exists():  # another node may have been faster
                    raise

    def read(self, i: int) -> tuple[str, object]:
        """(its place in the data file, the record) of sample `i`."""
        start, size = self._spans[i].tolist()
        with open(self.place / "lines", "rb") as lines:
            lines.seek(start)
            where, record = json.loads(lines.read(size))
        return f"{self.path}{where}", record
