"""FP8 folders: what is written for which engine, what others publish, and five thousand that are damaged."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import quantcli as qc
from quantcli import recipe
from quantcli.errors import CheckpointError, RecipeError, UnsupportedError
from quantcli.formats import open_checkpoint
from quantcli.planning.selection import with_text
from quantcli.qtypes.fp8 import QTYPE as fp8
from quantcli.recipe import Rule
from quantcli.tensors import Scheme
from support.mutations import wrong_answers
from support.runs import run
from support.tiny_models import TinyLlama

RECIPES = ("fp8-block", "fp8-tensor", "fp8-tensor-static")
Q = "model.layers.0.self_attn.q_proj"
EXPERTS = "model.layers.0.mlp.experts"

Tensors = dict[str, Tensor]


def quantize(source: Path, target: Path, how: recipe.Recipe) -> list[Any]:
    return run(source, target, with_text(how, samples=2, seq_len=64))


def words_of(folder: Path) -> dict[str, Any]:
    words: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return words


@pytest.fixture(scope="module")
def source(tiny_llama: TinyLlama) -> Path:
    return tiny_llama(hidden=192, intermediate=320, layers=1, heads=3, kv_heads=1)


@pytest.fixture(scope="module")
def folders(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder that each recipe makes of ``source``, whose sides are no multiples of 128."""
    root = tmp_path_factory.mktemp("fp8")
    for name in RECIPES:
        quantize(source, root / name, recipe.load(name))
    return {name: root / name for name in RECIPES}


def changed(folder: Path, target: Path, change: Callable[[Tensors, dict[str, Any]], None]) -> Path:
    """``folder`` with its tensors and its quantization_config as ``change`` leaves them."""
    tensors, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    change(tensors, config["quantization_config"])
    target.mkdir()
    save_file(tensors, target / "model.safetensors")
    (target / "config.json").write_text(json.dumps(config))
    return target


def published(target: Path, tensors: Tensors, **words: Any) -> Path:
    """A folder as someone else publishes it."""
    target.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, target / "model.safetensors")
    config = {"model_type": "llama", "dtype": "bfloat16", "quantization_config": {"quant_method": "fp8", **words}}
    (target / "config.json").write_text(json.dumps(config))
    return target


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def e4m3(*shape: int, seed: int = 0) -> Tensor:
    return (40 * random(*shape, seed=seed)).to(torch.float8_e4m3fn)


# --- what is written -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_what_is_written_reads_back_as_the_codes_that_were_chosen(name: str, folders: dict[str, Path], source: Path) -> None:
    with open_checkpoint(str(folders[name])) as back, open_checkpoint(str(source)) as dense:
        assert (back.kind, back.notes) == ("fp8", ())
        assert back.specs.keys() == dense.specs.keys()
        assert set(back.schemes.values()) == {recipe.load(name).scheme}
        for weight in dense.specs:
            assert back.specs[weight].shape == dense.specs[weight].shape
            if weight not in back.schemes:
                assert torch.equal(back.read(weight), dense.read(weight))
            elif name == "fp8-block":
                assert torch.equal(back.read(weight), fp8.unpack(fp8.encode(dense.read(weight), recipe.load(name).scheme)))


@pytest.mark.parametrize("name", RECIPES)
def test_the_dry_run_knows_every_byte(name: str, folders: dict[str, Path], source: Path) -> None:
    plan = qc.plan(source, name)
    written = load_file(folders[name] / "model.safetensors")
    assert plan.n_bytes == sum(tensor.numel() * tensor.element_size() for tensor in written.values())
    assert {spec.name: spec.shape for spec in plan.outputs} == {key: tuple(tensor.shape) for key, tensor in written.items()}


def test_the_plan_says_which_blocks_are_cut(source: Path, tiny_llama: TinyLlama) -> None:
    def notes(model: Path, name: str) -> str:
        return " ".join(qc.plan(model, name).notes)

    assert "7 matrices such as model.layers.0.mlp.down_proj.weight [192, 320] have sides that are no multiples of 128" in notes(
        source, "fp8-block"
    )
    assert "128" not in notes(source, "fp8-tensor")
    assert "128" not in notes(tiny_llama(hidden=256, intermediate=384, layers=1, heads=2, kv_heads=1), "fp8-block")


