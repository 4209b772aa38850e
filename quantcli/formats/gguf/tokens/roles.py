"""What special tokens are for: the ids of their roles, which of them begin and end a text, and where llama.cpp stops or fills in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from gguf import GGUFWriter

ROLE_NAMES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
KEYS = {"unk": "unknown", "sep": "seperator", "pad": "padding"}
"""Roles whose key has another name (and llama.cpp's spelling)."""

TOKENS_OF_FAMILIES: Mapping[str, Mapping[str, str]] = {
    "chatglm": {"eos": "<|endoftext|>", "eot": "<|user|>", "unk": "<|endoftext|>"},
    "glm4": {"eos": "<|endoftext|>", "eot": "<|user|>", "unk": "<|endoftext|>", "bos": "<|endoftext|>"},
    "glm4moe": {"bos": "[gMASK]", "eot": "<|user|>", "unk": "<|endoftext|>", "eom": "<|observation|>"},
    "gemma": {"eot": "<end_of_turn>"},
    "llama": {"eot": "▁<EOT>"},  # Code Llama
}
"""GGUF architecture → roles that its tokenizer's files leave unsaid, as convert_hf_to_gguf fills them."""

ENDS_KNOWN = frozenset({
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>", "<|endoftext|>", "</s>",
    "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>",
    "<｜end▁of▁sentence｜>", "[e~[",
})  # fmt: skip
"""Tokens at which llama.cpp stops by their text, whatever their id (src/llama-vocab.cpp)."""

FIM_UNKNOWN = (("[PREFIX]", "[SUFFIX]", "[MIDDLE]"), ("<[fim-prefix]>", "<[fim-suffix]>", "<[fim-middle]>"))
"""Fill-in-the-middle tokens (Codestral's, Seed-Coder's) that llama.cpp does not know by their text; it finds the others itself."""

FIM_ROLES = ("fim_pre", "fim_suf", "fim_mid")


@dataclass
class Roles:
    """``tokens``: role → its token's text, ``ids``: role → id, ``adds``: role → is it put around a text (bos, eos, sep)."""

    tokens: dict[str, str]
    ids: dict[str, int] = field(default_factory=dict)
    adds: dict[str, bool] = field(default_factory=dict)

    @classmethod
    def of(cls, settings: Mapping[str, Any], parsed: Mapping[str, Any]) -> Roles:
        """From tokenizer_config.json and tokenizer.json, as the gguf package's SpecialVocab reads them."""
        roles = cls({role: text for role in ROLE_NAMES if (text := content_of(settings.get(f"{role}_token")))})
        if parsed:
            roles.read_post_processor(parsed.get("post_processor"))
        for role in ("bos", "eos", "sep"):
            if isinstance(adds := settings.get(f"add_{role}_token"), bool):
                roles.adds.setdefault(role, adds)
        return roles

    def read_post_processor(self, post_processor: Mapping[str, Any] | None) -> None:
        """What tokenizer.json puts around a text; BERT's tokens serve where there are no others."""
        for role, stand_in in (("bos", "cls"), ("eos", "sep")):
            if role not in self.tokens and stand_in in self.tokens:
                self.tokens[role] = self.tokens[stand_in]
        given = post_processor or {}
        for step in given.get("processors", [given]):
            kind = step.get("type")
            if kind == "ByteLevel":
                self.adds = {"bos": False, "eos": False} | self.adds
            elif kind in ("RobertaProcessing", "BertProcessing"):
                self.adds |= {"bos": True, "eos": True, "sep": True}
                self.tokens = {"bos": step["cls"][0], "eos": step["sep"][0], "cls": step["cls"][0], "sep": step["sep"][0]} | self.tokens
            elif kind == "TemplateProcessing":
                self.read_template(step.get("single") or [], step.get("pair") or [])

    def read_template(self, single: list[Any], pair: list[Any]) -> None:
        """A template such as ``<s> A </s>``. An end that is not the eos token becomes it, and the other an end of turn."""
        first, last = (special_of(single[0]), special_of(single[-1])) if len(single) > 1 else (None, None)
        if first:
            self.tokens = {"bos": first, "cls": first} | self.tokens
            self.adds["bos"] = first in (self.tokens["bos"], self.tokens["cls"])
        if last:
            if (eos := self.tokens.get("eos")) not in (None, last):
                self.tokens |= {"eot" if "eot" not in self.tokens else "eom": eos}
            self.tokens["eos"] = last
            self.adds["eos"] = True
        inner = list(pair)
        if first and inner and special_of(inner[0]) == first:
            inner = inner[1:]
        if last and inner and special_of(inner[-1]) == last:
            inner = inner[:-1]
        between = [special_of(part) for part in inner[1:-1]]
        if not between:
            return
        separators = {self.tokens.get("sep"), self.tokens.get("eos")} - {None}
        self.adds["sep"] = (between[0] in separators and not last) or (len(between) == 2 and between[1] in separators)
        if self.adds["sep"] and "eos" in self.tokens:
            self.tokens.setdefault("sep", self.tokens["eos"])

    def find(self, ids: Mapping[str, int], config: Mapping[str, Any], gguf_arch: str, known: Mapping[str, int]) -> None:
        """Each role's id: of the token the tokenizer names, else config.json's, else ``known`` (its model's), else the family's."""
        n = max(ids.values(), default=-1) + 1
        self.ids = {role: ids[text] for role, text in self.tokens.items() if text in ids}
        for role in ROLE_NAMES:
            value = next(iter(integers(config.get(f"{role}_token_id"))), None)
            if value is not None and value < n:
                self.ids.setdefault(role, value)
        for role, id in known.items():
            self.ids.setdefault(role, id)
        for role, text in TOKENS_OF_FAMILIES.get(gguf_arch, {}).items():
            if text in ids:
                self.ids.setdefault(role, ids[text])
        for texts in FIM_UNKNOWN:
            if all(text in ids for text in texts):
                self.ids |= {role: ids[text] for role, text in zip(FIM_ROLES, texts, strict=True)}

    def stop_at(self, ends: Iterable[int], tokens: list[str]) -> None:
        """Ids at which generation ends besides eos: those that llama.cpp would not stop at by their text take the roles still free."""
        known = {self.ids.get(role) for role in ("eos", "eot", "eom")}
        unknown = [id for id in dict.fromkeys(ends) if id < len(tokens) and id not in known and tokens[id] not in ENDS_KNOWN]
        free = [role for role in ("eom", "eot") if role not in self.ids and not (role == "eom" and "<|eom_id|>" in tokens)]
        self.ids |= dict(zip(free, unknown, strict=False))

    def write(self, keys: GGUFWriter) -> None:
        for role, id in self.ids.items():
            if role != "cls":  # which GGUF has no key for
                keys.add_uint32(f"tokenizer.ggml.{KEYS.get(role, role)}_token_id", id)
        for role, adds in self.adds.items():
            keys.add_bool(f"tokenizer.ggml.add_{role}_token", adds)


def content_of(token: object) -> str:
    """The text of a special token, whether tokenizer_config.json has it as text or as an object; empty when it has none."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else ""


def special_of(part: Mapping[str, Any]) -> str | None:
    """The special token of one part of a template; None when a text goes there."""
    token: str | None = part.get("SpecialToken", {}).get("id")
    return token


def integers(value: object) -> Iterator[int]:
    """An id, or a list of them, as ids."""
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, int) and not isinstance(item, bool) and item >= 0:
            yield item
