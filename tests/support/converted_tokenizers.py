"""Small tokenizers of every family, made without training, and what convert_hf_to_gguf makes of them."""

from __future__ import annotations

import hashlib
import json
import struct
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from gguf import GGUFWriter
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from quantcli.formats.gguf.file.container import Field
from quantcli.formats.gguf.file.headers import read_header
from quantcli.formats.gguf.tokens.pretokenizers import FAMILIES, PUNCTUATION, PUNCTUATION_RUNS, Family
from quantcli.formats.gguf.tokens.tokenizer import add_tokenizer
from support.places import DATA

GOLDEN = DATA / "tokenizers.json"
VOCAB_SIZE = 300
IN_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)

STEPS: dict[str, Callable[[], list]] = {
    "gpt-2": lambda: [pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "smollm": lambda: [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "falcon": lambda: [
        pre_tokenizers.Punctuation("contiguous"),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        pre_tokenizers.Digits(False),
        pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), "isolated"),
    ],
}
"""Families whose tokenizer.json has other steps than Split for what they share with another."""


def family_named(name: str) -> Family:
    return next(family for family in FAMILIES if name in family.names)


def split(*expressions: str, behavior: str = "isolated", invert: bool = False) -> pre_tokenizers.PreTokenizer:
    cuts = [pre_tokenizers.Split(Regex(e), behavior, invert) for e in expressions]
    return pre_tokenizers.Sequence([*cuts, IN_BYTES])


def pre_tokenizer_of(family: Family) -> pre_tokenizers.PreTokenizer:
    """A family's pre-tokenizer as its models publish it."""
    if steps := STEPS.get(next(iter(family.names))):
        return pre_tokenizers.Sequence(steps())
    words = {PUNCTUATION: "isolated", PUNCTUATION_RUNS: "contiguous"}
    cuts = [pre_tokenizers.Punctuation(words[cut]) if cut in words else pre_tokenizers.Split(Regex(cut), "isolated") for cut in family.cuts]
    return pre_tokenizers.Sequence([*cuts, IN_BYTES])