def test_blocks_are_written_as_transformers_and_deepseek_name_them(folders: dict[str, Path]) -> None:
    written = load_file(folders["fp8-block"] / "model.safetensors")
    assert (written[f"{Q}.weight"].dtype, tuple(written[f"{Q}.weight"].shape)) == (torch.float8_e4m3fn, (192, 192))
    assert (written[f"{Q}.weight_scale_inv"].dtype, tuple(written[f"{Q}.weight_scale_inv"].shape)) == (torch.float32, (2, 2))
    words = words_of(folders["fp8-block"])
    assert (words["quant_method"], words["activation_scheme"], words["weight_block_size"]) == ("fp8", "dynamic", [128, 128])
    assert words["modules_to_not_convert"] == words["ignored_layers"] == ["lm_head", "model.embed_tokens"]


@pytest.mark.parametrize(("name", "activations"), [("fp8-tensor", "dynamic"), ("fp8-tensor-static", "static")])
def test_one_scale_a_weight_is_written_as_vllm_names_it(name: str, activations: str, folders: dict[str, Path]) -> None:
    written = load_file(folders[name] / "model.safetensors")
    words = words_of(folders[name])
    assert (words["activation_scheme"], words["weight_block_size"]) == (activations, None)
    parts = {key.removeprefix(f"{Q}."): (tensor.dtype, tuple(tensor.shape)) for key, tensor in written.items() if key.startswith(Q)}
    expected = {"weight": (torch.float8_e4m3fn, (192, 192)), "weight_scale": (torch.float32, (1,))}
    assert parts == expected | ({"input_scale": (torch.float32, (1,))} if activations == "static" else {})


def test_matrices_that_vllm_joins_share_their_scale(folders: dict[str, Path]) -> None:
    written = load_file(folders["fp8-tensor"] / "model.safetensors")
    scales = {linear: float(written[f"model.layers.0.{linear}.weight_scale"]) for linear in (
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj"
    )}  # fmt: skip
    q, k, v, o, gate, up = scales.values()
    assert q == k == v != o
    assert gate == up != q


def test_every_matrix_left_dense_is_listed_for_both_readers_and_a_tied_head_too(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    tied = tiny_llama(hidden=128, intermediate=128, layers=2, heads=2, kv_heads=2, vocab=512, tied=True)
    how = replace(recipe.load("fp8-block"), rules=(Rule.parse(r"layers\.1\.mlp\.down_proj", "keep"),))
    quantize(tied, tmp_path / "out", how)
    words = words_of(tmp_path / "out")
    assert words["modules_to_not_convert"] == ["lm_head", "model.embed_tokens", "model.layers.1.mlp.down_proj"]
    assert words["ignored_layers"] == words["modules_to_not_convert"]
    with open_checkpoint(str(tmp_path / "out")) as back:
        assert back.notes == ()


def test_what_engines_refuse_is_refused(source: Path, tmp_path: Path) -> None:
    base = recipe.load("fp8-block")
    for how, error, words in (
        (replace(base, scheme=Scheme.parse("fp8-channel")), UnsupportedError, "cannot hold fp8-channel"),
        (replace(base, scheme=Scheme.parse("fp8-block-e5m2")), UnsupportedError, "cannot hold fp8-block-e5m2"),
        (replace(base, scheme=Scheme.parse("int8-channel-sym")), UnsupportedError, "cannot hold int8-channel-sym"),
        (replace(base, rules=(Rule.parse("o_proj", "fp8-tensor"),)), RecipeError, "one scheme for all weights"),
        (
            replace(base, rules=(Rule.parse("lm_head", "fp8-block"),)),
            RecipeError,
            "lm_head.weight: the fp8 format quantizes the linears of",
        ),
        (replace(base, rules=(Rule.parse("proj", "keep"),)), RecipeError, "no tensor is quantized"),
    ):
        with pytest.raises(error, match=words):
            quantize(source, tmp_path / "out", how)


def test_a_scheme_that_says_nothing_of_inputs_gets_what_engines_do_to_them(source: Path, tmp_path: Path) -> None:
    quantize(source, tmp_path / "out", replace(recipe.load("fp8-block"), scheme=Scheme.parse("fp8-block")))
    with open_checkpoint(str(tmp_path / "out")) as back:
        assert {str(scheme) for scheme in back.schemes.values()} == {"fp8-block+fp8-g128"}


# --- what others publish -------------------------------------------------------------------------------------------------------------


def test_blocks_of_another_size_are_read_as_declared_or_else_as_their_shapes_say(tmp_path: Path) -> None:
    data, scale = e4m3(96, 128), random(3, 4).abs()
    expected = data.float() * scale.repeat_interleave(32, 0).repeat_interleave(32, 1)
    for i, (declared, n_notes) in enumerate((([32, 32], 0), ([128, 128], 1), (None, 1))):
        tensors = {f"{Q}.weight": data, f"{Q}.weight_scale_inv": scale}
        with open_checkpoint(str(published(tmp_path / str(i), tensors, weight_block_size=declared))) as found:
            assert torch.equal(found.read(f"{Q}.weight"), expected)
            assert len(found.notes) == n_notes
            assert found.schemes[f"{Q}.weight"].get("block") == (32, 32)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e8m0fnu, torch.float32, torch.bfloat16])
