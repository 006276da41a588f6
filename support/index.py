"""A data file of any size, read one sample at a time through an index on disk.

The index is made once for a file, by one process, in the user's cache folder: the samples as lines, and a
table of where each line stands and how large the sample is. No process holds more than what it works on.
"""

import hashlib
import json
import os
import shutil
import tempfile
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from support.flags import InputError, require

BLANK = b"\xef\xbb\xbf \t\r\n"  # a byte order mark is no data
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "multimodal-distillation"


def records(path: str | Path, skip_bad: bool = False) -> Iterator[tuple[str, object]]:
    """(its place, the record) for every record of a JSON list, or of a file with one on each line.

    The first character tells which, not the name: POPE's files, for one, are lines and named .json. With
    `skip_bad` a line that is no JSON does not end it: the InputError takes the place of its record.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(4096).lstrip(BLANK)
            file.seek(0)
            if start.startswith(b"["):
                yield from ((f"{path} sample {k}", r) for k, r in enumerate(parse(f"{path}", file.read())))
                return
            whole = "one JSON object over several lines" if start.startswith(b"{") else "no JSON"
            wanted = f"{path} begins with {whole}; wanted are a list of samples, or one sample on each line"
            for number, line in enumerate(file, 1):
                if line.strip(BLANK):
                    try:
                        record = parse(f"{path} line {number}", line)
                    except InputError as error:
                        record = InputError(f"{error}; {wanted}") if number == 1 else error
                        if not skip_bad:
                            raise record from None
                    yield f"{path} line {number}", record
    except OSError as error:
        raise InputError(f"cannot read the data file {path}: {error.strerror}") from None


def parse(place: str, text: bytes) -> object:
    try:
        return json.loads(text.strip(BLANK).decode())
    except (ValueError, RecursionError) as error:  # also where it is not UTF-8
        raise InputError(f"{place} is not valid JSON: {error}") from None


class Index:
    """The samples of a data file, and `sizes` (samples, width): what `measure` says of each.

    `measure(place, record)` also checks the record: the first InputError is the index's own, or with
    `skip_bad` all of them are kept in `bad` and their samples left out. `checks` names what `measure` depends
    on: an index that was made under other checks is not used.
    """

    def __init__(self, path: str, checks: str, width: int, measure: Callable[[str, object], tuple[int, ...]],
                 skip_bad: bool = False):
        self.path, self.skip_bad, self._lines = path, skip_bad, None
        try:
            real, status = os.path.realpath(path), os.stat(path)
        except OSError as error:
            raise InputError(f"cannot read the data file {path}: {error.strerror}") from None
        key = json.dumps([3, real, status.st_size, status.st_mtime_ns, checks, skip_bad])
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
        self.bad = json.loads((self.place / "bad").read_text())

    def _make(self, measure: Callable[[str, object], tuple[int, ...]]) -> None:
        CACHE.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f"{self.place.name}.", dir=CACHE))  # nodes may share the cache
        table, start, bad = array("q"), 0, []
        try:
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
            all_bad = f"{self.path} holds no sample that can be used; the first: {bad[:1]}"
            require(table, all_bad if bad else f"{self.path} holds no sample")
            (beside / "table").write_bytes(table.tobytes())
            (beside / "bad").write_text(json.dumps(bad))
            beside.chmod(0o755)
            try:
                beside.rename(self.place)
            except OSError:
                if not self.place.exists():  # another node may have been faster
                    raise
        finally:
            shutil.rmtree(beside, ignore_errors=True)

    def read(self, i: int) -> tuple[str, object]:
        """(its place in the data file, the record) of sample `i`."""
        start, size = self._spans[i].tolist()
        if self._lines is None:  # pread: data processes share the open file, but not its position
            self._lines = os.open(self.place / "lines", os.O_RDONLY)
        where, record = json.loads(os.pread(self._lines, size, start))
        return f"{self.path}{where}", record
