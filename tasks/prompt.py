"""A row, and how it becomes token ids: what stands around its prompt, where its reply ends."""

from functools import partial

from jinja2 import TemplateError

from configs.command_line import UserError

KEYS = ("instruction", "input", "output")
# A worse reply to the same prompt: never trained on, but compared with the output.
REJECTED = "rejected"


def prompt_text(row: dict[str, str]) -> str:
    """A row's prompt as the model reads it, without the template: what makes two rows twins."""
    return "\n".join(filter(None, (row["instruction"].strip(), row["input"].strip())))


# What a checkpoint says of a prompt template that is no tokenizer's own. One turn is what was
# trained, so several are several of them; a system message goes in front of the user's text.
JINJA = """\
{%- set ns = namespace(system='') -%}
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}
{%- set ns.system = message['content'] | trim + '\\n' -%}
{%- elif message['role'] == 'assistant' -%}
{{- ' ' + message['content'] + eos_token -}}
{%- else -%}
{{- OPENING + ns.system + message['content'] | trim + CLOSING -}}
{%- set ns.system = '' -%}
{%- endif -%}
{%- endfor -%}"""


class PromptTemplate:
    """How a row becomes token ids; `kind` is a value of `--prompt_template`.

    inst: `<s>[INST] {instruction}\\n{input} [/INST] {output}</s>`, LLaMA-2's.
    plain: the same without the marks, `<s>{instruction}\\n{input} {output}</s>`.
    chat: the tokenizer's own, with prompt_text as the user's only message and its generation
    prompt; the reply ends with its end-of-turn token.

    `<s>` and `</s>` are the tokenizer's own ids, bos only where the tokenizer adds one by itself.
    The parts are tokenised apart, so the label boundary is exact and a prompt has the same ids in
    training and generation; special tokens inside the data stay plain text. Raises `UserError`
    where the tokenizer has no chat template that can be taken apart.

    Attributes:
        bos, opening, closing: ids of what stands before and after the prompt's content.
        end: ids that end a reply, which are learned.
        stop: ids any of which ends generation.
    """

    def __init__(self, tokenizer, kind: str = "inst"):
        self.tokenizer, self.kind = tokenizer, kind
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        adds_bos = bos is not None and tokenizer("a").input_ids[:1] == [bos]
        self.bos, self.opening, self.closing, self.end = [bos] if adds_bos else [], [], [], [eos]
        # LLaMA-2's tokenizer puts a space in front of every text, byte-level BPE puts none.
        both, x, a = self._encode(["x a", "x", "a"])
        self._adds_space = both == x + a
        # Text before and after the prompt's content, and in front of a reply.
        self._head, self._tail, self._lead = "", "", " "
        if kind == "inst":
            self._head, self._tail = "[INST] ", " [/INST]"
            self.opening = self._encode(["[INST]"])[0]
            self.closing = self._encode_after_space(["[/INST]"])[0]
        elif kind == "chat":
            named = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
            self._marks = {**named, **tokenizer.get_added_vocab()}
            self._head, self._tail, self._lead, ending = self._own_parts()
            self.bos, self.opening = [], self._parse([self._head])[0]
            self.closing = self._parse(["x" + self._tail])[0][len(self._parse(["x"])[0]) :]
            self.end = self._end_of_turn(ending)
        self.stop = sorted({self.end[-1], eos})

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False, split_special_tokens=True).input_ids

    def _parse(self, texts: list[str]) -> list[list[int]]:
        """As `_encode`, but special tokens are what they stand for: of the template's own text."""
        return self.tokenizer(texts, add_special_tokens=False).input_ids

    def _encode_after_space(self, texts: list[str]) -> list[list[int]]:
        own = [text if self._adds_space and text[:1] != " " else " " + text for text in texts]
        return self._encode(own)

    def _encode_after(self, context: str, texts: list[str]) -> list[list[int]]:
        """Ids of each text as it stands behind `context`, a part of the template.

        Where special tokens tempt, or its beginning merges with the context, those of it alone.
        """
        before, alone = self._parse([context])[0], self._encode(texts)
        behind = self._parse([context + text for text in texts])
        return [
            whole[len(before) :]
            if whole[: len(before)] == before and not any(mark in text for mark in self._marks)
            else apart
            for text, whole, apart in zip(texts, behind, alone, strict=True)
        ]

    def _own_parts(self) -> tuple[str, str, str, str]:
        """The tokenizer's template around a message and its reply: head, tail, lead, ending."""
        if not self.tokenizer.chat_template:
            raise UserError(
                "--prompt_template chat: the model's tokenizer has no chat template; give inst or "
                "plain, or the chat version of the model"
            )
        asked, reply = "The user's text", "The model's reply"
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": reply}]
        render = partial(self.tokenizer.apply_chat_template, tokenize=False)
        try:
            head, tail = render(messages[:1], add_generation_prompt=True).split(asked)
            middle, ending = render(messages).split(asked)[1].split(reply)
        except (TemplateError, ValueError, TypeError, IndexError) as error:
            raise UserError(
                "--prompt_template chat: the tokenizer's chat template cannot be taken apart "
                f"({error}); give inst or plain"
            ) from error
        # Where a space stands in front of every reply it belongs to the reply, as with [/INST];
        # empty thoughts do not: no server puts them into a prompt.
        lead = middle[len(tail) :] if middle.startswith(tail) else ""
        return head, tail, "" if lead.strip() else lead, ending.strip()

    def _end_of_turn(self, ending: str) -> list[int]:
        """Ids of `ending` up to its first special token; where it has none, with eos."""
        ids = self._parse(["x" + ending])[0][len(self._parse(["x"])[0]) :]
        special = {*self._marks.values()}
        first = next((i for i, token in enumerate(ids) if token in special), None)
        return [*ids, self.tokenizer.eos_token_id] if first is None else ids[: first + 1]

    def prompts(self, rows: list[dict]) -> list[list[int]]:
        """Ids of each row's prompt with what stands before it, without bos and `closing`."""
        texts = [prompt_text(row) for row in rows]
        if self.kind == "chat":
            return [self.opening + ids for ids in self._encode_after(self._head, texts)]
        return self._encode([self._head + text for text in texts])

    def responses(self, rows: list[dict]) -> list[list[int]]:
        """Ids of each row's output and `end`; [] where the output is empty."""
        # A leading-space strip would break indented code.
        outputs = [row["output"].lstrip("\r\n").rstrip() for row in rows]
        if self.kind == "chat":
            encoded = self._encode_after(self._tail, [self._lead + text for text in outputs])
        else:
            encoded = self._encode_after_space(outputs)
        return [ids + self.end if text else [] for text, ids in zip(outputs, encoded, strict=True)]

    def join(self, prompt: list[int], room: int) -> list[int]:
        """bos, `prompt` and `closing` in at most `room` tokens.

        The prompt's end gives way, but what stands around it stays whole even beyond `room`.
        """
        room = max(room - len(self.bos) - len(self.closing), len(self.opening))
        # A model has to start from something.
        return self.bos + prompt[:room] + self.closing or self.end

    def chat_template(self) -> str:
        """Jinja with which `apply_chat_template` gives the ids of our prompts."""
        if self.kind == "chat":
            return self.tokenizer.get_chat_template()
        head = self._head
        if self.bos:
            # Behind a special token some tokenizers put no space of their own in front of a text.
            bos, (row,) = self.tokenizer.bos_token, [{"instruction": "a", "input": ""}]
            wanted = self.join(self.prompts([row])[0], 10**6)
            text = f"{bos}{head}a{self._tail}"
            head = head if self._parse([text])[0] == wanted else " " + head
        opening = ("bos_token + " if self.bos else "") + repr(head)
        return JINJA.replace("OPENING", opening).replace("CLOSING", repr(self._tail))