def test_scales_that_are_powers_of_two_are_read_in_each_of_their_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    data, exponent = e4m3(130, 256), torch.tensor([[120, 121], [119, 127]], dtype=torch.uint8)
    scale = (exponent.float() - 127).exp2()
    stored = exponent if dtype == torch.uint8 else exponent.view(dtype) if dtype == torch.float8_e8m0fnu else scale.to(dtype)
    folder = published(
        tmp_path / "in", {f"{Q}.weight": data, f"{Q}.weight_scale_inv": stored}, weight_block_size=[128, 128], scale_fmt="ue8m0"
    )
    with open_checkpoint(str(folder)) as found:
        expected = data.float() * scale.repeat_interleave(128, 0)[:130].repeat_interleave(128, 1)
        assert torch.equal(found.read(f"{Q}.weight"), expected)
        assert found.notes == ()


@pytest.mark.parametrize("name", ["gate_up_proj_scale_inv", "gate_up_proj_scales_inv"])
def test_a_stack_of_experts_is_read_matrix_by_matrix(name: str, tmp_path: Path) -> None:
    data, scale = e4m3(3, 192, 128), random(3, 2, 1).abs()
    folder = published(tmp_path / "in", {f"{EXPERTS}.gate_up_proj": data, f"{EXPERTS}.{name}": scale}, weight_block_size=[128, 128])
    with open_checkpoint(str(folder)) as found:
        assert found.specs.keys() == {f"{EXPERTS}.gate_up_proj"}
        expected = data.float() * scale.repeat_interleave(128, 1)[:, :192]
        assert torch.equal(found.read(f"{EXPERTS}.gate_up_proj"), expected)


@pytest.mark.parametrize("shape", [(), (3,), (3, 1, 1)])
def test_a_stack_of_experts_may_have_one_scale_a_matrix_or_one_for_all(shape: tuple[int, ...], tmp_path: Path) -> None:
    data, scale = e4m3(3, 96, 64), random(math.prod(shape)).abs().view(shape)
    folder = published(tmp_path / "in", {f"{EXPERTS}.down_proj": data, f"{EXPERTS}.down_proj_scale": scale})
    with open_checkpoint(str(folder)) as found:
        assert torch.equal(found.read(f"{EXPERTS}.down_proj"), data.float() * (scale.view(-1, 1, 1)))


