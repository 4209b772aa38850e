"""Pre-tokenizers of tokenizer.json, recognised: their names in llama.cpp, from steps and expressions in any spelling."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from gguf import GGUFWriter
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers

from quantcli.errors import UnsupportedError
from quantcli.formats.gguf.tokens.expressions import canonical
from quantcli.formats.gguf.tokens.pretokenizers import FAMILIES, PUNCTUATION, PUNCTUATION_RUNS, Family
from quantcli.formats.gguf.tokens.recognition import PROBE
from quantcli.formats.gguf.tokens.tokenizer import add_tokenizer
from support.converted_tokenizers import IN_BYTES, pre_tokenizer_of, split
from support.gguf_tokenizers import byte_level, tokenizer_keys

LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = LLAMA3.replace("{1,3}", "")


def named(folder: Path, pre: object, **more: object) -> str:
    return tokenizer_keys(byte_level(folder, pre=pre, **more), 260)["pre"]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: next(iter(family.names)))
def test_the_pre_tokenizer_is_named_from_its_steps_and_expressions(family: Family, tmp_path: Path) -> None:
    name = next(iter(family.names))
    assert named(tmp_path, pre_tokenizer_of(family), ignore_merges=family.ignores_merges) == name


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: next(iter(family.names)))
def test_an_expression_in_its_one_spelling_cuts_as_before(family: Family) -> None:
    for cut in family.cuts:
        if cut in (PUNCTUATION, PUNCTUATION_RUNS):
            continue
        before, after = (pre_tokenizers.Split(Regex(e), "isolated").pre_tokenize_str(PROBE) for e in (cut, canonical(cut)))
        assert before == after
        assert canonical(canonical(cut)) == canonical(cut)


def test_no_two_families_are_one() -> None:
    keys = [(tuple(map(canonical, family.cuts)), family.ignores_merges) for family in FAMILIES]
    assert len(set(keys)) == len(FAMILIES)
    names = [name for family in FAMILIES for name in family.names]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    "spelling",
    [
        QWEN2.replace(r"\r", "\r").replace(r"\n", "\n"),
        QWEN2.replace("(?i:'s|'t|'re|'ve|'m|'ll|'d)", "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"),
        QWEN2.replace(r"[^\s\p{L}\p{N}]", r"[^\p{N}\p{L}\s]"),
        QWEN2.replace(r"|\p{N}|", r"|[\p{N}]{1}|"),
        QWEN2.replace("(?i:'s|'t|'re|'ve|'m|'ll|'d)|", r"(?i:\'s|\'t|\'re|\x27ve|\u0027m|'ll|'d)|"),
    ],
    ids=["line breaks", "cases", "order in a class", "counts", "escapes"],
)
def test_another_spelling_of_an_expression_is_the_same(spelling: str, tmp_path: Path) -> None:
    assert spelling != QWEN2
    assert named(tmp_path, split(spelling)) == "qwen2"


def test_what_matches_kept_alone_is_what_matches_isolated(tmp_path: Path) -> None:
    assert named(tmp_path, split(LLAMA3, behavior="removed", invert=True), ignore_merges=True) == "llama-bpe"


@pytest.mark.parametrize(("arch", "name"), [("llama", "qwen2"), ("stablelm", "stablelm2"), ("grok", "grok-2")])
def test_one_pre_tokenizer_of_several_names_gets_the_one_of_its_architecture(arch: str, name: str, tmp_path: Path) -> None:
    assert tokenizer_keys(byte_level(tmp_path, pre=split(QWEN2)), 260, arch=arch)["pre"] == name


UNKNOWN = {
    "more digits": lambda: split(LLAMA3.replace("{1,3}", "{1,7}")),
    "joined to what precedes": lambda: split(LLAMA3, behavior="merged_with_previous"),
    "a space in front": lambda: pre_tokenizers.ByteLevel(add_prefix_space=True),
    "no cut at all": lambda: IN_BYTES,
    "no bytes": lambda: pre_tokenizers.Split(Regex(LLAMA3), "isolated"),
}


@pytest.mark.parametrize("what", UNKNOWN)
def test_an_unknown_pre_tokenizer_names_its_nearest_and_the_option(what: str, tmp_path: Path) -> None:
    byte_level(tmp_path, pre=UNKNOWN[what](), ignore_merges=True)
    with pytest.raises(UnsupportedError, match=r"nearest: [a-z0-9-]+ \(\d+% of .*--pre-tokenizer"):
        tokenizer_keys(tmp_path, 260)
    assert tokenizer_keys(tmp_path, 260, "deepseek-llm")["pre"] == "deepseek-llm"


def test_the_nearest_pre_tokenizer_is_the_one_that_cuts_alike(tmp_path: Path) -> None:
    byte_level(tmp_path, pre=split(LLAMA3.replace("{1,3}", "{1,7}")), ignore_merges=True)
    with pytest.raises(UnsupportedError, match=r"nearest: llama-bpe \(9\d% of a test text's cuts\)"):
        tokenizer_keys(tmp_path, 260)


def test_a_normalizer_that_llama_cpp_does_not_apply_is_refused_and_nfc_is_not(tmp_path: Path) -> None:
    byte_level(tmp_path)
    for normalizer, fits in ((normalizers.NFC(), True), (normalizers.Sequence([]), True), (normalizers.NFKC(), False)):
        bpe = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        bpe.normalizer = normalizer
        bpe.save(str(tmp_path / "tokenizer.json"))
        if fits:
            assert tokenizer_keys(tmp_path, 260)["pre"] == "gpt-2"
    with pytest.raises(UnsupportedError, match=r"NFKC.*--pre-tokenizer"):
        tokenizer_keys(tmp_path, 260)


def test_a_name_unknown_to_quantcli_is_taken_with_a_note(tmp_path: Path) -> None:
    notes = add_tokenizer(GGUFWriter(None, "llama"), byte_level(tmp_path), 260, "qwen-2")
    assert len(notes) == 1
    assert re.search(r"qwen-2 .*did you mean qwen2", notes[0])


def test_a_name_that_begins_texts_is_told_when_the_tokenizer_does_not(tmp_path: Path) -> None:
    """llama.cpp begins a text with the bos token for the name llama-bpe alone."""
    assert tokenizer_keys(byte_level(tmp_path, pre=split(LLAMA3), ignore_merges=True), 260)["add_bos_token"] is False
    (tmp_path / "q").mkdir()
    assert "add_bos_token" not in tokenizer_keys(byte_level(tmp_path / "q", pre=split(QWEN2)), 260)
