"""What comes from elsewhere is read, never run."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoProcessor

from model import Llava
from support.chat import Chat
from support.flags import InputError

ROOT = Path(__file__).parent.parent


def test_weights_that_are_no_safetensors_are_refused(checkpoints, tmp_path):
    shutil.copytree(checkpoints["small"], tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    torch.save({}, tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(InputError, match="cannot load the checkpoint .*safetensors"):
        Llava.from_checkpoint(str(tmp_path / "model"))


def test_code_beside_a_checkpoint_is_not_run(checkpoints, tmp_path):
    shutil.copytree(checkpoints["small"], tmp_path / "model")
    text = (tmp_path / "model" / "config.json").read_text()
    auto = '"auto_map": {"AutoConfig": "evil.Config"}, "model_type": "evil"'
    (tmp_path / "model" / "config.json").write_text(text.replace('"model_type": "llava"', auto))
    (tmp_path / "model" / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(InputError, match="cannot load the checkpoint"):
        Llava.from_checkpoint(str(tmp_path / "model"))
    assert not (tmp_path / "ran").exists()


def test_a_chat_template_runs_in_a_sandbox(checkpoints):
    processor = AutoProcessor.from_pretrained(checkpoints["small"])
    template = "{% generation %}{{ ''.__class__.__mro__[1].__subclasses__() }}{% endgeneration %}"
    processor.chat_template = template
    with pytest.raises(InputError, match="access to attribute '__class__' of 'str' object is unsafe"):
        Chat(processor)


def test_no_file_uses_what_runs_code():
    forbidden = r"\bpickle\b|\beval\(|\bexec\(|shell=True|os\.system|trust_remote_code|weights_only=False"
    forbidden += r"|_object\(|_object_list\("  # torch.distributed's pickle
    for path in [*ROOT.glob("*.py"), *ROOT.glob("support/*.py"), *ROOT.glob("lab/*.py")]:
        text = re.sub(r"\.eval\(\)", "", path.read_text())
        assert not re.search(forbidden, text), path
