"""tekken.json, Mistral's own tokenizer file: tokens as bytes in the order of their merges, read into the form of a tokenizer.json."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from quantcli.formats.gguf.tokens.merges import byte_alphabet

ROLES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}


def as_tokenizer_json(tekken: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    """What the tokenizers library would read: special tokens take the first ids, the bytes' ranks begin behind them."""
    config = tekken["config"]
    n_special = config["default_num_special_tokens"]
    specials = {token["rank"]: token for token in tekken.get("special_tokens") or []}
    names = [specials.get(id, {}).get("token_str", f"<SPECIAL_{id}>") for id in range(n_special)]
    ranks = {base64.b64decode(token["token_bytes"]): token["rank"] for token in tekken["vocab"] if token["rank"] < vocab_size - n_special}
    alphabet = byte_alphabet()
    text = {piece: "".join(alphabet[byte] for byte in piece) for piece in ranks}
    merges = [(text[left], text[right]) for left, right in _merges(ranks)]
    begin = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": ROLES["bos_token"]}}, {"Sequence": {"id": "A"}}]}
    return {
        "added_tokens": [
            {"id": id, "content": name, "special": bool(specials.get(id, {}).get("is_control", True))} for id, name in enumerate(names)
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": config["pattern"]}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        },
        "post_processor": begin,
        "model": {
            "type": "BPE",
            "vocab": {text[piece]: rank + n_special for piece, rank in ranks.items()},
            "merges": merges,
            "ignore_merges": True,
        },
    }


def _merges(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The merge that makes each token, by rank: the last of those that its bytes go through when only earlier ones exist."""
    found = []
    for piece, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [piece[i : i + 1] for i in range(len(piece))]
        while len(parts) > 2:
            best, at = min((ranks.get(left + right, rank), i) for i, (left, right) in enumerate(pairwise(parts)))
            if best >= rank:
                break
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2:
            found.append((parts[0], parts[1]))
    return found
