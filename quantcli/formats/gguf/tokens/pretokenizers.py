"""llama.cpp's names for pre-tokenizers: the regular expressions that cut a text before its merges, by the family that brought them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from quantcli.formats.gguf.tokens.expressions import canonical

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
TAIL = rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{SPACES}"
TAIL_SLASH = rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{SPACES}"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
CASED = (rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*")
CASED_CONTRACTED = f"{CASED[0]}{CONTRACTIONS}?|{CASED[1]}{CONTRACTIONS}?"
DIGIT, DIGITS, DIGITS3, DIGITS3_FROM_RIGHT = r"\p{N}", r"\p{N}+", r"\p{N}{1,3}", r"\d{1,3}(?=(?:\d{3})*\b)"
PUNCTUATION_RUNS, PUNCTUATION = "runs of punctuation", "punctuation"
LINES = r"[^\n]+|[\n]+"
LLAMA3 = f"{CONTRACTIONS}|{WORDS}|{DIGITS3}|{TAIL}"
QWEN2 = f"{CONTRACTIONS}|{WORDS}|{DIGIT}|{TAIL}"
BLOOM = r" ?[^(\s|[.,!?…。，、।۔،])]+"
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
SCRIPTS_WITHOUT_SPACES = (
    "[\u4e00-\u9fff\u3400-\u4dbf\u8c48-\ufaff\u3040-\u309f\u30a0-\u30ff\uff65-\uff9f\u2f00-\u2fdf\u0e40-\u0e7f\u0e80-\u0eff\u1780-\u17ff"
    "\u1000-\u109f\uaa60-\uaa7f\ua9e0-\ua9ff\uac00-\ud7af\u1100-\u11ff]+"
)
YOUTU_SCRIPTS = "[가-힣ㄱ-ㆎ]+|[！…“”‘’—：；，\u3001-\u303f\ufe30-\ufe4f]+|[ㄅ-ㄯ]+|" + CJK_KANA
ASCII_PUNCTUATED = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+"""
PUNCTUATED_WORDS = rf"{ASCII_PUNCTUATED}[\r\n]*|{SPACES}"
HALVED_SPACES = "|".join(rf"\s{{{n}}}(?!\S)" for n in ("512", "256", "128", "64", "32", "16", "8", "4", "1,2"))
NOT_HAN = (f"{UPPER[:-1]}&&[^\\p{{Han}}]]", f"{LOWER[:-1]}&&[^\\p{{Han}}]]")
KIMI = (
    rf"[\p{{Han}}]+|[^\r\n\p{{L}}\p{{N}}]?{NOT_HAN[0]}*{NOT_HAN[1]}+{CONTRACTIONS}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{NOT_HAN[0]}+{NOT_HAN[1]}*{CONTRACTIONS}?|{DIGITS3}|{TAIL}"
)


@dataclass(frozen=True)
class Family:
    """Pre-tokenizers that are one in llama.cpp.

    ``names``: its name for them → the GGUF architectures whose models carry that name; a model of another architecture gets the first.
    ``cuts``: the expressions, in the order they cut the text. ``ignores_merges``: a piece that is a token stays whole, whatever the
    merges (tokenizer.json's ``model.ignore_merges``), which llama.cpp derives from the name: Llama 3 and Smaug differ in it alone.
    ``begins``: llama.cpp puts the first token before a text unless the file sets otherwise.
    """

    names: Mapping[str, str]
    cuts: tuple[str, ...]
    ignores_merges: bool = False
    begins: bool = False


def _names(listing: str) -> dict[str, str]:
    """``name:arch+arch name``: names, some with the architectures they are for."""
    return {name: archs for name, _, archs in (entry.partition(":") for entry in listing.split())}


