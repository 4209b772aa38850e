"""What a tokenizer.json does to a text before its model: llama.cpp's pre-tokenizer that cuts it the same, and what becomes of spaces."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from quantcli.errors import UnsupportedError
from quantcli.formats.gguf.tokens.pretokenizers import DIGIT, DIGITS, FAMILIES, GPT2, PUNCTUATION, PUNCTUATION_RUNS, Family, family_of
from quantcli.formats.gguf.tokens.vocabulary import SPACE

HARMLESS_NORMALIZERS = {"NFC"}
"""llama.cpp normalizes no text before a byte-level BPE. Text is nearly always NFC already, and most models ask for it."""

PROBE = (
    "Hello, World! it's WE'LL they'Re I'm\n\n\nsnake_case camelCase HTTPServer 1 12 123 1234 12345678 3.14 1,234.5 x²½ ٣٤ १२\t\ttabs  two"
    " \r\n\r\n  end...!!! ((())) a+b==c && d||e //path/to/file /* ok */ \"q\" 'r' `s` #t $5 50% @me <tag> e\u0301a\u0308 naïve ÀÉÎ ß ﬁ"
    " Ελληνικά Русский ქართული Հայերեն עברית العربية हिन्दी বাংলা ไทย ភាសា"
    " 日本語のテスト、中文。한국어 테스트! ㄅㄆ ﹏ ～。 🚀🦙👩‍👩‍👧\u00a0nbsp\u3000wide\u200d   three \n"
)
"""A text on which two pre-tokenizers that differ are likely to cut differently."""


def recognise(tokenizer: Mapping[str, Any]) -> Family:
    """The family of a parsed tokenizer.json with a byte-level BPE.

    Raises :class:`UnsupportedError` when llama.cpp has none that does the same, with the nearest and how near they are.
    """
    normalizers = sorted({step["type"] for step in steps(tokenizer.get("normalizer"), "normalizers")} - HARMLESS_NORMALIZERS)
    if normalizers:
        raise UnsupportedError(
            f"tokenizer.json: the normalizer {' and '.join(normalizers)}, which llama.cpp does not apply before a byte-level BPE: it would "
            "find other tokens; to write the file all the same, choose a pre-tokenizer with --pre-tokenizer NAME"
        )
    cutters = list(steps(tokenizer.get("pre_tokenizer"), "pretokenizers"))
    cuts = tuple(cut for step in cutters for cut in _cuts(step))
    if all(step["type"] != "ByteLevel" for step in cutters):
        cuts += ("no turning into bytes",)
    ignores_merges = bool(tokenizer["model"].get("ignore_merges"))
    if (family := family_of(cuts, ignores_merges=ignores_merges)) is not None:
        return family
    flag = f"ignore_merges {str(ignores_merges).lower()}"
    raise UnsupportedError(
        f"tokenizer.json: llama.cpp has no name for the pre-tokenizer {' then '.join(cuts) or 'that cuts nowhere'} ({flag}); "
        f"nearest: {', '.join(_nearest(tokenizer, cuts, ignores_merges))}; choose one with --pre-tokenizer NAME"
    )


def steps(step: Mapping[str, Any] | None, key: str) -> Iterator[Mapping[str, Any]]:
    """A normalizer (``key`` normalizers) or pre-tokenizer (pretokenizers) as its plain steps."""
    if step is None:
        return
    if step.get("type") != "Sequence":
        yield step
        return
    for part in step[key]:
        yield from steps(part, key)


def marks_spaces(parsed: Mapping[str, Any]) -> bool:
    """Are spaces written as ▁ before the merges?"""
    replaced = any(step.get("content") == SPACE for step in steps(parsed.get("normalizer"), "normalizers"))
    return replaced or any(step["type"] == "Metaspace" for step in steps(parsed.get("pre_tokenizer"), "pretokenizers"))


def drops_spaces(parsed: Mapping[str, Any]) -> bool:
    """Does whitespace end words and become no token, without any other cut?"""
    return [step["type"] for step in steps(parsed.get("pre_tokenizer"), "pretokenizers")] in (["Whitespace"], ["WhitespaceSplit"])


def prepends_space(parsed: Mapping[str, Any]) -> bool:
    """Does a space stand before the first word of a text?"""
    both = [*steps(parsed.get("normalizer"), "normalizers"), *steps(parsed.get("pre_tokenizer"), "pretokenizers")]
    prepends = any(step["type"] == "Prepend" for step in both)
    return prepends or any(step["type"] == "Metaspace" and metaspace_prepends(step) for step in both)


def metaspace_prepends(step: Mapping[str, Any]) -> bool:
    """Metaspace before and after tokenizers 0.15: a flag, then a scheme (always, first, never)."""
    return step["prepend_scheme"] != "never" if "prepend_scheme" in step else bool(step.get("add_prefix_space", True))


def removes_spaces(parsed: Mapping[str, Any]) -> bool:
    """Do several spaces count as one?"""
    replaced = any(step.get("pattern") == {"Regex": " {2,}"} for step in steps(parsed.get("normalizer"), "normalizers"))
    return replaced or any(step["type"] == "WhitespaceSplit" for step in steps(parsed.get("pre_tokenizer"), "pretokenizers"))


def _cuts(step: Mapping[str, Any]) -> list[str]:
    """What one step isolates, as an expression; in plain text where it does something that no expression can."""
    kind = step.get("type")
    if kind == "Split":
        return [_split(step)]
    if kind == "Digits":
        return [DIGIT if step.get("individual_digits") else DIGITS]
    if kind == "Punctuation":
        return [PUNCTUATION_RUNS if step.get("behavior") == "Contiguous" else PUNCTUATION]
    if kind != "ByteLevel":
        return [str(kind)]
    prefix = ["a space before the text"] if step.get("add_prefix_space", True) else []
    return prefix + ([GPT2] if step.get("use_regex", True) else [])


def _split(step: Mapping[str, Any]) -> str:
    """A Split's expression. ``Removed`` inverted keeps just what matches: the same as ``Isolated``, for what leaves nothing out."""
    pattern = step["pattern"]
    expression = pattern["Regex"] if "Regex" in pattern else re.escape(pattern["String"])
    how = step.get("behavior"), bool(step.get("invert"))
    return expression if how in (("Isolated", False), ("Isolated", True), ("Removed", True)) else f"{expression} ({how[0]})"