def byte_level(folder: Path, pre: str, *tokens: str, **settings: object) -> Path:
    """A byte-level BPE of one merge, as the family ``pre`` cuts, with special ``tokens`` besides the usual."""
    family = family_named(pre)
    vocab = {token: id for id, token in enumerate(["<s>", "<e>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "he"])}
    bpe = Tokenizer(models.BPE(vocab, [("h", "e")], ignore_merges=family.ignores_merges))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizer_of(family), decoders.ByteLevel()
    bpe.add_special_tokens(["<s>", "<e>", *tokens])
    bpe.add_tokens([AddedToken("<tool>", special=False), AddedToken("<|looks|>", special=False)])
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return save(bpe, folder, **({"eos_token": "<e>", "tokenizer_class": "PreTrainedTokenizerFast"} | settings))


def save(tokenizer: Tokenizer, folder: Path, **settings: object) -> Path:
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def message(*fields: tuple[int, object]) -> bytes:
    """A protobuf message of numbers, floats, texts and messages."""
    out = b""
    for number, value in fields:
        if isinstance(value, float):
            out += bytes([number << 3 | 5]) + struct.pack("<f", value)
        elif isinstance(value, int):
            out += varint(number << 3) + varint(value)
        else:
            data = value.encode() if isinstance(value, str) else value
            assert isinstance(data, bytes)
            out += varint(number << 3 | 2) + varint(len(data)) + data
    return out


def varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    out = b""
    while value > 0x7F:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def pieces(folder: Path, *user_defined: str, prefix: bool = True, **settings: object) -> Path:
    """A SentencePiece BPE with bytes: tokenizer.model as its library reads it, and tokenizer_config.json."""
    folder.mkdir(exist_ok=True)
    normal, unknown, control, defined, byte = 1, 2, 3, 4, 6
    listed = [("<unk>", 0.0, unknown), ("<s>", 0.0, control), ("</s>", 0.0, control), *((text, 0.0, defined) for text in user_defined)]
    listed += [(f"<0x{value:02X}>", 0.0, byte) for value in range(256)]
    listed += [(text, -float(rank), normal) for rank, text in enumerate(["he", "ll", "hell", "▁", "h", "e", "l", "o"])]
    proto = b"".join(message((1, message((1, text), (2, score), (3, kind)))) for text, score, kind in listed)
    trainer, normalizer = ((3, 2), (35, 1), (40, 0), (41, 1), (42, 2), (43, -1)), ((1, "identity"), (3, int(prefix)), (4, 0))
    proto += message((2, message(*trainer)), (3, message(*normalizer)))
    (folder / "tokenizer.model").write_bytes(proto)
    words = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True, "add_eos_token": False}
    decoder = {str(i): {"content": token, "special": True} for i, token in enumerate(("<unk>", "<s>", "</s>"))}
    decoder |= {str(i): {"content": token} for i, token in enumerate(user_defined, 3)}
    all_settings = {**words, "tokenizer_class": "LlamaTokenizer", "added_tokens_decoder": decoder, **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(all_settings))
    return folder


def gemma(folder: Path) -> Path:
    return pieces(folder, "<start_of_turn>", "<end_of_turn>", "▁▁", "\n\n", prefix=False)


def bert(folder: Path) -> Path:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocab = {token: id for id, token in enumerate([*special, "un", "##able", "##a", "b", "!"])}
    words = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    words.normalizer, words.pre_tokenizer = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    words.add_special_tokens(special)
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    roles = {f"{role}_token": f"[{role.upper()}]" for role in ("unk", "sep", "pad", "cls", "mask")}
    return save(words, folder, tokenizer_class="BertTokenizer", **roles)


GPT2 = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<s>", "unk_token": "<e>"}
GLM = ("<|endoftext|>", "[gMASK]", "<|user|>", "<|observation|>")
TEMPLATES = [{"name": "default", "template": "{{ x }}"}, {"name": "tool_use", "template": "{{ y }}"}]

CONVERTED: dict[str, tuple[str, str, str, Callable[[Path], Path]]] = {
    "Llama 3": ("LlamaForCausalLM", "llama", "llama-bpe", lambda f: byte_level(f, "llama-bpe", "<|eot_id|>", chat_template=TEMPLATES)),
    "SmolLM": ("LlamaForCausalLM", "llama", "smollm", lambda f: byte_level(f, "smollm", add_prefix_space=False)),
    "Llama 2": ("LlamaForCausalLM", "llama", "", pieces),
    "Mistral": ("MistralForCausalLM", "llama", "", lambda f: pieces(f, add_prefix_space=True)),
    "Gemma": ("GemmaForCausalLM", "gemma", "", gemma),
    "Gemma 2": ("Gemma2ForCausalLM", "gemma2", "", gemma),
    "Gemma 3": ("Gemma3ForCausalLM", "gemma3", "", gemma),
    "Phi 3": ("Phi3ForCausalLM", "phi3", "", pieces),
    "Phi 4": ("Phi3ForCausalLM", "phi3", "dbrx", lambda f: byte_level(f, "dbrx", **GPT2)),
    "Qwen 2": ("Qwen2ForCausalLM", "qwen2", "qwen2", lambda f: byte_level(f, "qwen2", "<|im_end|>", add_prefix_space=False)),
    "Qwen 3 MoE": ("Qwen3MoeForCausalLM", "qwen3moe", "qwen2", lambda f: byte_level(f, "qwen2", "<|fim_prefix|>")),
    "StableLM 2": ("StableLmForCausalLM", "stablelm", "stablelm2", lambda f: byte_level(f, "stablelm2")),
    "GPT-2": ("GPT2LMHeadModel", "gpt2", "gpt-2", lambda f: byte_level(f, "gpt-2", **GPT2)),
    "Falcon": ("FalconForCausalLM", "falcon", "falcon", lambda f: byte_level(f, "falcon")),
    "GLM 4": ("Glm4ForCausalLM", "glm4", "glm4", lambda f: byte_level(f, "glm4", *GLM)),
    "GLM 4 MoE": ("Glm4MoeForCausalLM", "glm4moe", "glm4", lambda f: byte_level(f, "glm4", *GLM)),
    "Granite": ("GraniteForCausalLM", "granite", "refact", lambda f: byte_level(f, "refact")),
    "OLMo 2": ("Olmo2ForCausalLM", "olmo2", "dbrx", lambda f: byte_level(f, "dbrx")),
    "DeepSeek 2": ("DeepseekV2ForCausalLM", "deepseek2", "deepseek-llm", lambda f: byte_level(f, "deepseek-llm")),
    "DeepSeek 3": ("DeepseekV3ForCausalLM", "deepseek2", "deepseek-v3", lambda f: byte_level(f, "deepseek-v3")),
    "gpt-oss": ("GptOssForCausalLM", "gpt-oss", "gpt-4o", lambda f: byte_level(f, "gpt-4o", "<|return|>", "<|call|>")),
    "BERT": ("BertModel", "bert", "default", bert),
}
"""Family → transformers' class, GGUF architecture, pre-tokenizer's name, and what makes a folder of it."""

OTHERWISE = {
    # tokenizer.model and tokenizer_config.json name them; convert looks for them in tokenizer.json and config.json alone
    *((name, f"{role}_token_id") for name in ("Llama 2", "Mistral", "Gemma", "Gemma 2", "Gemma 3", "Phi 3") for role in ("eos", "unknown")),
    # convert writes 107, the id that <end_of_turn> has in Gemma; here it has another
    ("Gemma", "eot_token_id"),
}
"""Where our keys are not convert_hf_to_gguf's, and why."""


def folder_of(name: str, parent: Path) -> Path:
    cls, _, _, make = CONVERTED[name]
    folder = make(parent / name)
    config = {"vocab_size": VOCAB_SIZE, "architectures": [cls], "bos_token_id": 1, "pad_token_id": 0, "type_vocab_size": 2}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write(folder: Path, path: Path, vocab_size: int, arch: str = "llama", pre: str | None = None) -> Path:
    """A GGUF file of nothing but the tokenizer of ``folder``."""
    keys = GGUFWriter(path, arch)
    add_tokenizer(keys, folder, vocab_size, pre)
    keys.write_header_to_file()
    keys.write_kv_data_to_file()
    keys.close()
    return path


def manifest(path: Path) -> dict[str, str]:
    """A file's tokenizer keys: type and value, of long arrays their hash."""
    return {key.removeprefix("tokenizer.").removeprefix("ggml."): plain(field) for key, field in read_header(path).fields.items()}


def plain(field: Field) -> str:
    value = field.value.tolist() if isinstance(field.value, np.ndarray) else field.value if field.element is None else list(field.value)
    text = json.dumps(value, ensure_ascii=False)
    kind = field.type.name if field.element is None else f"{field.element.name}[{len(value)}]"
    return f"{kind} {text if len(text) < 100 else hashlib.sha256(text.encode()).hexdigest()}"


SET_VOCAB = """
import json, sys
from pathlib import Path
root, cases = sys.argv[1:]
sys.path[:0] = [root, root + "/gguf-py"]
import gguf
from conversion import base, get_model_class
for case in json.loads(cases):
    base.TextModel.get_vocab_base_pre = lambda self, tokenizer, pre=case["pre"]: pre
    cls = get_model_class(case["class"])
    model = cls.__new__(cls)
    model.dir_model = Path(case["folder"])
    model.hparams = json.loads((model.dir_model / "config.json").read_text())
    model.origin_hf_arch, model.is_mistral_format = case["class"], False
    model.gguf_writer = gguf.GGUFWriter(case["out"], case["arch"])
    model.set_vocab()
    model.gguf_writer.write_header_to_file()
    model.gguf_writer.write_kv_data_to_file()
    model.gguf_writer.close()
"""
"""convert_hf_to_gguf's tokenizers alone. It refuses those whose hash it has not seen, as small ones have: ``pre`` names theirs."""


def converted(llama_cpp: Path, parent: Path) -> dict[str, dict[str, str]]:
    """The manifests of what convert_hf_to_gguf makes of every family's folder."""
    cases: list[Mapping[str, str]] = []
    for name, (cls, arch, pre, _) in CONVERTED.items():
        folder = folder_of(name, parent)
        cases.append({"class": cls, "arch": arch, "pre": pre, "folder": str(folder), "out": str(parent / f"{name}.theirs.gguf")})
    done = subprocess.run([sys.executable, "-c", SET_VOCAB, str(llama_cpp), json.dumps(cases)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: manifest(parent / f"{name}.theirs.gguf") for name in CONVERTED}