def test_two_e2m1_in_a_byte_are_read_as_deepseek_v4_writes_its_experts(tmp_path: Path) -> None:
    packed = torch.randint(-128, 128, (8, 32), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    exponent = torch.randint(120, 130, (8, 2), dtype=torch.uint8)
    tensors = {f"{EXPERTS}.0.w1.weight": packed, f"{EXPERTS}.0.w1.scale": exponent.view(torch.float8_e8m0fnu)}
    tensors |= {f"{Q}.weight": e4m3(8, 8), f"{Q}.weight_scale": torch.ones(1)}
    with open_checkpoint(str(published(tmp_path / "in", tensors, expert_dtype="fp4"))) as found:
        W = found.read(f"{EXPERTS}.0.w1.weight")
        assert (tuple(W.shape), found.specs[f"{EXPERTS}.0.w1.weight"].shape) == ((8, 64), (8, 64))
        assert str(found.schemes[f"{EXPERTS}.0.w1.weight"]) == "mxfp4"
        levels = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
        for column in (0, 1, 62, 63):
            code = int(packed[3, column // 2]) >> (4 * (column % 2)) & 15
            expected = levels[code & 7] * (-1 if code & 8 else 1) * 2.0 ** (int(exponent[3, column // 32]) - 127)
            assert float(W[3, column]) == expected


@pytest.mark.parametrize(
    ("scale", "input_scale"), [("weight_scale", "input_scale"), ("qscale_weight", "qscale_act"), ("weight_scale_inv", "activation_scale")]
)
def test_one_scale_a_weight_is_read_under_each_of_its_names(scale: str, input_scale: str, tmp_path: Path) -> None:
    tensors = {f"{Q}.weight": e4m3(8, 16), f"{Q}.{scale}": torch.tensor(0.25), f"{Q}.{input_scale}": torch.tensor([2.0])}
    with open_checkpoint(str(published(tmp_path / "in", tensors, activation_scheme="static", weight_block_size=None))) as found:
        assert found.specs.keys() == {f"{Q}.weight"}
        assert torch.equal(found.read(f"{Q}.weight"), tensors[f"{Q}.weight"].float() * 0.25)
        assert found.quantized(f"{Q}.weight").parts["input_scale"].tolist() == [2.0]
        assert str(found.schemes[f"{Q}.weight"]) == "fp8-tensor+fp8-tensor"
        assert found.notes == ()


def test_a_scale_a_row_is_read_as_fbgemm_writes_it(tmp_path: Path) -> None:
    tensors = {f"{Q}.weight": e4m3(8, 16), f"{Q}.weight_scale": random(8, 1).abs(), f"{Q}.input_scale_ub": torch.tensor([1200.0])}
    with open_checkpoint(str(published(tmp_path / "in", tensors, quant_method="fbgemm_fp8", activation_scale_ub=1200.0))) as found:
        assert torch.equal(found.read(f"{Q}.weight"), tensors[f"{Q}.weight"].float() * tensors[f"{Q}.weight_scale"])
        assert str(found.schemes[f"{Q}.weight"]) == "fp8-channel+fp8-token"


def test_e5m2_is_read(tmp_path: Path) -> None:
    data = (100 * random(8, 16)).to(torch.float8_e5m2)
    with open_checkpoint(str(published(tmp_path / "in", {f"{Q}.weight": data, f"{Q}.weight_scale": torch.tensor([0.5])}))) as found:
        assert torch.equal(found.read(f"{Q}.weight"), data.float() / 2)


def test_weights_without_any_scale_are_read_as_they_are_and_noted(tmp_path: Path) -> None:
    with open_checkpoint(str(published(tmp_path / "in", {f"{Q}.weight": e4m3(8, 16)}))) as found:
        assert torch.equal(found.read(f"{Q}.weight"), e4m3(8, 16).float())
        assert found.notes == (f"1 weights have no scale, the first is {Q}.weight; they are read as they are",)


# --- what contradicts itself ------------------------------------------------------------------------------------------------------------


def unlist(tensors: Tensors, words: dict[str, Any]) -> None:
    words["modules_to_not_convert"], words["ignored_layers"] = ["lm_head", "model.vision_tower"], None


def list_coded(tensors: Tensors, words: dict[str, Any]) -> None:
    words["ignored_layers"] = ["lm_head", Q]


def make_dense(tensors: Tensors, words: dict[str, Any]) -> None:
    tensors[f"{Q}.weight"] = random(192, 192).bfloat16()


def list_nothing(tensors: Tensors, words: dict[str, Any]) -> None:
    words["ignored_layers"] = 7


def make_static(tensors: Tensors, words: dict[str, Any]) -> None:
    words["activation_scheme"] = "static"


@pytest.mark.parametrize(
    ("change", "notes"),
    [
        (unlist, ["1 modules of the list of what is left dense are in no file, the first is 'model.vision_tower'"]),
        (list_coded, [f"1 weights are listed as left dense, and quantized; the first is {Q}.weight"]),
        (make_dense, [
            f"1 matrices are dense, and not listed as such, the first is {Q}.weight; readers expect them in FP8",
            f"1 scales belong to weights that are dense, the first is {Q}.weight_scale_inv; they change nothing",
        ]),
        (list_nothing, ["ignored_layers is 7, no list of modules; it is ignored"]),
        (make_static, ["activation_scheme is static, and model.layers.0.mlp.down_proj.weight has no scale of its input"]),
    ],
)  # fmt: skip
def test_contradictions_are_noted(change: Callable[..., None], notes: list[str], folders: dict[str, Path], tmp_path: Path) -> None:
    with open_checkpoint(str(changed(folders["fp8-block"], tmp_path / "in", change))) as found:
        assert list(found.notes) == notes


def lose_scale(tensors: Tensors, words: dict[str, Any]) -> None:
    del tensors[f"{Q}.weight_scale_inv"]


def have_two_scales(tensors: Tensors, words: dict[str, Any]) -> None:
    tensors[f"{Q}.weight_scale"] = torch.ones(1)


def have_odd_scales(tensors: Tensors, words: dict[str, Any]) -> None:
    tensors[f"{Q}.weight_scale_inv"] = torch.ones(5, 7)


def have_integer_scales(tensors: Tensors, words: dict[str, Any]) -> None:
    tensors[f"{Q}.weight_scale_inv"] = torch.ones(2, 2, dtype=torch.int32)


def have_a_vector(tensors: Tensors, words: dict[str, Any]) -> None:
    tensors[f"{Q}.weight"] = e4m3(192)


def have_no_block(tensors: Tensors, words: dict[str, Any]) -> None:
    words["weight_block_size"] = [128, 0]


def have_no_codes(tensors: Tensors, words: dict[str, Any]) -> None:
    for name in [name for name, tensor in tensors.items() if tensor.dtype == torch.float8_e4m3fn]:
        tensors[name] = tensors[name].bfloat16()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lose_scale, r"q_proj\.weight is F8_E4M3 and has no scale next to it .*1 lack theirs"),
        (have_two_scales, r"has both .*weight_scale_inv and .*weight_scale, and one scale is expected"),
        (
            have_odd_scales,
            r"weight_scale_inv is \[5, 7\] for a weight \[192, 192\]; expected one scale, one a row, or one for each block of 128",
        ),
        (have_integer_scales, r"weight_scale_inv is I32; expected a scale in F32"),
        (have_a_vector, r"q_proj\.weight is F8_E4M3 \[192\]; expected a matrix, or a stack"),
        (have_no_block, r"weight_block_size is \[128, 0\]; expected \[rows, inputs\]"),
        (have_no_codes, r"config.json declares fp8, and no tensor is of F8_E4M3 or F8_E5M2"),
    ],
)
def test_damage_is_named(change: Callable[..., None], message: str, folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(str(changed(folders["fp8-block"], tmp_path / "in", change)))


@pytest.mark.parametrize(("name", "n"), [("fp8-block", 2500), ("fp8-tensor-static", 1500)])
def test_damaged_folders_are_errors_of_ours_or_sound_reads(name: str, n: int, folders: dict[str, Path], tmp_path: Path) -> None:
    def keep_little(tensors: Tensors, words: dict[str, Any]) -> None:
        for key in [key for key in tensors if "k_proj" not in key and "layernorm" not in key]:
            del tensors[key]

    assert wrong_answers(changed(folders[name], tmp_path / "small", keep_little), tmp_path, seed=5, n=n) == []


def test_damaged_folders_of_others_are_errors_of_ours_or_sound_reads(tmp_path: Path) -> None:
    tensors = {
        f"{EXPERTS}.gate_up_proj": e4m3(2, 40, 24),
        f"{EXPERTS}.gate_up_proj_scales_inv": random(2, 2, 1).abs(),
        f"{EXPERTS}.0.w1.weight": torch.zeros(4, 32, dtype=torch.int8),
        f"{EXPERTS}.0.w1.scale": torch.full((4, 2), 127, dtype=torch.uint8).view(torch.float8_e8m0fnu),
        f"{Q}.weight": e4m3(40, 24),
        f"{Q}.qscale_weight": torch.ones(()),
        f"{Q}.qscale_act": torch.ones(()),
        "model.norm.weight": torch.ones(24, dtype=torch.bfloat16),
    }
    words = {"weight_block_size": [32, 32], "activation_scheme": "dynamic", "modules_to_not_convert": ["lm_head"], "scale_fmt": "ue8m0"}
    folder = published(tmp_path / "in", tensors, **words)
    assert wrong_answers(folder, tmp_path, seed=6, n=1000) == []