def _nearest(tokenizer: Mapping[str, Any], cuts: tuple[str, ...], ignores_merges: bool) -> list[str]:
    """The three likeliest families, each with what it shares: of the cuts of a probe, or of the expressions' text."""
    ours = _places(tokenizer.get("pre_tokenizer"))
    found: list[tuple[float, bool, str]] = []
    for family in FAMILIES:
        theirs = _places(_pre_tokenizer(family.cuts)) if ours else None
        if ours and theirs:
            share, of = len(ours & theirs) / len(ours | theirs), "of a test text's cuts"
        else:
            share, of = difflib.SequenceMatcher(None, "\n".join(cuts), "\n".join(family.cuts)).ratio(), "of its expression"
        found.append((share, family.ignores_merges == ignores_merges, f"{next(iter(family.names))} ({share:.0%} {of})"))
    return [text for *_, text in sorted(found, key=lambda f: (-f[0], not f[1]))[:3]]


def _pre_tokenizer(cuts: Sequence[str]) -> Mapping[str, Any]:
    """Expressions as the pre-tokenizer of a tokenizer.json."""
    behaviors = {PUNCTUATION: "Isolated", PUNCTUATION_RUNS: "Contiguous"}
    parts = [
        {"type": "Punctuation", "behavior": behaviors[cut]}
        if cut in behaviors
        else {"type": "Split", "pattern": {"Regex": cut}, "behavior": "Isolated", "invert": False}
        for cut in cuts
    ]
    return {"type": "Sequence", "pretokenizers": parts}


def _places(pre_tokenizer: Mapping[str, Any] | None) -> frozenset[int]:
    """Where a pre-tokenizer cuts the probe; empty when the tokenizers library does not take it."""
    from tokenizers import Tokenizer  # only an unknown pre-tokenizer needs the library

    model = {"type": "BPE", "vocab": {}, "merges": []}
    try:
        cutter = Tokenizer.from_str(json.dumps({"version": "1.0", "model": model, "pre_tokenizer": pre_tokenizer})).pre_tokenizer
        return frozenset(start for _, (start, _) in cutter.pre_tokenize_str(PROBE)) if cutter else frozenset()
    except Exception:  # the library's errors are plain Exceptions
        return frozenset()
