"""compressed-tensors folders against the library's own bytes, and against a loop that packs one code at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from quantcli import recipe
from quantcli.calibration.data import Windows
from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.errors import CheckpointError, RecipeError, UnsupportedError
from quantcli.formats import Request, open_checkpoint
from quantcli.formats import compressed_tensors as ct
from quantcli.formats.compressed_tensors import cache
from quantcli.formats.compressed_tensors import config as config_module
from quantcli.formats.compressed_tensors.config import group_config
from quantcli.formats.compressed_tensors.match import Patterns, is_tame, targets_of
from quantcli.passes import rtn
from quantcli.planning import engines
from quantcli.recipe import PassSpec, Recipe
from quantcli.tensors import QuantizedTensor, Scheme, TensorSpec
from quantcli.walk.events import Planned
from support.mutations import wrong_answers
from support.places import DATA
from support.runs import run

TinyLlama = Callable[..., Path]
GOLDEN = DATA / "compressed_tensors.safetensors"
Q = "model.layers.0.self_attn.q_proj"
SMALL: dict[str, Any] = {"hidden": 64, "intermediate": 96, "layers": 1, "heads": 2, "kv_heads": 1, "vocab": 512}

SCHEMES_OF_GOLDEN = {
    "W2A16": "int2-g128-sym-sbf16",
    "W3A16": "int3-g128-sym-sbf16",
    "W4A16": "int4-g128-sym-sbf16",
    "W8A16": "int8-g128-sym-sbf16",
    "W4A16_ASYM": "int4-g128-asym-sbf16",
    "W5A16": "int5-channel-sym-sbf16",
    "W8A8": "int8-channel-sym-sbf16+int8-token",
    "W4A8": "int4-g128-sym-sbf16+int8-token",
    "FP8_DYNAMIC": "fp8-channel-sbf16+fp8-token",
    "FP8": "fp8-tensor-sbf16+fp8-tensor",
    "MXFP4A16": "mxfp4",
    "MXFP4": "mxfp4+mxfp4-g32",
    "MXFP8A16": "mxfp8",
    "NVFP4A16": "nvfp4",
    "FP8_BLOCK": "fp8-block-sbf16+fp8-g128",
    "W4A16_CHANNEL_ASYM": "int4-channel-asym-sbf16",
    "W3A16_ASYM": "int3-g32-asym-sbf16",
    "W4A16_RAGGED": "int4-channel-sym-sbf16",
    "FP8_WEIGHT_ONLY": "fp8-channel-sbf16",
}
READ_ONLY = ("W3A16_ASYM", "W4A16_RAGGED", "FP8_BLOCK")  # for their shapes


def golden() -> tuple[dict[str, torch.Tensor], dict[str, dict[str, Any]]]:
    """(tensors, config group of each case) as tests/data/make_compressed_tensors.py had them from the library."""
    with safe_open(GOLDEN, "pt") as file:
        return load_file(GOLDEN), json.loads(file.metadata()["groups"])


TENSORS, GROUPS = golden()


def files_of_case(case: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(f"{case}."): t for name, t in TENSORS.items() if name.startswith(f"{case}.") and not name.endswith(".dense")}


def write_golden(folder: Path, *cases: str, words: Mapping[str, Any] | None = None, **tensors: torch.Tensor | None) -> Path:
    """A folder of the library's tensors of ``cases``, one module each; ``tensors`` replace or remove some by ``CASE.local``."""
    folder.mkdir(exist_ok=True)
    file = {f"{case}.{local}": t for case in cases for local, t in files_of_case(case).items()}
    file |= {name.replace("__", "."): t for name, t in tensors.items() if t is not None}
    gone = {name.replace("__", ".") for name, t in tensors.items() if t is None}
    save_file({f"model.layers.0.{name}": t for name, t in file.items() if name not in gone}, folder / "model.safetensors")
    groups = {f"group_{i}": {**GROUPS[case], "targets": [f"model.layers.0.{case}"]} for i, case in enumerate(cases)}
    stated = {
        "quant_method": "compressed-tensors",
        "config_groups": groups,
        "ignore": [],
        "quantization_status": "compressed",
        **(words or {}),
    }
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "dtype": "bfloat16", "quantization_config": stated}))
    return folder


def opened(folder: Path) -> Checkpoint:
    return open_checkpoint(str(folder))


# ---- the library's own tensors ----


@pytest.mark.parametrize("case", SCHEMES_OF_GOLDEN)
def test_what_the_library_stored_is_read_as_the_library_decodes_it(tmp_path: Path, case: str) -> None:
    dense, name = TENSORS[f"{case}.dense"], f"model.layers.0.{case}.weight"
    with opened(write_golden(tmp_path / "in", case)) as found:
        assert found.kind == "compressed-tensors"
        assert str(found.schemes[name]) == SCHEMES_OF_GOLDEN[case]
        assert found.specs.keys() == {name}
        assert found.specs[name].nbytes == sum(t.nbytes for t in files_of_case(case).values())
        assert torch.equal(found.read(name).to(dense.dtype), dense)
        assert [note for note in found.notes if "int5" not in note] == []


