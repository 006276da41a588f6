"""Conversations -> token ids, by the checkpoint's own chat template, and which tokens are learned.

For every answer: the template's rendering with `add_generation_prompt`, the answer, and the end that the
template puts behind it. So prompts in training, in evaluate.py and of stock `apply_chat_template` are the
same ids. Published templates do not mark what is generated, or leave the end token outside of it.
"""

import re

import transformers as hf

from support.flags import InputError, require

IMAGE_TOKEN = "<image>"
IGNORE = -100  # the target of a position whose next token is given, not predicted

# For new students that do not take their teacher's. Its prompt ends with "ASSISTANT:", and the space after it
# belongs to the answer: behind "ASSISTANT: " a BPE would merge it into the first answer token when training.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
    {%- set said = message.content -%}
    {%- set parts = [{'type': 'text', 'text': said}] if said is string else said -%}
    {%- set text = parts | selectattr('type', 'equalto', 'text') | map(attribute='text') | join -%}
    {%- set images = '<image>\\n' * (parts | selectattr('type', 'equalto', 'image') | list | length) -%}
    {%- if message.role == 'assistant' -%}
        {{ 'ASSISTANT:' }}{% generation %}{{ ' ' + text + eos_token }}{% endgeneration %}
    {%- else -%}{{ ('USER: ' if message.role == 'user' else '') + images + text + ' ' }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}
"""


def turn(role: str, text: str, images: int = 0, learned: bool = True) -> dict:
    """A message as chat templates take it, its images first; of all turns only answers can be learned."""
    content = [{"type": "image"}] * images + [{"type": "text", "text": text}]
    return {"role": role, "content": content, "learned": learned and role == "assistant"}


# What teacher and student must write alike.
PROBE = [turn("user", "What is this?", 1), turn("assistant", "A cat."),
         turn("user", "Why?"), turn("assistant", "It purrs.")]


class Chat:
    """What a checkpoint's template and tokenizer make of a conversation."""

    def __init__(self, processor: hf.ProcessorMixin):
        self.tokenizer = tokenizer = processor.tokenizer
        self.template = getattr(processor, "chat_template", None) or tokenizer.chat_template
        where, eos = f"the checkpoint {tokenizer.name_or_path}", tokenizer.eos_token
        require(isinstance(self.template, str), f"{where} has no chat template, or several; save it with one")
        require(eos is not None, f"{where} has no end token: set eos_token in its tokenizer_config.json")
        # What stands between prompt and answer and behind the answer, from texts that can be found again. Of
        # two lines each: a template that takes a text and is given a list of parts prints it as Python does.
        question, word = "Two\nlines", "Answer\nword"
        asked = self.render([turn("user", question)], ask=True)
        told = self.render([turn("user", question), turn("assistant", word)])
        before, found, behind = told.partition(word)
        advice = "it must write the texts of a list of parts, as the templates of llava-hf's checkpoints do"
        require(question in asked, f"{where} has a chat template that asks no question: {asked!r}; {advice}")
        require(found, f"{where} has a chat template that leaves the answer out: {told!r}; {advice}")
        bare = tokenizer(asked, add_special_tokens=False)["input_ids"]
        more = "take that out of the post_processor in its tokenizer.json: the answer comes next"
        require(self.ids(asked)[-1] == bare[-1], f"{where} puts an end token behind every text; {more}")
        self.lead = before.removeprefix(asked) if before.startswith(asked) else ""
        special = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special} | {eos}
        # The end token may be missing in the template ("USER: .. ASSISTANT: .. USER: .."): then it is learned
        # as the target of the answer's last token, and does not stand in the sequence.
        end = min((t for t in special if t in behind), key=behind.find, default="")
        size = behind.find(end) + len(end)
        self.end, self.rest = behind[:size], behind[size:]
        self.end_id = tokenizer.convert_tokens_to_ids(end or eos)

    def render(self, messages: list[dict], ask: bool = False) -> str:
        """The template's text; `ask`: with the prompt of the answer that comes next."""
        where = f"the chat template of {self.tokenizer.name_or_path}"
        options = {"chat_template": self.template, "tokenize": False, "add_generation_prompt": ask}
        try:
            text = self.tokenizer.apply_chat_template(messages, **options)
        except Exception as error:  # whatever Jinja, or the template by itself, raises
            raise InputError(f"{where} cannot write a conversation: {str(error)[:200]}") from None
        n = sum(part["type"] == "image" for m in messages for part in m["content"])
        require(text.count(IMAGE_TOKEN) >= n, f"{where} leaves an image out: {text[:200]!r}")
        return text

    def begins(self, text: str) -> bool:
        """Whether the tokenizer's own begin token must be added, as stock processors do."""
        return not (self.tokenizer.bos_token and text.startswith(self.tokenizer.bos_token))

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=self.begins(text))["input_ids"]

    def encode(self, messages: list[dict], last_only: bool = False) -> tuple[list[int], list[int]]:
        """(token ids, y): at each position the next token where that is learned, else IGNORE.

        Learned are all answers (or the last) that may be, and their end tokens; what follows is left out.
        """
        text, told, ids, y = "", "", [], []
        for k, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            asked = self.render(messages[:k], ask=True)
            why = " (it writes <think> before the last answer alone)" * ("<think>" in told)
            parts = f"the chat template{why} must go on from {told[:200]!r}, not from {asked[:200]!r}"
            require(asked.startswith(told), f"{parts}; a new student may take --template own")
            said = [m["content"][-1]["text"] for m in messages[k - 1 if told else 0 : k]]
            stands = re.search(".*".join(map(re.escape, said)), asked[len(told) :], re.DOTALL)
            left_out = f"the chat template leaves out a turn of {str(said)[:200]}"
            require(stands, f"{left_out}; take it out of the data, or --template own for a new student")
            prompt = text + asked[len(told) :]
            text = prompt + self.lead + message["content"][-1]["text"] + self.end
            before, given, ids = ids, self.ids(prompt), self.ids(text)
            apart = given[: len(before)] == before and ids[: len(given)] == given
            why = "; the prompt ends with a blank: take --template own" * prompt.endswith(" ")
            require(apart, f"the tokenizer joins an answer with the text beside it in {text[-200:]!r}{why}")
            y += [IGNORE] * (len(ids) - len(y))
            if message["learned"] and (message is messages[-1] or not last_only):
                y[len(given) - 1 :] = [*ids[len(given) :], IGNORE if self.end else self.end_id]
            if k + 1 < len(messages):
                text, told = text + self.rest, self.render(messages[: k + 1])
        return ids, y

    def caption(self, messages: list[dict]) -> tuple[list[int], list[int]]:
        """As LLaVA's pre-training: the images and the answers, without the questions and the template."""
        text = " ".join(m["content"][-1]["text"] for m in messages if m["learned"])
        n = sum(part["type"] == "image" for m in messages for part in m["content"])
        given = self.ids("") + [self.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)] * n
        learned = [*self.tokenizer(text, add_special_tokens=False)["input_ids"], self.end_id]
        return given + learned, [*([IGNORE] * len(given) + learned)[1:], IGNORE]
