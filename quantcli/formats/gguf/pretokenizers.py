"""Names for a byte-level BPE's pre-tokenizer: tokenizer.json has regular expressions, llama.cpp the name of a model that uses them."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from quantcli.errors import UnsupportedError

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TAIL_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
CASED = (rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*")
DIGITS3 = r"\p{N}{1,3}"
DIGIT = r"\p{N}"
PUNCTUATION = "punctuation"
CJK_KANA = "[一-龥\u3040-ゟ゠-ヿ]+"
CJK_WIDE = "[一-龥ࠀ-一가-\ud7ff]+"
LATIN_GREEK_CYRILLIC = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376\u0377\u037b-\u037d"
    "\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5"
    "\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45"
    "\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3"
    "\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d"
    "\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d"
    "\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a"
    "\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df"
    "\U0001e900-\U0001e943"
)
PUNCTUATED_WORDS = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
    r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

NAMES: dict[tuple[tuple[str, ...], bool], str] = {
    ((GPT2,), False): "gpt-2",
    ((DIGIT, GPT2), False): "smollm",
    ((rf"{CONTRACTIONS}|{WORDS}|{DIGITS3}|{TAIL}",), True): "llama-bpe",
    ((rf"{CONTRACTIONS}|{WORDS}|{DIGITS3}|{TAIL}",), False): "smaug-bpe",
    ((rf"{CONTRACTIONS}|{WORDS}|{DIGIT}|{TAIL}",), False): "qwen2",
    (
        (rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|{DIGIT}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",),
        False,
    ): ("qwen35"),
    ((f"{WORDS}|{DIGIT}|{TAIL}",), False): "ufakzeka",
    ((rf"{CONTRACTIONS}|{WORDS}|{DIGIT}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+",), False): "seed-coder",
    ((f"{CASED[0]}|{CASED[1]}|{DIGIT}|{TAIL_SLASH}",), True): "tekken",
    ((f"{CASED[0]}{CONTRACTIONS}?|{CASED[1]}{CONTRACTIONS}?|{DIGITS3}|{TAIL_SLASH}",), False): "gpt-4o",
    ((DIGITS3, CJK_KANA, PUNCTUATED_WORDS), False): "deepseek-v3",
    ((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", CJK_WIDE, DIGIT), False): "deepseek-coder",
    ((r"[\r\n]", rf"\s?[{LATIN_GREEK_CYRILLIC}]+", r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$", CJK_WIDE, DIGIT), False): "deepseek-llm",
    ((DIGITS3, rf"{CONTRACTIONS}|{WORDS}|\p{{N}}+|{TAIL}"), True): "minicpm5",
    ((PUNCTUATION, GPT2, "[0-9][0-9][0-9]"), False): "falcon",
    ((r" ?[^(\s|[.,!?…。，、।۔،])]+",), False): "bloom",
    ((r" ?[^(\s|[.,!?…。，、।۔،])]+", DIGIT), False): "viking",
}
"""(regular expressions in the order they cut the text, model.ignore_merges) → the name in llama.cpp's src/llama-vocab.cpp.

Where several names mean the same there, the table has the one of the family's best known model. ``ignore_merges`` counts, because
llama.cpp derives it from the name: Llama 3 and Smaug share an expression and differ in it.
"""


def name_of(tokenizer: Mapping) -> str:
    """llama.cpp's name for the pre-tokenizer of a parsed tokenizer.json with a byte-level BPE.

    Raises :class:`UnsupportedError` with the nearest known names when there is none.
    """
    expressions = tuple(_expressions(tokenizer.get("pre_tokenizer") or {}))
    ignores_merges = bool(tokenizer["model"].get("ignore_merges"))
    if (name := NAMES.get((expressions, ignores_merges))) is not None:
        return name
    raise UnsupportedError(
        f"tokenizer.json: llama.cpp has no name for the pre-tokenizer {' then '.join(expressions) or 'that does nothing'} "
        f"(ignore_merges {str(ignores_merges).lower()}); nearest: {', '.join(_nearest(expressions))}; choose one with --pre-tokenizer NAME"
    )


def _expressions(step: Mapping) -> list[str]:
    """The cuts of a pre-tokenizer in order, each as the expression of what it isolates."""
    kind = step.get("type")
    if kind == "Sequence":
        return [expression for part in step["pretokenizers"] for expression in _expressions(part)]
    if kind == "Split":
        pattern = step["pattern"]
        return [pattern["Regex"].replace("\r", r"\r").replace("\n", r"\n") if "Regex" in pattern else repr(pattern["String"])]
    if kind == "Digits":
        return [DIGIT if step.get("individual_digits") else r"\p{N}+"]
    if kind == "ByteLevel":
        return [GPT2] if step.get("use_regex", True) else []
    if kind == "Punctuation":
        return [PUNCTUATION]
    return [str(kind)]


def _nearest(expressions: tuple[str, ...]) -> list[str]:
    text = "\n".join(expressions)
    likeness = {name: difflib.SequenceMatcher(None, text, "\n".join(known)).ratio() for (known, _), name in NAMES.items()}
    return sorted(likeness, key=lambda name: -likeness[name])[:3]
