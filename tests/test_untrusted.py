"""What comes from elsewhere is read, never run."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import new_student
from transformers import AutoProcessor

from model import Llava
from support.chat import Chat
from support.flags import InputError

ROOT = Path(__file__).parent.parent


def test_weights_that_are_no_safetensors_are_refused(checkpoints, tmp_path):
    shutil.copytree(checkpoints["small"], tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    torch.save({}, tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(InputError, match="no weights in model.safetensors; others can hold code"):
        Llava.from_checkpoint(str(tmp_path / "model"))


KINDS = "Config Model ModelForCausalLM Processor ImageProcessor FeatureExtractor Tokenizer".split()


@pytest.mark.parametrize("mine", [True, False])
@pytest.mark.parametrize("kind, file", [
    ("model", "config.json"), ("model", "processor_config.json"), ("model", "tokenizer_config.json"),
    ("model", "preprocessor_config.json"), ("vision", "config.json"), ("vision", "preprocessor_config.json"),
    ("llm", "config.json"), ("llm", "tokenizer_config.json"),
])
def test_code_beside_a_checkpoint_is_not_run(checkpoints, parts, tmp_path, monkeypatch, kind, file, mine):
    """Whatever is typed where transformers asks, and also where it has no class of its own (not `mine`)."""
    parts = {"vision": parts["vision"], "llm": parts["small"], "model": checkpoints["small"]}
    shutil.copytree(parts[kind], tmp_path / "it")
    parts |= {kind: str(tmp_path / "it")}
    for name in {file, "processor_config.json" if kind == "model" else file}:
        given = tmp_path / "it" / name
        said = json.loads(given.read_text()) if given.exists() else {}
        said["auto_map"] = {f"Auto{k}": ["evil.It"] * 2 if k == "Tokenizer" else "evil.It" for k in KINDS}
        if not mine:
            said |= {k: "Evil" for k in ("model_type", "tokenizer_class", "processor_class") if k in said}
            said["image_processor_type"] = "Evil"
        given.write_text(json.dumps(said))
    (tmp_path / "it/evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass It: pass")
    monkeypatch.setattr("builtins.input", lambda prompt: "y")
    monkeypatch.chdir(tmp_path / "it")
    try:
        Llava.from_checkpoint(parts["model"])
        new_student(parts["vision"], parts["llm"])
    except InputError as error:
        assert not mine
        assert "never run" in str(error)
    assert not (tmp_path / "ran").exists()


def test_a_chat_template_runs_in_a_sandbox(checkpoints):
    processor = AutoProcessor.from_pretrained(checkpoints["small"])
    template = "{% generation %}{{ ''.__class__.__mro__[1].__subclasses__() }}{% endgeneration %}"
    processor.chat_template = template
    with pytest.raises(InputError, match="access to attribute '__class__' of 'str' object is unsafe"):
        Chat(processor)


def test_no_file_uses_what_runs_code():
    forbidden = r"\bpickle\b|\beval\(|\bexec\(|shell=True|os\.system|trust_remote_code=(?!False)"
    forbidden += r"|Auto\w+\.from_pretrained\(\w+\)"  # would ask whether to run code
    forbidden += r"|weights_only=False|_object\(|_object_list\("  # torch.distributed's pickle
    for path in [*ROOT.glob("*.py"), *ROOT.glob("support/*.py"), *ROOT.glob("lab/*.py")]:
        text = re.sub(r"\.eval\(\)", "", path.read_text())
        assert not re.search(forbidden, text), path