FAMILIES = (
    Family(
        _names(
            "gpt-2 phi-2:phi2 mpt:mpt+gptneox olmo:olmo+olmoe jais:jais exaone4:exaone4 modern-bert:modern-bert mellum gigachat a.x-4.0"
            " trillion granite-docling jina-es jina-de jina-v2-es jina-v2-de jina-v1-en jina-v2-code roberta-bpe"
        ),
        (GPT2,),
    ),
    Family(
        _names(
            "smollm starcoder:starcoder+starcoder2 refact:refact+granite+granitemoe command-r:command-r+cohere2 codeshell:codeshell"
            " exaone:exaone minerva-7b mellum2:mellum"
        ),
        (DIGIT, GPT2),
    ),
    Family(
        _names("llama-bpe glm4:glm4+glm4moe+chatglm+deepseek2 glm5:glm-dsa falcon-h1:falcon-h1 lfm2:lfm2+lfm2moe falcon3 pixtral midm-2.0")
        | _names("jina-v5-nano:eurobert llama3 llama-v3"),
        (LLAMA3,),
        ignores_merges=True,
        begins=True,
    ),
    Family(_names("smaug-bpe dbrx:dbrx+olmo2+phi3 chatglm-bpe:chatglm+glm4+glm4moe"), (LLAMA3,)),
    Family(
        _names("qwen2 stablelm2:stablelm hunyuan:hunyuan-moe grok-2:grok solar-open deepseek-r1-qwen kormo f2llmv2 megrez"),
        (QWEN2,),
    ),
    Family(
        _names("qwen35"),
        (rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|{DIGIT}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{SPACES}",),
    ),
    Family(_names("laguna"), (LINES, QWEN2)),
    Family(_names("ufakzeka"), (f"{WORDS}|{DIGIT}|{TAIL}",)),
    Family(_names("jais-2"), (rf"{CONTRACTIONS}|{WORDS}|{DIGITS3}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|{HALVED_SPACES}|\s{{1}}",)),
    Family(_names("minicpm5"), (DIGITS3, f"{CONTRACTIONS}|{WORDS}|{DIGITS}|{TAIL}"), ignores_merges=True),
    Family(
        _names("bailingmoe bailingmoe2:bailingmoe2 llada-moe:llada-moe"),
        (rf"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{{L}}\p{{N}}]?+\p{{L}}+|{DIGIT}| ?[^\s\p{{L}}\p{{N}}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",),
    ),
    Family(_names("seed-coder"), (rf"{CONTRACTIONS}|{WORDS}|{DIGIT}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{SPACES}",)),
    Family(
        _names("exaone-moe"),
        (
            rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|{DIGIT}"
            r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+",
        ),
    ),
    Family(_names("tekken"), (f"{CASED[0]}|{CASED[1]}|{DIGIT}|{TAIL_SLASH}",), ignores_merges=True, begins=True),
    Family(_names("gpt-4o llama4:llama4 minimax-m2:minimax-m2 kanana2 talkie"), (f"{CASED_CONTRACTED}|{DIGITS3}|{TAIL_SLASH}",)),
    Family(_names("granite-embed-multi-97m"), (f"{CASED_CONTRACTED}|{DIGITS3}|{TAIL_SLASH}",), ignores_merges=True),
    Family(_names("tiny_aya cohere2moe:cohere2moe"), (DIGITS3_FROM_RIGHT, f"{CASED_CONTRACTED}|{DIGITS3}|{TAIL_SLASH}")),
    Family(_names("youtu"), (YOUTU_SCRIPTS, f"{CASED_CONTRACTED}|{DIGIT}|{TAIL_SLASH}"), ignores_merges=True),
    Family(_names("kimi-k2"), (KIMI,)),
    Family(_names("deepseek-v3 hunyuan-dense:hunyuan-dense joyai-llm hy_v4"), (DIGITS3, CJK_KANA, PUNCTUATED_WORDS)),
    Family(_names("spark2_5"), (DIGITS3, CJK_KANA, rf"{ASCII_PUNCTUATED}|[\r\n]|\s+(?!\S)|\s+", DIGIT)),
    Family(_names("afmoe"), (DIGITS3_FROM_RIGHT, SCRIPTS_WITHOUT_SPACES, PUNCTUATED_WORDS)),
    Family(_names("deepseek-coder"), (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", CJK_WIDE, DIGIT)),
    Family(
        _names("deepseek-llm"),
        (r"[\r\n]", rf"\s?[{LATIN_GREEK_CYRILLIC}]+", "\\s?[!-/:-~！-／：-～‘-‟\u3000-。]+", r"\s+$", CJK_WIDE, DIGIT),
    ),
    Family(_names("falcon"), (PUNCTUATION_RUNS, GPT2, DIGITS, "[0-9][0-9][0-9]")),
    Family(_names("bloom poro-chat gpt3-finnish"), (BLOOM,)),
    Family(_names("viking"), (BLOOM, DIGIT)),
    Family(_names("superbpe"), (DIGITS, r"(?=(\d{3})+(?!\d))")),
    Family(
        _names("chameleon"),
        ("<sentinel:[0-9]+>", "(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z", r"([\t\n]|    |  )", DIGIT, PUNCTUATION, GPT2),
        begins=True,
    ),
)
"""All of llama.cpp's src/llama-vocab.cpp whose text is cut before it is turned into bytes. The expressions are the models' own, from
their tokenizer.json; llama.cpp's are sometimes near ones, in what its regular expressions can express."""

WITHOUT_BYTES = ("gemma4", "granite-embed-multi-311m", "sarvam-moe", "whitespace")
"""Its names for merges over characters instead of bytes; ``default`` is what it does where a file names none."""

KNOWN_NAMES = frozenset(name for family in FAMILIES for name in family.names) | {*WITHOUT_BYTES, "default"}

_BY_CUTS: dict[tuple[tuple[str, ...], bool], Family] = {}


def family_of(cuts: tuple[str, ...], *, ignores_merges: bool) -> Family | None:
    """The family that cuts a text by ``cuts``, however those are spelled."""
    if not _BY_CUTS:
        _BY_CUTS.update({(tuple(map(canonical, family.cuts)), family.ignores_merges): family for family in FAMILIES})
    return _BY_CUTS.get((tuple(map(canonical, cuts)), ignores_merges))


def name_for(family: Family, gguf_arch: str) -> str:
    """The family's name for models of ``gguf_arch``."""
    return next((name for name, archs in family.names.items() if gguf_arch in archs.split("+")), next(iter(family.names)))


def begins_text(name: str) -> bool:
    """Does llama.cpp put the first token before a text for the pre-tokenizer's name alone?"""
    return any(family.begins for family in FAMILIES if name in family.names)
