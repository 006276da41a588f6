"""Every command line in README.md and docs/ is one that its script reads, with torchrun's own flags too."""

import importlib
import re
import subprocess

import pytest
from conftest import ROOT
from torch.distributed.run import get_args_parser

import ckd

# The shell expands variables and joins lines. Commands only tell how they were called: there is no PATH.
TELL = r"""
torchrun() { printf '%s\x1f' torchrun "$@"; printf '\x1e'; }
python() { printf '%s\x1f' python "$@"; printf '\x1e'; }
srun() { "$@"; }
docker() { while [ "$1" != torchrun ]; do shift; done; "$@"; }
scontrol() { :; }; pip() { :; }; vllm() { :; }; head() { echo FIRST; }
SLURM_JOB_ID=7
"""


def commands() -> list[tuple[str, list[str]]]:
    """(file, words) of every call of torchrun or python in a block of shell commands or a code span."""
    found = []
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        text = path.read_text()
        blocks = re.findall(r"```bash\n(.*?)```", text, re.S)
        blocks = [block for block in blocks if "-m venv" not in block]  # those are run as they are
        blocks += re.findall(r"`((?:torchrun|python) (?:[^`\n]*\.py|-m lab)\b[^`\n]*)`", text)
        for block in blocks:
            shell = ["/bin/bash", "-c", TELL + block]
            told = subprocess.run(shell, env={"PATH": "/nowhere"}, capture_output=True, text=True, check=True)
            assert not told.stderr, (path, told.stderr)
            found += [(path.name, call.split("\x1f")[:-1]) for call in told.stdout.split("\x1e")[:-1]]
    return found


COMMANDS = commands()


@pytest.mark.parametrize("words", [c for _, c in COMMANDS], ids=[" ".join(c)[:60] for _, c in COMMANDS])
def test_a_command_is_read_by_its_script(words):
    tool, *words = words
    if tool == "torchrun":
        told = get_args_parser().parse_args(words)
        words = [told.training_script, *told.training_script_args]
    script, *flags = words[1:] if words[0] == "-m" else words
    if script == "lmms_eval":
        pytest.skip("another project's")
    script = "lab.look" if script == "data.py" else script
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    if module is ckd:
        for stage, argv in ckd.plan(*ckd.parse_args(flags)):
            stage.parse_args(argv)
    elif hasattr(module, "parse_args"):
        module.parse_args(flags)


def test_the_commands_are_all_there():
    """So that a change of the documents' form cannot empty the test above."""
    scripts = {word for _, words in COMMANDS for word in words if word.endswith(".py")}
    assert {"dpt.py", "sft.py", "dft.py", "mod_distill.py", "ckd.py", "evaluate.py"} <= scripts
    assert sum(name == "launch.md" for name, _ in COMMANDS) == 6


def test_the_diff_of_the_guide_to_forks_fits_and_is_short():
    (diff,) = re.findall(r"```diff\n(.*?)```", (ROOT / "docs/fork.md").read_text(), re.S)
    check = ["git", "apply", "--check", "-"]
    told = subprocess.run(check, input=diff, cwd=ROOT, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    changed = [line for line in diff.splitlines() if re.match(r"[+-](?![+-])", line)]
    assert len(changed) == 3 and (ROOT / "docs/forks/reverse_kl.diff").exists()