@pytest.mark.parametrize("case", [case for case in SCHEMES_OF_GOLDEN if case not in READ_ONLY])
def test_the_parts_of_a_tensor_are_written_as_the_library_stored_them(tmp_path: Path, case: str) -> None:
    with opened(write_golden(tmp_path / "in", case)) as source:
        ((name, scheme),) = source.schemes.items()
        context = ct.FORMAT.layout(source, source.schemes)
        written = context.parts(name, source.quantized(name))
        announced = context.outputs(source.specs[name], scheme)
    expected = {f"model.layers.0.{case}.{local}": t for local, t in files_of_case(case).items()}
    if scale := expected.get(f"model.layers.0.{case}.input_scale"):
        expected[f"model.layers.0.{case}.input_scale"] = scale.float()
    assert written.keys() == expected.keys() == {spec.name for spec in announced}
    for local, tensor in expected.items():
        assert torch.equal(written[local].view(torch.uint8), tensor.view(torch.uint8)), local
    assert {s.name: s.nbytes for s in announced} == {n: t.nbytes for n, t in written.items()}


@pytest.mark.parametrize("case", [case for case in SCHEMES_OF_GOLDEN if case != "W5A16"])
def test_a_scheme_is_said_in_the_librarys_words(case: str) -> None:
    """Every key that the library leaves out is one that it takes, and means what it leaves out: nothing."""
    ours = config_module.group_config(Scheme.parse(SCHEMES_OF_GOLDEN[case]), ["Linear"])
    theirs = GROUPS[case]
    assert ours.keys() == theirs.keys()
    assert ours["format"] == theirs["format"]
    for side in ("weights", "input_activations"):
        if theirs[side] is None:
            assert ours[side] is None
            continue
        # How scales were found is no reader's business; a dtype that follows from the rest is left out for old releases.
        told = theirs[side].keys() - {"observer"} - ({"scale_dtype"} if case == "NVFP4A16" else set())
        assert {key: ours[side][key] for key in told} == {key: theirs[side][key] for key in told}
        assert all(ours[side][key] in (None, {}, "torch.int8") for key in ours[side].keys() - told)


def test_one_folder_may_hold_every_format(tmp_path: Path) -> None:
    with opened(write_golden(tmp_path / "in", *SCHEMES_OF_GOLDEN)) as found:
        assert {name.split(".")[3]: str(scheme) for name, scheme in found.schemes.items()} == SCHEMES_OF_GOLDEN
        for case in SCHEMES_OF_GOLDEN:
            assert torch.equal(found.read(f"model.layers.0.{case}.weight").to(torch.bfloat16), TENSORS[f"{case}.dense"])


# ---- the layout, one code at a time ----


