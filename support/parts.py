"""A new student of a pre-trained vision tower and language model, which may follow its teacher; its flags."""

import copy
from argparse import ArgumentParser

import torch
import transformers as hf
from torch import nn
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from support.chat import CHAT_TEMPLATE, IMAGE_TOKEN, Chat
from support.checkpoints import check_processor, check_tower, check_vocabularies, complete, kind_of
from support.checkpoints import load_stock, loading, read_config
from support.flags import add_flags, require


def add_student_flags(parser: ArgumentParser, llm: str) -> None:
    """What the student is made of, where a stage may begin with a new one; `llm` names the paper's."""
    add_flags(parser, "student", [
        ("--vision", str, None, "vision tower of a new student, hub name or folder; SigLIP-so400m-384"),
        ("--llm", str, None, f"language model of a new student, hub name or folder; paper: {llm}"),
        ("--student", str, None, "LLaVA checkpoint that is trained, instead of --vision and --llm"),
        ("--template", ("teacher", "own"), "teacher", "whose chat template, tokenizer and image "
         "preparation a new student has; without a teacher this project's own"),
    ])


def new_llava(vision: str, llm: str, teacher: str | None = None) -> tuple[nn.Module, hf.LlavaProcessor]:
    """A stock LLaVA of both parts (hub names or folders) with a fresh projector, and its processor.

    A teacher (a LLaVA checkpoint) gives it tokenizer and chat template and, for a tower of the same kind,
    mean and std, how images are prepared and which layer is read; else layer -2 as LLaVA, all patches, this
    project's template.
    """
    with loading("--vision", vision):
        tower_config = read_config(vision)
        tower_config = getattr(tower_config, "vision_config", tower_config)  # the image half of a SigLIP
        check_tower(vision, tower_config)
        tower_config.vision_use_head = False  # the pooling head is never read
        tower = complete(vision, hf.AutoModel, config=tower_config)
        image_processor = hf.AutoImageProcessor.from_pretrained(vision, trust_remote_code=False)
    with loading("--llm", llm):
        read_config(llm)
        language = complete(llm, hf.AutoModelForCausalLM)
        tokenizer = own = hf.AutoTokenizer.from_pretrained(llm, trust_remote_code=False)
        check_head(llm, language)
    template, layer, has_cls = CHAT_TEMPLATE, -2, hasattr(tower.embeddings, "class_embedding")  # CLIP has one
    select = "default" if has_cls else "full"  # "default" drops it; of SigLIP all tokens are patches
    if teacher:
        theirs, processor = load_stock(teacher, torch.float32, weights=False)
        tokenizer, template = processor.tokenizer, Chat(processor).template
        check_vocabularies((llm, own), (teacher, tokenizer))
        a, b = ((p.image_mean, p.image_std) for p in (processor.image_processor, image_processor))
        if a == b and kind_of(theirs.config.vision_config) == kind_of(tower_config):
            image_processor = processor.image_processor
            n = tower_config.num_hidden_layers  # a published tower may end where it is read
            read = theirs.config.vision_feature_layer % (theirs.config.vision_config.num_hidden_layers + 1)
            layer = min(read, n) - n - 1
            select = theirs.config.vision_feature_select_strategy
    else:
        tokenizer.add_tokens(hf.AddedToken(IMAGE_TOKEN, special=True, normalized=False))
    tokenizer.chat_template = template
    n_ids = max(tokenizer.get_vocab().values()) + 1
    if n_ids > language.config.vocab_size:  # Qwen's padding rows have room; others may not
        language.resize_token_embeddings(n_ids, pad_to_multiple_of=64)
    config = hf.LlavaConfig(  # of copies: it would reset the attention of the configs it is given
        vision_config=copy.deepcopy(tower_config), text_config=copy.deepcopy(language.config),
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN), projector_hidden_act="gelu",
        image_seq_length=(tower_config.image_size // tower_config.patch_size) ** 2,
        vision_feature_layer=layer, vision_feature_select_strategy=select,
        tie_word_embeddings=language.config.tie_word_embeddings,
    )
    processor = hf.LlavaProcessor(
        image_processor, tokenizer, patch_size=tower_config.patch_size, chat_template=template,
        vision_feature_select_strategy=select, num_additional_image_tokens=int(has_cls),
    )
    check_processor(vision, processor, config)
    with torch.device("meta"):
        llava = hf.LlavaForConditionalGeneration(config)
    llava.model.vision_tower, llava.model.language_model = tower, language.model
    llava.lm_head = language.lm_head
    llava.model.multi_modal_projector = LlavaMultiModalProjector(config)  # two layers with a GELU between
    return llava, processor


def check_head(path: str, language: nn.Module) -> None:
    """Refuse a language model whose logits are not h W^T of its head's weight W: all losses rely on that."""
    body = language.base_model
    with torch.no_grad():
        x = body.embed_tokens(torch.arange(16).view(1, 8, 2)).mean(2)  # no token's, as H_v is none's
        want = language(inputs_embeds=x).logits
        got = body(inputs_embeds=x).last_hidden_state @ language.lm_head.weight.T
    off = (want - got).abs().max().item()
    more = f"its logits differ by up to {off:.3g} from hidden state times head: a bias, a cap or a scale"
    require(off <= 1e-3 * max(want.abs().max().item(), 1.0), f"{path} cannot be a student: {more}")
