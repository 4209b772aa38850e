"""AWQ folders against a loop that packs and decodes one nibble at a time, as AutoAWQ lays them out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from quantcli.errors import CheckpointError, RecipeError, UnsupportedError
from quantcli.formats import awq, open_checkpoint
from quantcli.tensors import QuantizedTensor, Scheme, TensorSpec
from support import packed_folders
from support.mutations import wrong_answers
from support.packed_folders import damage, files_of, linears, random_codes, words_of
from support.places import DATA
from support.tiny_models import TinyLlama

write = partial(packed_folders.write, awq)
quantized_folder = partial(packed_folders.quantized_folder, awq)

Q = "model.layers.0.self_attn.q_proj"
DOWN = "model.layers.0.mlp.down_proj"
SYM, ASYM = (Scheme.of("int", bits=4, group_size=32, sym=sym) for sym in (True, False))
I32 = torch.int32
GOLDEN = DATA / "awq_golden.safetensors"


def nibbles(words: torch.Tensor) -> np.ndarray:
    """The natural columns of each row: column 8·word + [0, 2, 4, 6, 1, 3, 5, 7][k] is nibble k."""
    out = np.empty((words.shape[0], 8 * words.shape[1]), dtype=np.int64)
    for r, row in enumerate(words.tolist()):
        for c, word in enumerate(row):
            for k, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
                out[r, 8 * c + column] = (word >> (4 * k)) & 15
    return out


def loop_decode(file: Mapping[str, torch.Tensor], module: str) -> torch.Tensor:
    """W[o, i] = scales[i // g, o] · (q[i, o] − z[i // g, o]), in double and rounded to float32."""
    q, z, scales = nibbles(file[f"{module}.qweight"]), nibbles(file[f"{module}.qzeros"]), file[f"{module}.scales"].numpy()
    group_size = len(q) // len(z)
    W = np.empty(q.shape[::-1])
    for i in range(len(q)):
        W[:, i] = scales[i // group_size].astype(float) * (q[i] - z[i // group_size])
    return torch.from_numpy(W.astype(np.float32))


@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize("sym", [True, False])
def test_codes_come_back_bit_for_bit_and_decode_as_the_layout_says(
    tiny_llama: TinyLlama, tmp_path: Path, sym: bool, group_size: int
) -> None:
    scheme = Scheme.of("int", bits=4, group_size=group_size, sym=sym)
    folder, tensors = quantized_folder(tiny_llama, tmp_path / "out", scheme, bias=True)
    file = files_of(tmp_path / "out")
    with open_checkpoint(str(tmp_path / "out")) as back, open_checkpoint(str(folder)) as source:
        assert back.kind == "awq"
        assert back.notes == ()
        assert back.specs.keys() == source.specs.keys()
        assert back.schemes == dict.fromkeys(tensors, scheme)
        for name, tensor in tensors.items():
            got = back.quantized(name)
            assert got.scheme == scheme
            assert got.parts.keys() == tensor.parts.keys()
            assert all(torch.equal(got.parts[part], value) for part, value in tensor.parts.items())
            assert back.specs[name].shape == source.specs[name].shape
        assert torch.equal(back.read(f"{Q}.weight"), loop_decode(file, Q))
        assert torch.equal(back.read(f"{DOWN}.weight"), loop_decode(file, DOWN))
        for name in source.specs.keys() - tensors.keys():
            assert torch.equal(back.read(name), source.read(name))


def test_words_are_those_of_autoawq_and_gptqmodel() -> None:
    """Codes and zero points, and what gptqmodel's own packer (AutoAWQ's code) made of them: tests/data/make_golden_awq.py."""
    golden = load_file(GOLDEN)
    scheme = Scheme.parse("int4-g32-asym")
    tensor = QuantizedTensor(scheme, tuple(golden["codes"].shape), {key: golden[key] for key in ("codes", "scale", "zero")})
    parts = awq.AwqLayout(dtypes={}, config={}, quantization={}).parts("x.weight", tensor)
    for part in ("qweight", "qzeros", "scales"):
        assert torch.equal(parts[f"x.{part}"], golden[part]), part


def test_the_metadata_hold_what_readers_ask_for(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    folder = tiny_llama(hidden=64, intermediate=96, layers=2, heads=2, vocab=300)
    with open_checkpoint(str(folder)) as source:
        write(source, tmp_path / "out", {name: random_codes(SYM, *shape) for name, shape in linears(source).items()}, {"samples": 128})
    words = words_of(tmp_path / "out")
    expected = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm", "modules_to_not_convert": None}
    assert {key: words[key] for key in expected} == expected
    assert words["meta"]["quantcli"]["samples"] == 128
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    del config["quantization_config"]
    assert config == json.loads((folder / "config.json").read_text())
    # A symmetric tensor has its zero point in the file: engines with zero_point true read it there.
    assert set(files_of(tmp_path / "out")[f"{Q}.qzeros"].flatten().tolist()) == {0x88888888 - 2**32}


def test_transformers_takes_the_metadata(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    from transformers import AutoConfig, AwqConfig

    quantized_folder(tiny_llama, tmp_path / "out", ASYM)
    parsed = AwqConfig.from_dict(AutoConfig.from_pretrained(tmp_path / "out").quantization_config)
    assert (parsed.bits, parsed.group_size, parsed.zero_point, parsed.format) == (4, 32, True, "gemm")


def test_what_stays_dense_is_listed_by_module(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    with open_checkpoint(str(tiny_llama(hidden=64, intermediate=96, layers=2, heads=2, vocab=300))) as source:
        tensors = {name: random_codes(SYM, *shape) for name, shape in linears(source).items() if "0.mlp.down_proj" not in name}
        write(source, tmp_path / "out", tensors)
    words = words_of(tmp_path / "out")
    assert sorted(words["modules_to_not_convert"]) == ["lm_head", DOWN]
    # GPTQModel's own loader asks here
    assert words["dynamic"] == {r"-:^model\.layers\.0\.mlp\.down_proj$": {}, r"-:^lm_head$": {}}
    with open_checkpoint(str(tmp_path / "out")) as back:
        assert back.notes == ()
        assert back.schemes.keys() == tensors.keys()


def test_symmetric_and_asymmetric_tensors_share_a_folder(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    with open_checkpoint(str(tiny_llama(hidden=64, intermediate=96, layers=1, heads=2, vocab=300))) as source:
        tensors = {name: random_codes(SYM if "down" in name else ASYM, *shape) for name, shape in linears(source).items()}
        write(source, tmp_path / "out", tensors)
    with open_checkpoint(str(tmp_path / "out")) as back:
        assert back.schemes == {name: tensor.scheme for name, tensor in tensors.items()}


def test_a_first_group_that_only_looks_symmetric_does_not_mislead(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    with open_checkpoint(str(tiny_llama(hidden=64, intermediate=96, layers=1, heads=2, vocab=300))) as source:
        tensors = {name: random_codes(ASYM, *shape) for name, shape in linears(source).items()}
        tensors[f"{Q}.weight"].parts["zero"][:, 0] = 8
        write(source, tmp_path / "out", tensors)
    with open_checkpoint(str(tmp_path / "out")) as back:
        assert back.quantized(f"{Q}.weight").scheme.get("sym") is False


def test_shards_of_a_quantized_model_read_the_same(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    with open_checkpoint(str(tiny_llama(hidden=64, intermediate=96, layers=2, heads=2, vocab=300, shards=2))) as source:
        tensors = {name: random_codes(ASYM, *shape) for name, shape in linears(source).items()}
        write(source, tmp_path / "out", tensors, max_shard_bytes=30_000)
        assert len(list((tmp_path / "out").glob("model-0000?-of-0000?.safetensors"))) > 2
        with open_checkpoint(str(tmp_path / "out")) as back:
            assert all(torch.equal(back.quantized(n).parts["codes"], t.parts["codes"]) for n, t in tensors.items())


# ---- folders of other hands ----


def test_a_folder_of_autoawq_that_speaks_in_quant_config_alone(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    _, tensors = quantized_folder(tiny_llama, tmp_path / "out", ASYM)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    (tmp_path / "out" / "quant_config.json").write_text(json.dumps({"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}))
    with open_checkpoint(str(tmp_path / "out")) as back:
        assert back.kind == "awq"
        assert back.notes == ()
        assert torch.equal(back.quantized(f"{Q}.weight").parts["codes"], tensors[f"{Q}.weight"].parts["codes"])


def test_words_of_gptqmodel_are_read(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    _, tensors = quantized_folder(tiny_llama, tmp_path / "out", SYM)
    more = {
        "checkpoint_format": "gemm",
        "format": "gemm",
        "zero_point": False,
        "sym": True,
        "desc_act": False,
        "dynamic": None,
        "lm_head": False,
    }
    damage(tmp_path / "out", more)
    with open_checkpoint(str(tmp_path / "out")) as back:
        assert back.notes == ()
        assert back.schemes == dict.fromkeys(tensors, SYM)


def test_bfloat16_scales_are_read(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    quantized_folder(tiny_llama, tmp_path / "out", ASYM)
    file = files_of(tmp_path / "out")
    damage(tmp_path / "out", **{f"{Q}.scales": file[f"{Q}.scales"].bfloat16()})
    with open_checkpoint(str(tmp_path / "out")) as back:
        assert str(back.schemes[f"{Q}.weight"]) == "int4-g32-asym-sbf16"
        expected = loop_decode(file | {f"{Q}.scales": file[f"{Q}.scales"].bfloat16().float()}, Q)
        assert torch.equal(back.read(f"{Q}.weight"), expected)


@pytest.mark.parametrize("version", ["gemv", "gemv_fast", "marlin", "exllama", "llm-awq", ["gemm"]])
def test_other_versions_are_unsupported(tiny_llama: TinyLlama, tmp_path: Path, version: object) -> None:
    quantized_folder(tiny_llama, tmp_path / "out", ASYM)
    damage(tmp_path / "out", {"version": version})
    with pytest.raises(UnsupportedError, match="quantcli reads gemm"):
        open_checkpoint(str(tmp_path / "out"))


def test_eight_bits_are_unsupported(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    quantized_folder(tiny_llama, tmp_path / "out", ASYM)
    damage(tmp_path / "out", **{f"{Q}.qweight": torch.ones(64, 16, dtype=I32), f"{Q}.qzeros": torch.ones(2, 16, dtype=I32)})
    with pytest.raises(UnsupportedError, match="q_proj has 8 bits"):
        open_checkpoint(str(tmp_path / "out"))


NOTES = {
    "bits": ({"bits": 8}, "bits is 8, and the tensors are packed in 4"),
    "groups": ({"group_size": 64}, "group_size is 64, and model.layers.0"),
    "a dense module that is quantized": ({"modules_to_not_convert": ["q_proj"]}, f"'q_proj', and {Q}.weight is quantized"),
    "a dense module that is nowhere": ({"modules_to_not_convert": ["lm_head", "vision"]}, "'vision', which is in no tensor's name"),
}


@pytest.mark.parametrize("case", NOTES)
def test_words_that_contradict_the_tensors_are_noted(tiny_llama: TinyLlama, tmp_path: Path, case: str) -> None:
    words, note = NOTES[case]
    _, tensors = quantized_folder(tiny_llama, tmp_path / "out", ASYM)
    damage(tmp_path / "out", words)
    with open_checkpoint(str(tmp_path / "out")) as back:
        assert len(back.notes) == 1
        assert note in back.notes[0]
        assert torch.equal(back.quantized(f"{Q}.weight").parts["codes"], tensors[f"{Q}.weight"].parts["codes"])


def test_scaled_activations_are_folded_into_the_linear_that_reads_them(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    """AutoAWQ: ``act(x) / scales`` goes into the next linear, in MLPs without a gate."""
    quantized_folder(tiny_llama, tmp_path / "out", ASYM)
    scales = (torch.rand(96, generator=torch.Generator().manual_seed(1)) + 0.5).half()
    damage(tmp_path / "out", **{"model.layers.0.mlp.act.scales": scales})
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    expected = (x / scales.double()) @ loop_decode(files_of(tmp_path / "out"), DOWN).double().T
    with open_checkpoint(str(tmp_path / "out")) as back:
        W = back.read(f"{DOWN}.weight")
        assert torch.allclose(x @ W.double().T, expected, rtol=1e-5, atol=1e-5)
        assert f"{DOWN}.weight" not in back.schemes
        assert "model.layers.0.mlp.act.scales" not in back.specs
        assert back.specs[f"{DOWN}.weight"].dtype == "F32"
        assert "divided by it and read as dense" in back.notes[0]
        assert f"{Q}.weight" in back.schemes


def test_scaled_activations_that_no_linear_reads_are_unsupported(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    quantized_folder(tiny_llama, tmp_path / "out", ASYM)
    damage(tmp_path / "out", **{"model.layers.0.mlp.act.scales": torch.ones(95)})
    with pytest.raises(UnsupportedError, match=r"mlp\.act\.scales F32 \[95\] scales an activation, and 0 linears"):
        open_checkpoint(str(tmp_path / "out"))


BAD_TENSORS: dict[str, dict[str, torch.Tensor | None]] = {
    "no qzeros": {f"{Q}.qzeros": None},
    "no scales": {f"{Q}.scales": None},
    "no qweight": {f"{Q}.qweight": None},
    "scales of integers": {f"{Q}.scales": torch.ones(2, 64, dtype=I32)},
    "qweight of floats": {f"{Q}.qweight": torch.ones(64, 8)},
    "GPTQ's packing": {f"{Q}.qweight": torch.ones(8, 64, dtype=I32)},
    "no group at all": {f"{Q}.qzeros": torch.ones(0, 8, dtype=I32), f"{Q}.scales": torch.ones(0, 64).half()},
    "scales of another width": {f"{Q}.scales": torch.ones(2, 63).half()},
    "scales of another height": {f"{Q}.scales": torch.ones(3, 64).half()},
    "groups that do not divide": {f"{Q}.qzeros": torch.ones(3, 8, dtype=I32), f"{Q}.scales": torch.ones(3, 64).half()},
    "both forms": {f"{Q}.weight": torch.zeros(64, 64)},
}


@pytest.mark.parametrize("what", BAD_TENSORS)
def test_tensors_that_fit_no_layout_are_an_error_by_name(tiny_llama: TinyLlama, tmp_path: Path, what: str) -> None:
    quantized_folder(tiny_llama, tmp_path / "out", ASYM)
    damage(tmp_path / "out", **BAD_TENSORS[what])
    with pytest.raises(CheckpointError, match=Q.replace(".", r"\.")):
        open_checkpoint(str(tmp_path / "out"))


@pytest.mark.parametrize("n", [300, pytest.param(5000, marks=pytest.mark.slow)])
def test_damaged_folders_are_an_error_or_read(tiny_llama: TinyLlama, tmp_path: Path, n: int) -> None:
    folder = packed_folders.tiny_folder(awq, tiny_llama, tmp_path / "out", ASYM)
    assert wrong_answers(folder, tmp_path, seed=0, n=n) == []


# ---- plan-time refusals ----


@pytest.mark.parametrize(
    ("schemes", "message"),
    [
        ({"": "int4-g32-sym", "down": "int4-channel-sym"}, "AWQ has one group size for the whole model"),
        (
            {"": "int4-g32-sym", "k_proj": None},
            r"k_proj\.weight is dense and .*q_proj\.weight is int4.*run these as one",
        ),
        ({"": "int4-g32-sym", "lm_head": "int4-g32-sym"}, r"lm_head\.weight: AWQ's readers expect .* --format gptq"),
        ({"": None}, "nothing to write as AWQ"),
    ],
)
def test_what_no_engine_loads_is_refused_when_planning(tiny_llama: TinyLlama, schemes: dict[str, str | None], message: str) -> None:
    with open_checkpoint(str(tiny_llama(hidden=64, intermediate=96, layers=1, heads=2))) as source:
        names = [*linears(source), *(["lm_head.weight"] if "lm_head" in schemes else [])]
        words = {name: next((s for key, s in reversed(schemes.items()) if key in name)) for name in names}
        with pytest.raises(RecipeError, match=message):
            awq.FORMAT.layout(source, {name: Scheme.parse(word) for name, word in words.items() if word})


def test_a_dense_module_whose_name_begins_a_quantized_one_is_refused(tiny_llama: TinyLlama) -> None:
    """Engines look for modules_to_not_convert inside of names: a router "mlp.gate" would take "mlp.gate_proj" with it."""
    with open_checkpoint(str(tiny_llama(hidden=64, intermediate=96, layers=1, heads=2))) as source:
        schemes = dict.fromkeys(linears(source), SYM)
        source.specs["model.layers.0.mlp.gate.weight"] = TensorSpec.dense("model.layers.0.mlp.gate.weight", "F32", (4, 64))
        with pytest.raises(RecipeError, match=r"mlp\.gate stays dense, and readers would leave out .*mlp\.gate_proj"):
            awq.FORMAT.layout(source, schemes)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("model.x.weight", (64, 48), "in_features 48 is not a multiple of the int4-g32-asym block 32"),
        ("model.x.weight", (60, 64), "out_features 60 is not a multiple of 8"),
        ("model.x.weight", (8, 64, 64), "codes matrices"),
        ("model.experts.gate_up", (64, 64), "named <module>.weight"),
    ],
)
def test_a_shape_that_readers_refuse_is_refused_when_planning(
    tiny_llama: TinyLlama, name: str, shape: tuple[int, ...], message: str
) -> None:
    with open_checkpoint(str(tiny_llama(hidden=64, intermediate=96, layers=1, heads=2))) as source:
        context = awq.FORMAT.layout(source, dict.fromkeys(linears(source), ASYM))
    with pytest.raises(RecipeError, match=message) as caught:
        context.outputs(TensorSpec.dense(name, "F16", shape), ASYM)
    assert name in str(caught.value)


def test_what_the_layout_cannot_hold_is_refused() -> None:
    words = [
        "int4-g128-sym",
        "int4-channel-asym",
        "int4-g16-sym",
        "int3-g128-sym",
        "int4-g128-sym-desc",
        "int4-g128-sym-sbf16",
        "q4_k",
        "f16",
    ]
    assert [word for word in words if awq.FORMAT.supports(Scheme.parse(word))] == ["int4-g128-sym", "int4-channel-asym", "f16"]