def loop_pack(codes: list[int], bits: int) -> list[int]:
    """Codes one bit at a time into a long integer, then cut into signed 32-bit words."""
    run = sum(code << (bits * i) for i, code in enumerate(codes))
    words = [(run >> (32 * w)) & 0xFFFFFFFF for w in range(-(-len(codes) * bits // 32))]
    return [w - 2**32 if w >= 2**31 else w for w in words]


def loop_pack_apart(codes: list[int], bits: int) -> list[int]:
    """⌊32/bits⌋ codes a word, as old writers had it for 3, 5, 6 and 7 bits."""
    n = 32 // bits
    return [word for i in range(0, len(codes), n) for word in loop_pack(codes[i : i + n], bits)]


def random_codes(scheme: Scheme, out: int, n_in: int, seed: int = 0) -> QuantizedTensor:
    """A random tensor of integers that uses every code, and every zero point when asymmetric."""
    g = torch.Generator().manual_seed(seed)
    bits, size = scheme.option("bits"), scheme.option("group_size")
    n_groups = 1 if size == -1 else n_in // size
    parts = {
        "codes": torch.randint(0, 2**bits, (out, n_in), generator=g, dtype=torch.uint8),
        "scale": (torch.rand(out, n_groups, generator=g) + 0.01).to(torch.bfloat16),
        "zero": torch.randint(0, 2**bits, (out, n_groups), generator=g, dtype=torch.uint8),
    }
    if scheme.option("sym"):
        parts["zero"] = torch.full((out, n_groups), 2 ** (bits - 1), dtype=torch.uint8)
    if scheme.static_activations:
        parts["input_scale"] = torch.tensor([0.125])
    return QuantizedTensor(scheme, (out, n_in), parts)


def linears(source: Checkpoint) -> dict[str, tuple[int, ...]]:
    return {name: spec.shape for name, spec in source.specs.items() if "_proj.weight" in name}


def write(source: Checkpoint, target: Path, tensors: Mapping[str, QuantizedTensor], **options: int) -> None:
    schemes = {name: tensor.scheme for name, tensor in tensors.items()}
    context = ct.FORMAT.layout(source, schemes, Request(options=options))
    outputs = [out for spec in source.specs.values() for out in context.outputs(spec, schemes.get(spec.name))]
    with context.writer(target, outputs, {}, overwrite=False) as writer:
        for name in source.specs:
            tensor = tensors[name] if name in tensors else source.read(name)
            for part, data in context.parts(name, tensor).items():
                writer.put(part, data)
        writer.commit()


def quantized_folder(tiny_llama: TinyLlama, target: Path, scheme: str, **options: Any) -> tuple[Path, dict[str, QuantizedTensor]]:
    """A small model whose linears are random codes of ``scheme``, written to ``target``; (source folder, codes)."""
    folder = tiny_llama(**{**SMALL, **options})
    with opened(folder) as source:
        tensors = {name: random_codes(Scheme.parse(scheme), *shape, seed=i) for i, (name, shape) in enumerate(linears(source).items())}
        write(source, target, tensors)
    return folder, tensors


def words_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return found


def damage(folder: Path, words: Mapping[str, Any] | None = None, **tensors: torch.Tensor | None) -> None:
    """Change ``quantization_config`` and tensors of a written folder by a foreign hand; None removes."""
    file = load_file(folder / "model.safetensors") | {name: t for name, t in tensors.items() if t is not None}
    save_file({name: t for name, t in file.items() if tensors.get(name, t) is not None}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    merged = {**config["quantization_config"], **(words or {})}
    config["quantization_config"] = {key: value for key, value in merged.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))


INTEGERS = [f"int{bits}-{group}-{sym}-sbf16" for bits in (2, 4, 8) for group in ("g32", "channel") for sym in ("sym", "asym")]


@pytest.mark.parametrize("scheme", [*INTEGERS, "int8-channel-sym-sbf16+int8-token", "int8-channel-sym-sbf16+int8-tensor"])
def test_codes_come_back_bit_for_bit(tiny_llama: TinyLlama, tmp_path: Path, scheme: str) -> None:
    folder, tensors = quantized_folder(tiny_llama, tmp_path / "out", scheme, bias=True)
    with opened(tmp_path / "out") as back, opened(folder) as source:
        assert back.notes == ()
        assert back.specs.keys() == source.specs.keys()
        assert {name: str(found) for name, found in back.schemes.items()} == dict.fromkeys(tensors, scheme)
        for name, tensor in tensors.items():
            got = back.quantized(name).parts
            assert got.keys() == tensor.parts.keys()
            assert all(torch.equal(got[part], value) for part, value in tensor.parts.items())
        for name in source.specs.keys() - tensors.keys():
            assert torch.equal(back.read(name), source.read(name))


def test_words_run_along_the_inputs_and_zero_points_along_the_outputs(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    _, tensors = quantized_folder(tiny_llama, tmp_path / "out", "int4-g32-asym-sbf16")
    parts, file = tensors[f"{Q}.weight"].parts, load_file(tmp_path / "out" / "model.safetensors")
    assert file[f"{Q}.weight_packed"].tolist() == [loop_pack(row, 4) for row in parts["codes"].tolist()]
    assert file[f"{Q}.weight_zero_point"].T.tolist() == [loop_pack(column, 4) for column in parts["zero"].T.tolist()]
    assert file[f"{Q}.weight_shape"].tolist() == [64, 64]
    assert torch.equal(file[f"{Q}.weight_scale"], parts["scale"])


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
@pytest.mark.parametrize("pack", [loop_pack, loop_pack_apart])
def test_odd_bits_are_read_dense_and_as_old_writers_left_words_unfilled(tmp_path: Path, bits: int, pack: Callable) -> None:
    g = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (16, 64), generator=g)
    zeros = torch.randint(0, 2**bits, (16, 2), generator=g)
    folder = write_golden(
        tmp_path / "in",
        "W3A16_ASYM",
        W3A16_ASYM__weight_packed=torch.tensor([pack(row, bits) for row in codes.tolist()], dtype=torch.int32),
        W3A16_ASYM__weight_zero_point=torch.tensor([pack(row, bits) for row in zeros.T.tolist()], dtype=torch.int32).T.contiguous(),
        W3A16_ASYM__weight_scale=torch.ones(16, 2),
        W3A16_ASYM__weight_shape=torch.tensor([16, 64]),
        words={"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights_of(num_bits=bits, symmetric=False)}}},
    )
    with opened(folder) as found:
        W = found.read("model.layers.0.W3A16_ASYM.weight")
    assert torch.equal(W, (codes - zeros.repeat_interleave(32, 1)).float())


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
@pytest.mark.parametrize("kind", ["sym", "asym"])
def test_odd_bits_are_written_dense_and_read_back(tiny_llama: TinyLlama, tmp_path: Path, bits: int, kind: str) -> None:
    """As the library packs them since 0.19, zero points along the outputs; the plan tells who reads them."""
    scheme = Scheme.parse(f"int{bits}-g32-{kind}")
    made = Recipe(name="rtn", passes=(PassSpec("rtn"),), scheme=scheme, format="compressed-tensors")
    source = tiny_llama(**SMALL | {"kv_heads": 2})
    plan, *_ = run(source, tmp_path / "out", made)
    assert any(f"codes of {bits} bits run on from word to word" in note for note in plan.notes)
    with opened(tmp_path / "out") as found, opened(source) as dense:
        assert found.notes == ()
        parts, file = found.quantized(f"{Q}.weight").parts, load_file(tmp_path / "out" / "model.safetensors")
        assert {str(scheme) for scheme in found.schemes.values()} == {f"{scheme}-sbf16"}
        W, expected = found.read(f"{Q}.weight"), dense.read(f"{Q}.weight").float()
    assert file[f"{Q}.weight_packed"].tolist() == [loop_pack(row, bits) for row in parts["codes"].tolist()]
    if kind == "asym":
        assert file[f"{Q}.weight_zero_point"].T.tolist() == [loop_pack(row, bits) for row in parts["zero"].T.tolist()]
    assert float((W - expected).norm() / expected.norm()) < 2.5 / 2**bits


@pytest.mark.parametrize("name", [n for n in recipe.shipped() if recipe.load(n).format == "compressed-tensors"])
def test_no_release_meets_a_key_that_it_refuses(name: str) -> None:
    """compressed-tensors forbids unknown keys since 0.11, null or not: what MX formats need came with them, in 0.13."""
    scheme = recipe.load(name).scheme
    assert scheme is not None
    group = group_config(scheme, ["Linear"])
    assert group.keys() == engines.SCHEME_KEYS
    later = {"scale_dtype"} if scheme.qtype.startswith("mx") else set()
    for side in ("weights", "input_activations"):
        assert (group[side] or {}).keys() <= engines.ARGUMENT_KEYS["0.12.2"] | later
    assert cache.kv_cache_scheme("fp8").keys() <= engines.ARGUMENT_KEYS["0.12.2"]


def weights_of(**changes: Any) -> dict[str, Any]:
    return {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32, "dynamic": False, **changes}


# ---- folders of other hands ----


def test_an_old_folder_speaks_under_the_old_key(tmp_path: Path) -> None:
    folder = write_golden(tmp_path / "in", "W4A16")
    config = json.loads((folder / "config.json").read_text())
    words = config.pop("quantization_config")
    nested = {"quantization_config": {k: v for k, v in words.items() if k != "quant_method"}, "sparsity_config": None}
    (folder / "config.json").write_text(json.dumps({**config, "compression_config": nested}))
    with opened(folder) as found:
        assert found.kind == "compressed-tensors"
        assert torch.equal(found.read("model.layers.0.W4A16.weight").bfloat16(), TENSORS["W4A16.dense"])
        assert "compression_config" not in found.config


def test_zero_points_may_lie_unpacked_as_transformers_asks_for_them(tmp_path: Path) -> None:
    with opened(write_golden(tmp_path / "a", "W4A16_ASYM")) as found:
        zero = found.quantized("model.layers.0.W4A16_ASYM.weight").parts["zero"]
    plain = (zero.int() - 8).to(torch.int8)
    with opened(write_golden(tmp_path / "b", "W4A16_ASYM", W4A16_ASYM__weight_zero_point=plain)) as found:
        assert torch.equal(found.read("model.layers.0.W4A16_ASYM.weight").bfloat16(), TENSORS["W4A16_ASYM.dense"])


def test_act_order_of_old_files_is_obeyed(tmp_path: Path) -> None:
    g_idx = (torch.randperm(256, generator=torch.Generator().manual_seed(0)) // 128).int()
    with opened(write_golden(tmp_path / "in", "W4A16", W4A16__weight_g_idx=g_idx)) as found:
        got = found.quantized("model.layers.0.W4A16.weight")
        q = got.parts["codes"].float() - 8
        assert got.scheme.get("desc_act") is True
        assert torch.equal(found.read("model.layers.0.W4A16.weight"), q * got.parts["scale"].float()[:, g_idx.long()])


def test_an_unset_g_idx_means_groups_in_order(tmp_path: Path) -> None:
    with opened(write_golden(tmp_path / "in", "W4A16", W4A16__weight_g_idx=torch.full((256,), -1, dtype=torch.int32))) as found:
        assert torch.equal(found.read("model.layers.0.W4A16.weight").bfloat16(), TENSORS["W4A16.dense"])


def test_zero_points_of_zero_beside_symmetric_codes_change_nothing(tmp_path: Path) -> None:
    zeros = torch.zeros(8, 1, dtype=torch.int8)
    with opened(write_golden(tmp_path / "in", "W8A8", W8A8__weight_zero_point=zeros)) as found:
        assert str(found.schemes["model.layers.0.W8A8.weight"]) == SCHEMES_OF_GOLDEN["W8A8"]
        assert torch.equal(found.read("model.layers.0.W8A8.weight").bfloat16(), TENSORS["W8A8.dense"])


def test_bits_and_groups_come_from_the_shapes(tmp_path: Path) -> None:
    group = {**GROUPS["W4A16"], "weights": weights_of(num_bits=8, group_size=128)}
    with opened(write_golden(tmp_path / "in", "W4A16", words={"config_groups": {"g": group}})) as found:
        assert torch.equal(found.read("model.layers.0.W4A16.weight").bfloat16(), TENSORS["W4A16.dense"])
        assert "declared as int8, and the tensors hold int4" in found.notes[0]


def test_a_missing_weight_shape_follows_from_the_groups(tmp_path: Path) -> None:
    with opened(write_golden(tmp_path / "in", "W4A16", W4A16__weight_shape=None)) as found:
        assert torch.equal(found.read("model.layers.0.W4A16.weight").bfloat16(), TENSORS["W4A16.dense"])


CONTRADICTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "ignore": ({"ignore": ["lm_head", "re:.*router"]}, r"ignore names 'lm_head' and 1 more, and no module"),
    "targets": ({"config_groups": {"g": {**GROUPS["W4A16"], "targets": ["re:.*W4A16$", "gone"]}}}, r"targets 'gone', and no module"),
    "stray": ({"ignore": ["model.layers.0.W4A16"]}, r"'model.layers.0.W4A16' quantized, which ignore excludes"),
    "group size": ({"config_groups": {"g": {"targets": ["Linear"], "weights": weights_of(group_size=64)}}}, "groups of 128"),
    "asymmetric": (
        {"config_groups": {"g": {"targets": ["Linear"], "weights": weights_of(symmetric=False, group_size=128)}}},
        "no zero points",
    ),
    "a wild pattern": ({"ignore": ["re:((a+)+)+$"]}, "too complex a pattern"),
}


@pytest.mark.parametrize("what", CONTRADICTIONS)
def test_words_that_the_tensors_contradict_are_noted_and_the_tensors_obeyed(tmp_path: Path, what: str) -> None:
    words, message = CONTRADICTIONS[what]
    with opened(write_golden(tmp_path / "in", "W4A16", words=words)) as found:
        assert torch.equal(found.read("model.layers.0.W4A16.weight").bfloat16(), TENSORS["W4A16.dense"])
        assert any(re.search(message, note) for note in found.notes)


def test_a_dense_linear_that_a_group_claims_is_noted(tmp_path: Path) -> None:
    words = {"config_groups": {"g": GROUPS["W4A16"]}}
    with opened(write_golden(tmp_path / "in", "W4A16", words=words, gate__weight=torch.ones(4, 4))) as found:
        assert any("'model.layers.0.gate' dense and not named by ignore" in note for note in found.notes)


def test_bytes_of_integers_without_quantized_inputs_are_noted(tmp_path: Path) -> None:
    group = {**GROUPS["W8A8"], "input_activations": None}
    with opened(write_golden(tmp_path / "in", "W8A8", words={"config_groups": {"g": group}})) as found:
        assert "no input_activations" in found.notes[0]
        assert str(found.schemes["model.layers.0.W8A8.weight"]) == "int8-channel-sym-sbf16"


def test_a_static_scale_that_is_not_there_is_noted(tmp_path: Path) -> None:
    with opened(write_golden(tmp_path / "in", "FP8", FP8__input_scale=None)) as found:
        assert "no input_scale" in found.notes[0]
        assert str(found.schemes["model.layers.0.FP8.weight"]) == "fp8-tensor-sbf16"


def test_weights_with_a_scale_that_lie_dense_are_noted(tmp_path: Path) -> None:
    extra = {"other__weight": torch.ones(4, 4), "other__weight_scale": torch.ones(4, 1)}
    with opened(write_golden(tmp_path / "in", "W4A16", **extra)) as found:
        assert any("'model.layers.0.other.weight' dense and with a scale" in note for note in found.notes)


def test_a_model_that_is_not_compressed_yet_is_unsupported(tmp_path: Path) -> None:
    folder = write_golden(tmp_path / "in", words={"quantization_status": "frozen"}, q__weight=torch.ones(4, 4))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["config_groups"] = {"g": GROUPS["W4A16"]}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match="save_compressed=True"):
        opened(folder)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"format": "marlin-24"}, "sparse layout"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse layout"),
        ({"transform_config": {"config_groups": {"R1": {}}}}, "rotates weights"),
    ],
)
def test_sparse_and_rotated_weights_are_unsupported(tmp_path: Path, words: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        opened(write_golden(tmp_path / "in", "W4A16", words=words))


BAD_TENSORS: dict[str, tuple[str, dict[str, torch.Tensor | None], str]] = {
    "no scale": ("W4A16", {"W4A16__weight_scale": None}, "weight_scale is missing"),
    "no codes": ("W4A16", {"W4A16__weight_packed": None}, "no codes next to it"),
    "a shape of other rows": ("W4A16", {"W4A16__weight_shape": torch.tensor([9, 256])}, r"holds \[9, 256\]; its codes are \[8, 256\]"),
    "a shape of other inputs": ("W4A16", {"W4A16__weight_shape": torch.tensor([8, 512])}, r"its codes are \[8, 256\]"),
    "a shape beyond any": ("W4A16", {"W4A16__weight_shape": torch.tensor([8, 2**62])}, r"its codes are \[8, 256\]"),
    "a shape of other rows than a row of one group has": (
        "W4A16_RAGGED",
        {"W4A16_RAGGED__weight_shape": torch.tensor([19, 70])},
        r"weight_shape \[19, 70\] does not fit",
    ),
    "a shape of more inputs than fit": (
        "W4A16_RAGGED",
        {"W4A16_RAGGED__weight_shape": torch.tensor([20, 2**60])},
        "no number of bits from 1 to 8",
    ),
    "a shape of one number": ("W4A16", {"W4A16__weight_shape": torch.tensor([8])}, r"expected I64 \[2\]"),
    "scales of integers": ("W4A16", {"W4A16__weight_scale": torch.ones(8, 2, dtype=torch.int32)}, "weight_scale is I32"),
    "scales of other rows": ("W4A16", {"W4A16__weight_scale": torch.ones(9, 2)}, "groups that divide"),
    "groups that do not divide": ("W4A16", {"W4A16__weight_scale": torch.ones(8, 3)}, "groups that divide"),
    "words of floats": ("W4A16", {"W4A16__weight_packed": torch.ones(8, 32)}, "expected I32"),
    "zero points of other rows": ("W4A16_ASYM", {"W4A16_ASYM__weight_zero_point": torch.ones(2, 2, dtype=torch.int32)}, "packed along"),
    "a short g_idx": ("W4A16", {"W4A16__weight_g_idx": torch.zeros(8, dtype=torch.int32)}, r"expected I32 \[256\]"),
    "both forms": ("W4A16", {"W4A16__weight": torch.ones(8, 256)}, "both a .weight and"),
    "no global scale": ("NVFP4A16", {"NVFP4A16__weight_global_scale": None}, "weight_global_scale is missing"),
    "fp8 without a scale": ("FP8", {"FP8__weight_scale": None}, "weight_scale is missing"),
    "blocks of another size": ("FP8_BLOCK", {"FP8_BLOCK__weight_scale": torch.ones(3, 3)}, "no scale for each row or block"),
    "scales of fp8 in bytes": ("FP8_DYNAMIC", {"FP8_DYNAMIC__weight_scale": torch.ones(8, 1, dtype=torch.uint8)}, "for mxfp8"),
}


@pytest.mark.parametrize("what", BAD_TENSORS)
def test_tensors_that_fit_no_layout_are_an_error_by_name(tmp_path: Path, what: str) -> None:
    case, tensors, message = BAD_TENSORS[what]
    with (
        pytest.raises(CheckpointError, match=rf"model\.layers\.0\.{case}.*{message}"),
        opened(write_golden(tmp_path / "in", case, **tensors)) as found,
    ):
        found.read(f"model.layers.0.{case}.weight")


@pytest.mark.parametrize(
    ("case", "local", "tensor", "message"),
    [
        ("W4A16", "weight_g_idx", torch.full((256,), 2, dtype=torch.int32), "groups 2 … 2"),
        ("W4A8", "weight", torch.full((8, 256), 8, dtype=torch.int8), "beyond the 4 bits"),
        ("W8A8", "weight_zero_point", torch.full((8, 1), 128, dtype=torch.int32), "are no int8"),
    ],
)
def test_contents_that_no_engine_could_mean_are_an_error_when_read(
    tmp_path: Path, case: str, local: str, tensor: torch.Tensor, message: str
) -> None:
    folder = write_golden(tmp_path / "in", case, **{f"{case}__{local}": tensor})
    with opened(folder) as found, pytest.raises(CheckpointError, match=message):
        found.read(f"model.layers.0.{case}.weight")


MUTATED = ("W4A16_ASYM", "W8A8", "FP8", "NVFP4A16", "MXFP8A16")


@pytest.mark.parametrize("n", [300, pytest.param(5000, marks=pytest.mark.slow)])
def test_mutations_are_an_error_or_read_right(tmp_path: Path, n: int) -> None:
    folder = write_golden(tmp_path / "in", *MUTATED, words={"ignore": ["lm_head", "re:.*gate$"]})
    assert wrong_answers(folder, tmp_path, seed=0, n=n) == []


@pytest.mark.parametrize(
    ("pattern", "tame"),
    [
        ("re:.*self_attn.*_proj$", True),
        (r"re:.*layers\.\d+\..*experts\.\d+\.(gate|up)_proj$", True),
        (r"re:(.*\.)?mlp\.", True),
        ("re:(a+)+$", False),
        ("re:(.*)*", False),
        ("re:(a|aa)*$", False),
        ("re:(a?a?)*$", False),
        (f"re:{'.*a' * 9}", False),
        (f"re:{'a?' * 30}{'a' * 30}", False),
        (f"re:{'(' * 90}a{')' * 90}", True),
    ],
)
def test_a_pattern_that_could_take_forever_is_told_apart(pattern: str, tame: bool) -> None:
    assert is_tame(pattern) is tame


# ---- what is written, and what is refused ----


def test_every_other_linear_is_ignored_and_a_tied_head_too(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    with opened(tiny_llama(**{**SMALL, "layers": 2, "tied": True})) as source:
        tensors = {n: random_codes(Scheme.parse("int4-g32-sym-sbf16"), *s) for n, s in linears(source).items() if "layers.1.mlp" not in n}
        write(source, tmp_path / "out", tensors)
    words = words_of(tmp_path / "out")
    assert words["ignore"] == ["lm_head", *(f"model.layers.1.mlp.{name}_proj" for name in ("down", "gate", "up"))]
    assert words["config_groups"]["group_0"]["targets"] == ["Linear"]
    with opened(tmp_path / "out") as back:
        assert back.notes == ()


def test_schemes_that_differ_are_groups_that_name_their_members(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    """No group targets a class: vLLM would find it before the members of a fused q/k/v."""
    four, eight, fp8 = (Scheme.parse(s) for s in ("int4-g32-sym-sbf16", "int8-g32-sym-sbf16", "fp8-channel-sbf16+fp8-token"))
    with opened(tiny_llama(**{**SMALL, "layers": 3})) as source:
        tensors = {}
        for name, shape in linears(source).items():
            if "down_proj" in name:
                tensors[name] = rtn.quantize(source.read(name), fp8)
            elif "o_proj" not in name:
                tensors[name] = random_codes(eight if "layers.1.self_attn" in name else four, *shape)
        write(source, tmp_path / "out", tensors)
    words = words_of(tmp_path / "out")
    assert words["format"] == "mixed-precision"
    found = {tuple(g["targets"]): (g["format"], g["weights"]["num_bits"]) for g in words["config_groups"].values()}
    qkv = {i: [f"model.layers.{i}.self_attn.{k}_proj" for k in "kqv"] for i in range(3)}
    patterns = [rf"re:^model\.layers\.\d+\.mlp\.{name}_proj$" for name in ("gate", "up")]
    assert found == {
        (*patterns, *qkv[0], *qkv[2]): ("pack-quantized", 4),
        tuple(qkv[1]): ("pack-quantized", 8),
        (r"re:^model\.layers\.\d+\.mlp\.down_proj$",): ("float-quantized", 8),
    }
    with opened(tmp_path / "out") as back:
        assert back.notes == ()
        assert {n: str(s) for n, s in back.schemes.items()} == {n: str(t.scheme) for n, t in tensors.items()}


def test_a_pattern_means_its_modules_and_no_others() -> None:
    members = [f"model.layers.{i}.mlp.experts.{j}.w1" for i in range(2) for j in range(12)]
    others = ["model.layers.0.mlp.experts.w1", "model.layersx0.mlp.experts.1.w1", "x.model.layers.0.mlp.experts.1.w1"]
    (target,) = targets_of(members, others)
    found = Patterns([target])
    assert all(found.find(name) == target for name in members)
    assert all(found.find(name) is None for name in others)


def test_the_key_value_cache_stays_quantized(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    _, tensors = quantized_folder(tiny_llama, tmp_path / "a", "int4-g32-sym-sbf16")
    kv = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
    scales = {f"model.layers.0.self_attn.{k}_scale": torch.tensor([0.5]) for k in "kv"}
    damage(tmp_path / "a", {"kv_cache_scheme": kv}, **scales)
    with opened(tmp_path / "a") as source:
        assert source.notes == ()
        write(source, tmp_path / "b", {name: source.quantized(name) for name in tensors})
    assert words_of(tmp_path / "b")["kv_cache_scheme"] == kv
    first, second = (load_file(tmp_path / folder / "model.safetensors") for folder in "ab")
    assert first.keys() == second.keys() > scales.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_scales_are_suited_to_the_models_dtype() -> None:
    assert str(ct.FORMAT.suited(Scheme.parse("int4-g128-sym"), {"dtype": "bfloat16"})) == "int4-g128-sym-sbf16"
    assert str(ct.FORMAT.suited(Scheme.parse("fp8-channel+fp8-token"), {"torch_dtype": "float16"})) == "fp8-channel-sf16+fp8-token"
    assert str(ct.FORMAT.suited(Scheme.parse("int4-g128-sym"), {})) == "int4-g128-sym-sf32"
    assert ct.FORMAT.suited(Scheme.parse("mxfp4"), {"dtype": "bfloat16"}) == Scheme.parse("mxfp4")


@pytest.mark.parametrize(
    ("scheme", "held"),
    [
        *((f"int{bits}-g32-{kind}", True) for bits in range(2, 9) for kind in ("sym", "asym")),
        ("int8-channel-sym+int8-token", True),
        ("int4-g128-sym-desc", False),
        ("int4-g128-sym+fp8-token", False),
        ("fp8-channel", True),
        ("fp8-channel-e5m2", False),
        ("fp8-block+fp8-g128", True),
        ("nvfp4+nvfp4-g16", True),
        ("mxfp4+mxfp8-g32", False),
        ("mxfp8+mxfp8-g32", True),
        ("q4_k", False),
        ("bf16", True),
    ],
)
def test_the_format_knows_what_it_holds(scheme: str, held: bool) -> None:
    assert ct.FORMAT.supports(Scheme.parse(scheme)) is held


REFUSED: dict[str, tuple[dict[str, str], str]] = {
    "asymmetric weights under int8 inputs": ({"proj": "int8-channel-asym+int8-token"}, "vLLM runs quantized inputs on"),
    "groups under int8 inputs": ({"proj": "int8-g32-sym+int8-token"}, "vLLM runs quantized inputs on"),
    "blocks under inputs by token": ({"proj": "fp8-block+fp8-token"}, "fp8-block"),
    "rows under inputs by group": ({"proj": "fp8-channel+fp8-g128"}, "fp8-block"),
    "another q_proj": (
        {"q_proj": "int8-g32-sym", "[kvo]_proj|mlp": "int4-g32-sym"},
        "k_proj.weight is int4-g32-sym and .*q_proj.weight is int8-g32-sym",
    ),
    "a dense up_proj": ({"gate_proj|self_attn|down": "int4-g32-sym"}, "one matrix"),
    "an embedding": ({"proj": "int4-g32-sym", "embed_tokens": "int8-g32-sym"}, "it is none of these"),
    "nothing": ({"lm_head": "bf16"}, "no tensor is quantized"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_engines_refuse_is_refused_when_planning(tiny_llama: TinyLlama, what: str) -> None:
    rules, message = REFUSED[what]
    with opened(tiny_llama(**SMALL)) as source:
        matching = {name: [s for pattern, s in rules.items() if re.search(pattern, name)] for name in source.specs}
        schemes = {name: Scheme.parse(found[0]) for name, found in matching.items() if found}
        with pytest.raises(RecipeError, match=message):
            ct.FORMAT.layout(source, schemes)


@pytest.mark.parametrize(
    ("shape", "scheme", "message"),
    [
        ((64, 96), "int4-g64-sym", "in_features 96 is not a multiple of the int4-g64-sym block 64"),
        ((64, 60), "int4-channel-sym", "in_features 60 is not a multiple of 8"),
        ((60, 64), "int4-channel-asym", "out_features 60 is not a multiple of 8"),
        ((60, 200), "fp8-block+fp8-g128", "in_features 200 is not a multiple of 128"),
        ((64, 40), "nvfp4", "in_features 40"),
        ((2, 64, 64), "int4-g32-sym", "stores linears"),
    ],
)
def test_a_shape_that_readers_refuse_is_refused(tiny_llama: TinyLlama, shape: tuple[int, ...], scheme: str, message: str) -> None:
    spec = TensorSpec.dense(f"{Q}.weight", "BF16", shape)
    with opened(tiny_llama(**SMALL)) as source:
        context = ct.FORMAT.layout(
            source, {f"{Q}.weight": Scheme.parse("int8-g32-sym")} | dict.fromkeys(linears(source), Scheme.parse("int8-g32-sym"))
        )
    with pytest.raises(RecipeError, match=message):
        context.outputs(spec, Scheme.parse(scheme))


RECIPES = [name for name in recipe.shipped() if recipe.load(name).format == "compressed-tensors"]
KEEPING_THE_BASIS = [name for name in RECIPES if {p.name for p in recipe.load(name).passes} <= {"rtn", "gptq", "hqq"}]


def made_by(name: str, folder: Path, target: Path) -> Planned:
    """What the recipe ``name`` planned for ``folder``, written to ``target``."""
    data = Windows(torch.randint(0, 300, (4, 32), generator=torch.Generator().manual_seed(0)))
    planned, *_ = run(folder, target, recipe.load(name), data)
    assert isinstance(planned, Planned)
    return planned


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_writes_the_bytes_and_the_schemes_that_it_announced(tiny_llama: TinyLlama, tmp_path: Path, name: str) -> None:
    folder = tiny_llama(hidden=256, intermediate=384, layers=1, heads=4, kv_heads=2, vocab=512)
    planned = made_by(name, folder, tmp_path / "out")
    n_data = sum(t.nbytes for t in load_file(tmp_path / "out" / "model.safetensors").values())
    assert n_data == planned.plan.n_bytes
    scheme = recipe.load(name).scheme
    assert scheme is not None
    with opened(folder) as source, opened(tmp_path / "out") as back:
        assert back.notes == ()
        assert set(back.schemes) == set(linears(source))
        assert {str(s) for s in back.schemes.values()} == {str(ct.FORMAT.suited(scheme, source.config).with_options(**searched(scheme)))}


@pytest.mark.parametrize("name", KEEPING_THE_BASIS)
def test_what_a_recipe_wrote_reads_as_the_weights_it_was_made_from(tiny_llama: TinyLlama, tmp_path: Path, name: str) -> None:
    folder = tiny_llama(hidden=256, intermediate=384, layers=1, heads=4, kv_heads=2, vocab=512)
    made_by(name, folder, tmp_path / "out")
    with opened(folder) as source, opened(tmp_path / "out") as back:
        for weight in back.schemes:
            W, W_hat = source.read(weight).float(), back.read(weight)
            assert float((W - W_hat).norm() / W.norm()) < 0.3


def searched(scheme: Scheme) -> dict[str, Any]:
    """What of a scheme no file tells."""
    return {"search": "mse"} if "search" in dict(scheme.options) else {}
