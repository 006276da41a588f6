"""The project's modules imported anew, from here or from a changed copy; DFT as it is there."""

import contextlib
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PROJECT = {path.stem for path in ROOT.glob("*.py")} | {"support", "lab"}


@contextlib.contextmanager
def imports_of(tree: str) -> Iterator[None]:
    """Inside, `import dft` and all that it imports come from `tree`; afterwards all is as it was."""
    ours = lambda: [name for name in sys.modules if name.split(".")[0] in PROJECT]
    before = {name: sys.modules.pop(name) for name in ours()}
    sys.path.insert(0, tree)
    try:
        yield
    finally:
        sys.path.remove(tree)
        for name in ours():
            del sys.modules[name]
        sys.modules.update(before)


def train(tree: str, argv: list[str], few_rows: bool) -> None:
    """Run the DFT of `tree`; with `few_rows`, losses see nine rows at a time, as for a large vocabulary."""
    with imports_of(tree):
        dft = importlib.import_module("dft")
        assert Path(dft.__file__).parent == Path(tree)
        if few_rows:
            importlib.import_module("support.chunks").CHUNK = 1 << 12
        dft.main(argv)
