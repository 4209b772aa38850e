"""GPTQ folders against a loop that packs and decodes one code at a time, as the layout is documented."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from quantcli.errors import CheckpointError, NumericsError, RecipeError, UnsupportedError
from quantcli.formats import gptq, open_checkpoint
from quantcli.formats.shared import dynamic
from quantcli.formats.shared.folder import module_of
from quantcli.tensors import DTYPE_NAMES, QuantizedTensor, Scheme, TensorSpec
from support import packed_folders
from support.mutations import wrong_answers
from support.packed_folders import damage, files_of, linears, loop_pack, loop_unpack, random_codes, words_of
from support.tiny_models import TinyLlama

Q = "model.layers.0.self_attn.q_proj"


write = partial(packed_folders.write, gptq)
quantized_folder = partial(packed_folders.quantized_folder, gptq)


def loop_decode(file: Mapping[str, torch.Tensor], module: str, bits: int, plus: int) -> torch.Tensor:
    """W[o, i] = scales[g_idx[i], o] · (q[i, o] − z[g_idx[i], o]), in double and rounded to float32."""
    qweight, qzeros, scales, g_idx = (file[f"{module}.{part}"].numpy() for part in ("qweight", "qzeros", "scales", "g_idx"))
    q = np.array([loop_unpack(column.tolist(), bits) for column in qweight.T])  # [out, in]
    z = np.array([loop_unpack(row.tolist(), bits) for row in qzeros]) + plus  # [groups, out]
    W = np.empty(q.shape)
    for o in range(q.shape[0]):
        for i in range(q.shape[1]):
            W[o, i] = float(scales[g_idx[i], o]) * (int(q[o, i]) - int(z[g_idx[i], o]))
    return torch.from_numpy(W.astype(np.float32))


ALL_SCHEMES = [
    Scheme.of("int", bits=bits, group_size=group_size, sym=sym, **desc)
    for bits in (2, 3, 4, 8)
    for sym in (True, False)
    for group_size in (-1, 32)
    for desc in ({}, {"desc_act": True})
    if not (desc and group_size == -1)
]


@pytest.mark.parametrize("scheme", ALL_SCHEMES, ids=lambda s: f"{s}{'-act' if s.get('desc_act') else ''}")
def test_codes_come_back_bit_for_bit_and_decode_as_the_layout_says(tiny_llama: TinyLlama, tmp_path: Path, scheme: Scheme) -> None:
    folder, tensors = quantized_folder(tiny_llama, tmp_path / "out", scheme, bias=True)
    file = files_of(tmp_path / "out")
    with open_checkpoint(str(tmp_path / "out")) as back, open_checkpoint(str(folder)) as source:
        assert back.kind == "gptq"
        assert back.notes == ()
        assert back.specs.keys() == source.specs.keys()
        assert back.schemes == dict.fromkeys(tensors, scheme)
        for name, tensor in tensors.items():
            module = name.removesuffix(".weight")
            got = back.quantized(name)
            assert got.scheme == scheme
            assert got.parts.keys() == tensor.parts.keys()
            assert all(torch.equal(got.parts[part], value) for part, value in tensor.parts.items())
            assert back.specs[name].shape == source.specs[name].shape
            assert back.specs[name].nbytes == sum(
                t.nbytes for part, t in file.items() if part.rpartition(".")[0] == module and "bias" not in part
            )
        decoded = loop_decode(file, Q, scheme.get("bits"), plus=1 if scheme.get("sym") else 0)
        assert torch.equal(back.read(f"{Q}.weight"), decoded)
        for name in source.specs.keys() - tensors.keys():
            assert torch.equal(back.read(name), source.read(name))


@pytest.mark.parametrize(("sym", "version", "word"), [(True, "gptq", 0x77777777), (False, "gptq_v2", 0x88888888 - 2**32)])
def test_symmetric_is_v1_and_asymmetric_is_v2(tiny_llama: TinyLlama, tmp_path: Path, sym: bool, version: str, word: int) -> None:
    scheme = Scheme.of("int", bits=4, group_size=32, sym=sym)
    with open_checkpoint(str(tiny_llama(hidden=64, intermediate=96, layers=1, heads=2, vocab=300))) as source:
        tensors = {name: random_codes(scheme, *shape) for name, shape in linears(source).items()}
        for tensor in tensors.values():
            tensor.parts["zero"].fill_(8)
        write(source, tmp_path / "out", tensors)
    assert words_of(tmp_path / "out")["checkpoint_format"] == version
    assert set(files_of(tmp_path / "out")[f"{Q}.qzeros"].flatten().tolist()) == {word}


def test_one_asymmetric_tensor_makes_the_whole_file_v2(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    sym, asym = (Scheme.of("int", bits=4, group_size=32, sym=s) for s in (True, False))
    with open_checkpoint(str(tiny_llama(hidden=64, intermediate=96, layers=1, heads=2, vocab=300))) as source:
        tensors = {name: random_codes(asym if "down" in name else sym, *shape) for name, shape in linears(source).items()}
        write(source, tmp_path / "out", tensors)
    words = words_of(tmp_path / "out")
    assert (words["checkpoint_format"], words["sym"]) == ("gptq_v2", True)
    assert words["dynamic"] == {r"+:^model\.layers\.\d+\.mlp\.down_proj$": {"bits": 4, "group_size": 32, "sym": False}}
    with open_checkpoint(str(tmp_path / "out")) as back:
        for name, tensor in tensors.items():
            assert torch.equal(back.quantized(name).parts["zero"], tensor.parts["zero"])
            assert back.quantized(name).scheme == back.schemes[name] == tensor.scheme
        assert back.notes == ()


def test_the_metadata_hold_what_readers_ask_for(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    scheme = Scheme.of("int", bits=4, group_size=32, sym=True)
    folder = tiny_llama(hidden=64, intermediate=96, layers=2, heads=2, vocab=300)
    with open_checkpoint(str(folder)) as source:
        tensors = {name: random_codes(scheme, *shape) for name, shape in linears(source).items()}
        write(source, tmp_path / "out", tensors, {"samples": 128})
    words = words_of(tmp_path / "out")
    for key, value in {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True, "lm_head": False}.items():
        assert words[key] == value
    assert words["meta"]["quantizer"][0].startswith("quantcli:")
    assert words["meta"]["quantcli"]["samples"] == 128
    assert not {"dynamic", "modules_in_block_to_quantize"} & words.keys()
    assert json.loads((tmp_path / "out" / "quantize_config.json").read_text()) == words
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    del config["quantization_config"]
    assert config == json.loads((folder / "config.json").read_text())
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


def test_transformers_takes_the_metadata(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    from transformers import AutoConfig, GPTQConfig

    quantized_folder(tiny_llama, tmp_path / "out", Scheme.of("int", bits=3, group_size=32, sym=False))
    words = AutoConfig.from_pretrained(tmp_path / "out").quantization_config
    parsed = GPTQConfig.from_dict(words)
    assert (parsed.bits, parsed.group_size, parsed.sym, parsed.desc_act, parsed.format) == (3, 32, False, False, "gptq_v2")


@pytest.mark.parametrize(
    ("skip", "listed"),
    [
        ("self_attn.o_proj", ["mlp.down_proj", "mlp.gate_proj", "mlp.up_proj", "self_attn.k_proj", "self_attn.q_proj", "self_attn.v_proj"]),
        ("layers.0.", [f"model.layers.1.{m}_proj" for m in ("mlp.down", "mlp.gate", "mlp.up", *(f"self_attn.{k}" for k in "koqv"))]),
    ],
)
def test_what_stays_dense_is_told_to_every_reader(tiny_llama: TinyLlama, tmp_path: Path, skip: str, listed: list[str]) -> None:
    scheme = Scheme.of("int", bits=4, group_size=32, sym=True)
    with open_checkpoint(str(tiny_llama(hidden=64, intermediate=96, layers=2, heads=2, vocab=300))) as source:
        tensors = {name: random_codes(scheme, *shape) for name, shape in linears(source).items() if skip not in name}
        write(source, tmp_path / "out", tensors)
        words = words_of(tmp_path / "out")
        assert words["modules_in_block_to_quantize"] == [listed]
        for name in linears(source):
            assert rule_of(words["dynamic"], module_of(name)) == ("stays dense" if name not in tensors else None)


def rule_of(dynamic: Mapping[str, Mapping], module: str) -> Mapping | str | None:
    """What GPTQModel and vLLM make of ``dynamic``: the first pattern that matches from the start of a name."""
    for key, value in dynamic.items():
        if re.match(key.removeprefix("-:").removeprefix("+:"), module):
            return "stays dense" if key.startswith("-:") else value
    return None


RULES = {
    "down_proj in 8 bits": (r"down_proj", "int8-g32-sym", r"model\.layers\.\d+\.mlp\.down_proj", ()),
    "q, k and v in 8 bits": (
        r"[qkv]_proj",
        "int8-g32-sym",
        None,
        ("model.layers.0.self_attn.qkv_proj", "model.layers.1.self_attn.qkv_proj"),
    ),
    "one layer in 3 bits": (r"layers\.1\.", "int3-g32-sym", None, ("model.layers.1.self_attn.qkv_proj", "model.layers.1.mlp.gate_up_proj")),
    "one linear in other groups": (r"layers\.1\.mlp\.down", "int4-channel-sym", None, ()),
}


@pytest.mark.parametrize("case", RULES)
def test_rules_reach_the_modules_on_disk_and_the_ones_that_engines_join(tiny_llama: TinyLlama, tmp_path: Path, case: str) -> None:
    pattern, scheme, shared, joined = RULES[case]
    main, other = Scheme.parse("int4-g32-sym"), Scheme.parse(scheme)
    with open_checkpoint(str(tiny_llama(hidden=64, intermediate=96, layers=2, heads=2, vocab=300))) as source:
        schemes = {name: other if re.search(pattern, name) else main for name in linears(source)}
        context = write(source, tmp_path / "out", {name: random_codes(schemes[name], *shape) for name, shape in linears(source).items()})
    dynamic = words_of(tmp_path / "out")["dynamic"]
    expected = {"bits": other.get("bits"), "group_size": other.get("group_size"), "sym": True}
    for name, chosen in schemes.items():
        assert rule_of(dynamic, module_of(name)) == (expected if chosen == other else None)
    for module in joined:
        assert rule_of(dynamic, module) == expected
    if shared is not None:
        assert list(dynamic) == [f"+:^{shared}$"]
    assert "transformers" in context.notes[0]
    assert len(context.notes) == 1
    with open_checkpoint(str(tmp_path / "out")) as back:
        assert list(map(str, back.schemes.values())) == [str(schemes[name]) for name in back.schemes]
        assert back.notes == ()


def test_ten_thousand_exact_rules_are_read_in_a_moment() -> None:
    """An expert each; a regular expression for every pair of module and rule would take minutes."""
    modules = [f"model.layers.{i}.mlp.experts.{j}.down_proj" for i in range(50) for j in range(200)]
    of = dynamic.reader({f"+:^{re.escape(module)}$": {"bits": i} for i, module in enumerate(modules)})
    started = time.process_time()
    assert [of(module) for module in modules] == [{"bits": i} for i in range(len(modules))]
    assert time.process_time() - started < 5


def test_the_first_rule_that_matches_wins_and_what_is_no_rule_is_passed_over() -> None:
    of = dynamic.reader(
        {"-:a": {}, r"+:^b\.c$": {"bits": 2}, "b": {"bits": 3}, r"+:^d\.e$": {"bits": 5}, "+:(": {}, "f": 7, "d": {"bits": 4}}
    )
    assert [of(module) for module in ("ab", "b.c", "b.d", "d.e", "d", "e", "f")] == [
        None, {"bits": 2}, {"bits": 3}, {"bits": 5}, {"bits": 4}, {}, {},
    ]  # fmt: skip
    assert dynamic.reader({"(a+)+$": {"bits": 2}})("a" * 60 + "b") == {}  # would take longer than the universe has stood
    assert dynamic.reader(None)("a") == dynamic.reader(["a"])("a") == dynamic.reader({"a" * 2000: {}})("a" * 2000) == {}


@pytest.mark.parametrize(("name", "tied"), [("model.embed_tokens.weight", False), ("lm_head.weight", True)])
def test_codes_where_no_reader_looks_for_them_are_refused(tiny_llama: TinyLlama, name: str, tied: bool) -> None:
    scheme = Scheme.parse("int4-g32-sym")
    with open_checkpoint(str(tiny_llama())) as source:
        source.config["tie_word_embeddings"] = tied
        with pytest.raises(RecipeError, match=rf"{name}: GPTQ quantizes the linears of decoder layers and an untied lm_head"):
            gptq.FORMAT.layout(source, {**dict.fromkeys(linears(source), scheme), name: scheme})


def test_a_quantized_lm_head_is_announced(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    scheme = Scheme.of("int", bits=8, group_size=32, sym=True)
    with open_checkpoint(str(tiny_llama(hidden=64, intermediate=96, layers=1, heads=2, vocab=320))) as source:
        tensors = {name: random_codes(scheme, *shape) for name, shape in {**linears(source), "lm_head.weight": (320, 64)}.items()}
        write(source, tmp_path / "out", tensors)
    assert words_of(tmp_path / "out")["lm_head"] is True
    assert "modules_in_block_to_quantize" not in words_of(tmp_path / "out")


def test_shards_of_a_quantized_model_read_the_same(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    scheme = Scheme.of("int", bits=4, group_size=32, sym=True)
    with open_checkpoint(str(tiny_llama(hidden=64, intermediate=96, layers=2, heads=2, vocab=300, shards=2))) as source:
        tensors = {name: random_codes(scheme, *shape) for name, shape in linears(source).items()}
        write(source, tmp_path / "out", tensors, max_shard_bytes=30_000)
        assert len(list((tmp_path / "out").glob("model-0000?-of-0000?.safetensors"))) > 2
        with open_checkpoint(str(tmp_path / "out")) as back:
            assert all(torch.equal(back.quantized(n).parts["codes"], t.parts["codes"]) for n, t in tensors.items())


def test_a_dense_scheme_changes_the_dtype_of_what_stays(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    scheme = Scheme.of("int", bits=4, group_size=32, sym=True)
    with open_checkpoint(str(tiny_llama(hidden=64, intermediate=96, layers=1, heads=2, vocab=300))) as source:
        head = source.read("lm_head.weight")
        data = QuantizedTensor(Scheme.of("f16"), tuple(head.shape), {"data": head.half()})
        tensors = {name: random_codes(scheme, *shape) for name, shape in linears(source).items()} | {"lm_head.weight": data}
        write(source, tmp_path / "out", tensors)
    assert files_of(tmp_path / "out")["lm_head.weight"].dtype == torch.float16


def test_a_quantized_source_is_written_again_without_loss(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    _, tensors = quantized_folder(tiny_llama, tmp_path / "a", Scheme.of("int", bits=4, group_size=32, sym=False))
    with open_checkpoint(str(tmp_path / "a")) as first:
        write(first, tmp_path / "b", {name: first.quantized(name) for name in tensors})
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


# ---- folders of other hands ----


def v1_words_of(tensor: QuantizedTensor, minus: int) -> torch.Tensor:
    """qzeros [groups, out·bits/32] packed by the loop with ``minus`` taken from every zero point."""
    rows = (tensor.parts["zero"].T.int() - minus).tolist()
    return torch.tensor([loop_pack(row, tensor.scheme.get("bits")) for row in rows], dtype=torch.int32)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("said", "stored"), [("gptq", 0), ("gptq_v2", 1), (None, 0)])
def test_symmetric_zeros_of_the_other_version_are_seen_and_read_right(
    tiny_llama: TinyLlama, tmp_path: Path, bits: int, said: str | None, stored: int
) -> None:
    _, tensors = quantized_folder(tiny_llama, tmp_path / "out", Scheme.of("int", bits=bits, group_size=32, sym=True))
    zeros = {f"{n.removesuffix('.weight')}.qzeros": v1_words_of(t, minus=stored) for n, t in tensors.items()}
    damage(tmp_path / "out", {"checkpoint_format": said}, **zeros)
    with open_checkpoint(str(tmp_path / "out")) as back:
        assert back.notes[0].startswith(f"checkpoint_format {said or 'gptq'} stores zero points")
        for name, tensor in tensors.items():
            assert torch.equal(back.quantized(name).parts["zero"], tensor.parts["zero"])


def test_a_symmetric_file_that_mixes_versions_is_read_right(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    _, tensors = quantized_folder(tiny_llama, tmp_path / "out", Scheme.of("int", bits=4, group_size=32, sym=True))
    damage(tmp_path / "out", **{f"{Q}.qzeros": v1_words_of(tensors[f"{Q}.weight"], minus=0)})
    with open_checkpoint(str(tmp_path / "out")) as back:
        for name, tensor in tensors.items():
            assert torch.equal(back.quantized(name).parts["zero"], tensor.parts["zero"])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_an_asymmetric_v1_of_positive_zeros_gets_its_ones_back(tiny_llama: TinyLlama, tmp_path: Path, bits: int) -> None:
    _, tensors = quantized_folder(tiny_llama, tmp_path / "out", Scheme.of("int", bits=bits, group_size=32, sym=False))
    for tensor in tensors.values():
        tensor.parts["zero"].clamp_(min=1)
    zeros = {f"{n.removesuffix('.weight')}.qzeros": v1_words_of(t, minus=1) for n, t in tensors.items()}
    damage(tmp_path / "out", {"checkpoint_format": "gptq"}, **zeros)
    with open_checkpoint(str(tmp_path / "out")) as back:
        assert back.notes == ()
        for name, tensor in tensors.items():
            assert torch.equal(back.quantized(name).parts["zero"], tensor.parts["zero"])


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_borrow_of_a_packed_subtraction_is_undone(tiny_llama: TinyLlama, tmp_path: Path, bits: int) -> None:
    """GPTQModel makes an asymmetric v1 by taking ones from whole words: a zero point 0 borrows from its neighbour."""
    _, tensors = quantized_folder(tiny_llama, tmp_path / "out", Scheme.of("int", bits=bits, group_size=32, sym=False))
    ones = sum(1 << (bits * i) for i in range(32 // bits))
    zeros = {}
    for name, tensor in tensors.items():
        tensor.parts["zero"][::7] = 0
        wrapped = (v1_words_of(tensor, minus=0).long() - ones) & 0xFFFFFFFF
        zeros[f"{name.removesuffix('.weight')}.qzeros"] = torch.where(wrapped >= 2**31, wrapped - 2**32, wrapped).int()
    damage(tmp_path / "out", {"checkpoint_format": "gptq"}, **zeros)
    with open_checkpoint(str(tmp_path / "out")) as back:
        for name, tensor in tensors.items():
            assert torch.equal(back.quantized(name).parts["zero"], tensor.parts["zero"])


def test_sym_that_is_not_true_is_noted_and_the_tensors_obeyed(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    _, tensors = quantized_folder(tiny_llama, tmp_path / "out", Scheme.of("int", bits=4, group_size=32, sym=False))
    damage(tmp_path / "out", {"sym": True})
    with open_checkpoint(str(tmp_path / "out")) as back:
        assert "zero points" in back.notes[0]
        assert torch.equal(back.quantized(f"{Q}.weight").parts["zero"], tensors[f"{Q}.weight"].parts["zero"])
        assert back.schemes[f"{Q}.weight"].get("sym") is False


CONTRADICTIONS = {
    "bits": ({"bits": 8}, "the bits declared are not those of model.layers.0"),
    "groups": ({"group_size": 64}, "the group_size declared is not that of model.layers.0"),
    "a rule's bits": ({"dynamic": {r"+:.*\.q_proj": {"bits": 8}}}, f"the bits declared are not those of {Q} \\(4 bits, groups of 32\\);"),
    "a rule that leaves out": ({"dynamic": {r"-:.*\.[qk]_proj": {}}}, r"the metadata leave .*\.k_proj \(.* and 1 more dense, which"),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_words_that_contradict_the_tensors_are_noted(tiny_llama: TinyLlama, tmp_path: Path, case: str) -> None:
    words, note = CONTRADICTIONS[case]
    _, tensors = quantized_folder(tiny_llama, tmp_path / "out", Scheme.of("int", bits=4, group_size=32, sym=True))
    damage(tmp_path / "out", words)
    with open_checkpoint(str(tmp_path / "out")) as back:
        assert len(back.notes) == 1
        assert re.search(note, back.notes[0])
        assert torch.equal(back.quantized(f"{Q}.weight").parts["codes"], tensors[f"{Q}.weight"].parts["codes"])


def test_a_first_group_that_only_looks_symmetric_does_not_mislead(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    """An asymmetric tensor of a v1 file said to be symmetric, whose first group has the zero point of a symmetric one in v2."""
    _, tensors = quantized_folder(tiny_llama, tmp_path / "out", Scheme.of("int", bits=4, group_size=32, sym=False))
    zero = tensors[f"{Q}.weight"].parts["zero"]
    zero.clamp_(min=1)
    zero[:, 0] = 9
    damage(tmp_path / "out", {"checkpoint_format": "gptq", "sym": True}, **{f"{Q}.qzeros": v1_words_of(tensors[f"{Q}.weight"], minus=1)})
    with open_checkpoint(str(tmp_path / "out")) as back:
        got = back.quantized(f"{Q}.weight")
        assert torch.equal(got.parts["zero"], zero)
        assert got.scheme.get("sym") is False


def test_a_g_idx_out_of_order_is_obeyed_whatever_desc_act_says(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    quantized_folder(tiny_llama, tmp_path / "out", Scheme.of("int", bits=4, group_size=32, sym=True, desc_act=True))
    damage(tmp_path / "out", {"desc_act": False})
    with open_checkpoint(str(tmp_path / "out")) as back:
        assert "desc_act is false" in back.notes[0]
        assert torch.equal(back.read(f"{Q}.weight"), loop_decode(files_of(tmp_path / "out"), Q, 4, plus=1))


def test_bits_and_groups_come_from_the_shapes_and_g_idx_may_be_absent(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    _, tensors = quantized_folder(tiny_llama, tmp_path / "out", Scheme.of("int", bits=4, group_size=32, sym=True))
    expected = loop_decode(files_of(tmp_path / "out"), Q, 4, plus=1)
    gone = {f"{name.removesuffix('.weight')}.g_idx": None for name in tensors}
    damage(tmp_path / "out", {"bits": 8, "group_size": 16}, **gone)
    with open_checkpoint(str(tmp_path / "out")) as back:
        assert str(back.schemes[f"{Q}.weight"]) == "int4-g32-sym"
        assert torch.equal(back.read(f"{Q}.weight"), expected)


def test_a_short_last_group_is_read(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    quantized_folder(tiny_llama, tmp_path / "out", Scheme.of("int", bits=4, group_size=32, sym=True))
    groups = torch.arange(64, dtype=torch.int32) // 48  # 48 and 16 inputs, two groups as before
    damage(tmp_path / "out", {"group_size": 48}, **{f"{Q}.g_idx": groups})
    with open_checkpoint(str(tmp_path / "out")) as back:
        assert torch.equal(back.read(f"{Q}.weight"), loop_decode(files_of(tmp_path / "out"), Q, 4, plus=1))


def test_a_folder_of_autogptq_speaks_in_quantize_config_alone(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    _, tensors = quantized_folder(tiny_llama, tmp_path / "out", Scheme.of("int", bits=4, group_size=32, sym=True))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    old = {"bits": 4, "group_size": 32, "damp_percent": 0.01, "desc_act": False, "sym": True, "true_sequential": True}
    (tmp_path / "out" / "quantize_config.json").write_text(json.dumps(old))
    with open_checkpoint(str(tmp_path / "out")) as back:
        assert back.kind == "gptq"
        assert torch.equal(back.quantized(f"{Q}.weight").parts["codes"], tensors[f"{Q}.weight"].parts["codes"])


def test_two_configs_that_differ_are_noted(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    quantized_folder(tiny_llama, tmp_path / "out", Scheme.of("int", bits=4, group_size=32, sym=True))
    words = words_of(tmp_path / "out") | {"desc_act": True}
    (tmp_path / "out" / "quantize_config.json").write_text(json.dumps(words))
    with open_checkpoint(str(tmp_path / "out")) as back:
        assert "desc_act False / True" in back.notes[0]


@pytest.mark.parametrize("words", [{"checkpoint_format": "marlin"}, {"is_marlin_format": True}, {"checkpoint_format": "gptq_p"}])
def test_an_engines_private_layout_is_unsupported(tiny_llama: TinyLlama, tmp_path: Path, words: dict) -> None:
    quantized_folder(tiny_llama, tmp_path / "out", Scheme.of("int", bits=4, group_size=32, sym=True))
    damage(tmp_path / "out", words)
    with pytest.raises(UnsupportedError, match=r"checkpoint_format '(marlin|gptq_p)'"):
        open_checkpoint(str(tmp_path / "out"))


I32 = torch.int32
BAD_TENSORS: dict[str, dict[str, torch.Tensor | None]] = {
    "no qzeros": {f"{Q}.qzeros": None},
    "no scales": {f"{Q}.scales": None},
    "no qweight": {f"{Q}.qweight": None},
    "scales of integers": {f"{Q}.scales": torch.ones(2, 64, dtype=I32)},
    "qweight of floats": {f"{Q}.qweight": torch.ones(8, 64)},
    "a flat qweight": {f"{Q}.qweight": torch.ones(512, dtype=I32)},
    "no group at all": {f"{Q}.qzeros": torch.ones(0, 8, dtype=I32), f"{Q}.scales": torch.ones(0, 64).half()},
    "five bits": {f"{Q}.qzeros": torch.ones(2, 10, dtype=I32)},
    "a part of a bit": {f"{Q}.qzeros": torch.ones(2, 9, dtype=I32)},
    "scales of another width": {f"{Q}.scales": torch.ones(2, 63).half()},
    "scales of another height": {f"{Q}.scales": torch.ones(3, 64).half()},
    "groups that do not divide": {f"{Q}.qzeros": torch.ones(3, 8, dtype=I32), f"{Q}.scales": torch.ones(3, 64).half()},
    "a long g_idx": {f"{Q}.g_idx": torch.zeros(65, dtype=I32)},
    "a g_idx of floats": {f"{Q}.g_idx": torch.zeros(64)},
    "both forms": {f"{Q}.weight": torch.zeros(64, 64)},
}


@pytest.mark.parametrize("what", BAD_TENSORS)
def test_tensors_that_fit_no_layout_are_an_error_by_name(tiny_llama: TinyLlama, tmp_path: Path, what: str) -> None:
    quantized_folder(tiny_llama, tmp_path / "out", Scheme.of("int", bits=4, group_size=32, sym=True))
    damage(tmp_path / "out", **BAD_TENSORS[what])
    with pytest.raises(CheckpointError, match=Q.replace(".", r"\.")):
        open_checkpoint(str(tmp_path / "out"))


@pytest.mark.parametrize("group", [-1, 2])
def test_a_g_idx_that_points_outside_is_an_error(tiny_llama: TinyLlama, tmp_path: Path, group: int) -> None:
    quantized_folder(tiny_llama, tmp_path / "out", Scheme.of("int", bits=4, group_size=32, sym=True, desc_act=True))
    damage(tmp_path / "out", **{f"{Q}.g_idx": torch.full((64,), group, dtype=I32)})
    with pytest.raises(CheckpointError, match=r"q_proj\.g_idx: groups"), open_checkpoint(str(tmp_path / "out")) as back:
        back.read(f"{Q}.weight")


def test_words_of_gptq_over_a_dense_folder_are_an_error(tiny_llama: TinyLlama) -> None:
    folder = tiny_llama(hidden=64, intermediate=96, layers=1, heads=2)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq", "bits": 4}}))
    with pytest.raises(CheckpointError, match=r"no tensor's name ends in \.qweight"):
        open_checkpoint(str(folder))


def test_words_of_any_type_are_an_error_or_read_right(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    _, tensors = quantized_folder(tiny_llama, tmp_path / "out", Scheme.of("int", bits=4, group_size=32, sym=True))
    expected = tensors[f"{Q}.weight"].parts
    good = words_of(tmp_path / "out")
    odd = [None, -1, 0, 7, 1e9, True, "4", "", [], [4], {}, {"a": 1}, 2**70]
    read = 0
    for key in ("bits", "group_size", "sym", "desc_act", "checkpoint_format", "quant_method", "meta", "dynamic", "is_marlin_format"):
        for value in odd:
            damage(tmp_path / "out", {**good, key: value})
            try:
                with open_checkpoint(str(tmp_path / "out")) as back:
                    got = back.quantized(f"{Q}.weight").parts
            except (CheckpointError, UnsupportedError):
                continue
            read += 1
            assert all(torch.equal(got[part], expected[part]) for part in ("codes", "scale", "zero")), (key, value)
    assert read > 50


@pytest.mark.parametrize("n", [300, pytest.param(5000, marks=pytest.mark.slow)])
def test_damaged_folders_are_an_error_or_read(tiny_llama: TinyLlama, tmp_path: Path, n: int) -> None:
    scheme = Scheme.of("int", bits=4, group_size=32, sym=False, desc_act=True)
    folder = packed_folders.tiny_folder(gptq, tiny_llama, tmp_path / "out", scheme)
    damage(folder, {"dynamic": {r"+:^model\.layers\.0\.mlp\.down_proj$": {"bits": 4, "group_size": 32}, "-:lm_head": {}}})
    assert wrong_answers(folder, tmp_path, seed=0, n=n) == []


# ---- plan-time refusals ----


@pytest.mark.parametrize(
    ("shape", "bits", "group_size", "message"),
    [
        ((64, 96), 4, 64, "in_features 96 is not a multiple of the int4-g64-sym block 64"),
        ((60, 64), 4, 32, "out_features 60 is not a multiple of 8"),
        ((48, 64), 3, 32, "out_features 48 is not a multiple of 32"),
        ((64, 48), 3, -1, "in_features 48 is not a multiple of 32"),
        ((64, 8), 2, -1, "in_features 8 is not a multiple of 16"),
        ((64, 64, 64), 4, 32, "codes matrices"),
    ],
)
def test_a_shape_that_readers_refuse_is_refused_when_planning(
    tiny_llama: TinyLlama, shape: tuple[int, ...], bits: int, group_size: int, message: str
) -> None:
    scheme = Scheme.of("int", bits=bits, group_size=group_size, sym=True)
    with open_checkpoint(str(tiny_llama(hidden=64, intermediate=96, layers=1, heads=2))) as source:
        context = gptq.FORMAT.layout(source, dict.fromkeys(linears(source), scheme))
    with pytest.raises(RecipeError, match=message) as caught:
        context.outputs(TensorSpec.dense("model.x.weight", "F16", shape), scheme)
    assert "model.x.weight" in str(caught.value)


def test_other_number_formats_are_refused(tiny_llama: TinyLlama) -> None:
    assert [gptq.FORMAT.supports(Scheme.of("int", bits=b)) for b in (2, 3, 4, 5, 8)] == [True, True, True, False, True]
    assert not gptq.FORMAT.supports(Scheme.of("q4_k"))
    with (
        open_checkpoint(str(tiny_llama(hidden=64, intermediate=96, layers=1, heads=2))) as source,
        pytest.raises(RecipeError, match="nothing to write"),
    ):
        gptq.FORMAT.layout(source, {})


def test_a_bug_that_would_pass_in_marlin_alone_is_caught(tiny_llama: TinyLlama) -> None:
    scheme = Scheme.of("int", bits=4, group_size=32, sym=True)
    with open_checkpoint(str(tiny_llama(hidden=64, intermediate=96, layers=1, heads=2))) as source:
        context = gptq.FORMAT.layout(source, dict.fromkeys(linears(source), scheme))
    tensor = random_codes(scheme, 64, 64)
    tensor.parts["zero"][3, 1] = 7
    with pytest.raises(ValueError, match=f"{Q}.weight: int4-g32-sym is symmetric"):
        context.parts(f"{Q}.weight", tensor)
    tensor = random_codes(scheme, 64, 64)
    too_large = {**tensor.parts, "scale": torch.full((64, 2), 1e6)}
    with pytest.raises(NumericsError, match=r"q_proj\.scales: a value of magnitude 1e"):
        context.parts(f"{Q}.weight", QuantizedTensor(scheme, (64, 64), too_large))


def test_every_byte_is_planned(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    quantized_folder(tiny_llama, tmp_path / "out", Scheme.of("int", bits=3, group_size=32, sym=False))
    written = files_of(tmp_path / "out")
    assert {t.dtype for n, t in written.items() if n.endswith("scales")} == {torch.float16}
    q = {n.rpartition(".")[2]: (DTYPE_NAMES[t.dtype], tuple(t.shape)) for n, t in written.items() if n.startswith(Q)}
    assert q == {"qweight": ("I32", (6, 64)), "qzeros": ("I32", (2, 6)), "scales": ("F16", (2, 64)), "g_idx": ("I32", (64,))}
    assert math.prod(q["qweight"][1]) * 32 == 64 * 64 * 3
