"""bitsandbytes folders: what is written, what published folders hold beside it, and five thousand that are damaged."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantcli import formats, qtypes, recipe
from quantcli.errors import CheckpointError, RecipeError, UnsupportedError
from quantcli.formats import bitsandbytes, open_checkpoint
from quantcli.formats.bitsandbytes.state import Nested, State, parse
from quantcli.planning import plan
from quantcli.planning.arrange import Arranged
from quantcli.qtypes.shared import float4
from quantcli.recipe import Recipe, Rule
from quantcli.tensors import Scheme
from quantcli.walk import pipeline
from support.mutations import wrong_answers
from support.places import DATA
from support.runs import run
from support.tiny_models import TinyLlama

GOLDEN = load_file(DATA / "bitsandbytes.safetensors")
RECIPES = ("nf4", "nf4-dq", "fp4", "llm-int8")
Q = "model.layers.0.self_attn.q_proj"
STATE = f"{Q}.weight.quant_state.bitsandbytes__nf4"

Tensors = dict[str, Tensor]


def quantize(source: Path, target: Path, how: Recipe) -> pipeline.Finished:
    *_, last = run(source, target, how)
    assert isinstance(last, pipeline.Finished)
    return last


def words_of(folder: Path) -> dict:
    words: dict = json.loads((folder / "config.json").read_text())["quantization_config"]
    return words


@pytest.fixture(scope="module")
def source(tiny_llama: TinyLlama) -> Path:
    return tiny_llama(hidden=64, intermediate=96, layers=1, heads=2, kv_heads=1, vocab=512)


@pytest.fixture(scope="module")
def folders(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder that each recipe makes of ``source``."""
    root = tmp_path_factory.mktemp("bitsandbytes")
    for name in RECIPES:
        quantize(source, root / name, recipe.load(name))
    return {name: root / name for name in RECIPES}


def damaged(folder: Path, target: Path, change: Callable[[Tensors, dict], None]) -> Path:
    """``folder`` with its tensors and its quantization_config as ``change`` leaves them."""
    tensors, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    change(tensors, config["quantization_config"])
    target.mkdir()
    save_file(tensors, target / "model.safetensors")
    (target / "config.json").write_text(json.dumps(config))
    return target


def rewrite_state(tensors: Tensors, **changes: object) -> None:
    """Change keys of the QuantState of :data:`Q`; None takes a key out."""
    words = json.loads(bytes(tensors[STATE].tolist())) | changes
    text = json.dumps({key: value for key, value in words.items() if value is not None}).encode()
    tensors[STATE] = torch.tensor(list(text), dtype=torch.uint8)


def read_q(folder: Path) -> tuple[Tensor, Scheme, tuple[str, ...]]:
    with open_checkpoint(str(folder)) as checkpoint:
        return checkpoint.read(f"{Q}.weight"), checkpoint.schemes[f"{Q}.weight"], checkpoint.notes


# --- what is written -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_codes_come_back_as_they_were_coded_and_the_rest_as_it_was(name: str, source: Path, folders: dict[str, Path]) -> None:
    with open_checkpoint(str(folders[name])) as back, open_checkpoint(str(source)) as model:
        assert (back.kind, back.notes, len(back.schemes)) == ("bitsandbytes", (), 7)
        assert back.specs.keys() == model.specs.keys()
        for key, spec in model.specs.items():
            assert (back.specs[key].shape, back.specs[key].dtype) == (spec.shape, spec.dtype)
            if key not in back.schemes:
                assert torch.equal(back.read(key), model.read(key))
                continue
            qtype = qtypes.of(back.schemes[key].qtype)
            assert back.schemes[key] == recipe.load(name).scheme
            expected = qtype.encode(model.read(key), back.schemes[key])
            got = back.quantized(key)
            assert got.parts.keys() == expected.parts.keys()
            assert all(torch.equal(got.parts[part], value) for part, value in expected.parts.items())
            assert torch.equal(back.read(key), qtype.unpack(expected))


@pytest.mark.parametrize("name", RECIPES)
def test_a_dry_run_knows_the_size_to_the_byte(name: str, source: Path, folders: dict[str, Path], tmp_path: Path) -> None:
    """Though the JSON in the files holds a number that is not known before."""
    with open_checkpoint(str(source)) as checkpoint:
        (planned,) = pipeline.quantize(checkpoint, tmp_path / "none", recipe.load(name), dry_run=True)
    assert isinstance(planned, pipeline.Planned)
    assert planned.plan.n_bytes == sum(tensor.nbytes for tensor in load_file(folders[name] / "model.safetensors").values())


def test_the_config_has_the_keys_that_transformers_writes(folders: dict[str, Path]) -> None:
    """As transformers 5.23 saves a model, but for the list of what to skip, which it leaves null and finds out anew."""
    assert words_of(folders["nf4-dq"]) == {
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": ["lm_head"],
        "llm_int8_threshold": 6.0,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "quant_method": "bitsandbytes",
    }
    eight = {"_load_in_4bit": False, "_load_in_8bit": True, "load_in_4bit": False, "load_in_8bit": True}
    assert words_of(folders["llm-int8"]) == words_of(folders["nf4-dq"]) | eight | {
        "bnb_4bit_compute_dtype": "float32",
        "bnb_4bit_quant_type": "fp4",
        "bnb_4bit_use_double_quant": False,
    }


def test_linears_that_stay_dense_are_named_and_no_others(source: Path, tmp_path: Path) -> None:
    rules = (Rule.parse("o_proj", "keep"), Rule.parse("lm_head", "nf4-b64"))
    quantize(source, tmp_path / "out", Recipe("x", "bitsandbytes", recipe.load("nf4").passes, scheme=Scheme.parse("nf4-b64"), rules=rules))
    assert words_of(tmp_path / "out")["llm_int8_skip_modules"] == ["model.layers.0.self_attn.o_proj"]
    with open_checkpoint(str(tmp_path / "out")) as back:
        assert back.notes == ()
        assert "lm_head.weight" in back.schemes


def test_joined_linears_that_stay_dense_are_named_as_vllm_runs_them_too(source: Path, tmp_path: Path) -> None:
    rules = (Rule.parse(r"(q|k|v|up|gate)_proj", "keep"),)
    quantize(source, tmp_path / "out", Recipe("x", "bitsandbytes", recipe.load("nf4").passes, scheme=Scheme.parse("nf4-b64"), rules=rules))
    words = words_of(tmp_path / "out")["llm_int8_skip_modules"]
    layer = "model.layers.0"
    assert {f"{layer}.self_attn.qkv_proj", f"{layer}.mlp.gate_up_proj", f"{layer}.self_attn.k_proj", f"{layer}.mlp.up_proj"} <= set(words)
    with open_checkpoint(str(tmp_path / "out")) as back:
        assert back.notes == ()


def test_block_sizes_and_four_bit_types_may_be_mixed_and_eight_bits_may_not(source: Path, tmp_path: Path) -> None:
    def mixed(other: str) -> Recipe:
        return Recipe(
            "x", "bitsandbytes", recipe.load("nf4").passes, scheme=Scheme.parse("nf4-b64"), rules=(Rule.parse("down_proj", other),)
        )

    quantize(source, tmp_path / "out", mixed("fp4-b128-dq"))
    with open_checkpoint(str(tmp_path / "out")) as back:
        assert {str(scheme) for scheme in back.schemes.values()} == {"nf4-b64", "fp4-b128-dq"}
    with pytest.raises(RecipeError, match="4 bits and 8 in one folder"):
        quantize(source, tmp_path / "bad", mixed("llm_int8"))


def test_an_embedding_that_engines_load_dense_is_refused(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    folder = tiny_llama(hidden=64, intermediate=96, layers=1, heads=2, kv_heads=1, vocab=512)
    rules = (Rule.parse("embed_tokens", "nf4-b64"),)
    with pytest.raises(RecipeError, match="readers expect it dense"):
        quantize(
            folder, tmp_path / "out", Recipe("x", "bitsandbytes", recipe.load("nf4").passes, scheme=Scheme.parse("nf4-b64"), rules=rules)
        )


def test_experts_stay_dense_are_announced_and_go_by_the_module_around_them(tmp_path: Path) -> None:
    """transformers 5 has them in one parameter, which bitsandbytes does not replace: it could not load their codes."""
    moe = "model.layers.0.mlp"
    names = [f"{Q}.weight", f"{moe}.gate.weight", *(f"{moe}.experts.{i}.{k}_proj.weight" for i in range(3) for k in ("gate", "up", "down"))]
    save_file({name: torch.randn(64, 64) for name in ("model.embed_tokens.weight", *names)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_moe", "tie_word_embeddings": True}))
    taps = {name: name.removesuffix(".weight") for name in names if not name.endswith("mlp.gate.weight")}
    with open_checkpoint(str(tmp_path)) as checkpoint:
        made = plan.make(Arranged(checkpoint, formats.of("bitsandbytes"), taps), recipe.load("nf4"))
    assert [tensor.name for tensor in made.tensors if tensor.scheme] == [f"{Q}.weight"]
    assert any(f"{moe}.experts.0" in note and "and 7 more stay as they are: engines that read bitsandbytes" in note for note in made.notes)
    words = json.loads(bytes(made.layout.config_files({})["config.json"]))["quantization_config"]
    assert words["llm_int8_skip_modules"] == [f"{moe}.experts", f"{moe}.gate", "lm_head"]


# --- the QuantState ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [name for name in GOLDEN if "quant_state" in name])
def test_states_are_bitsandbytes_text_to_the_byte(case: str) -> None:
    text = bytes(GOLDEN[case].tolist())
    state, notes = parse(case, json.loads(text))
    assert notes == []
    assert state.to_json() == text
    assert state.to_json(state.longest()).rstrip() == text


def test_every_float32_fits_what_is_announced_and_keeps_its_value_in_what_is_safe() -> None:
    bits = torch.randint(0, 0x7F800000, (3000,), generator=torch.Generator().manual_seed(0)).tolist()
    extremes = [0, 1, 0x00800000, 0x7F7FFFFF, 0x3F800001]
    for value in (struct.unpack("f", struct.pack("I", bits_))[0] for bits_ in (*bits, *extremes)):
        state = State("nf4", 64, "BF16", (128, 64), Nested(256, value))
        full, short = state.to_json(state.longest()), state.to_json(state.shortest_safe())
        assert (len(full), len(short)) == (state.longest(), state.shortest_safe())
        assert json.loads(full)["nested_offset"] == value
        assert torch.tensor(json.loads(short)["nested_offset"], dtype=torch.float32) == value


def test_a_folder_of_bitsandbytes_goes_out_as_it_came_in(tmp_path: Path) -> None:
    """Tensor by tensor, the QuantState's length with it; from the peer's own bytes."""
    tensors: Tensors = {"model.norm.weight": torch.ones(64)}
    cases = [
        ("gaussian", "nf4-b64-dq"),
        ("many-blocks", "nf4-b64-dq"),
        ("heavy", "fp4-b32"),
        ("with-zeros", "nf4-b4096-dq"),
        ("odd", "nf4-b32"),
    ]
    for i, (name, words) in enumerate(cases):
        weight = f"model.layers.{i}.mlp.up_proj.weight"
        for key, tensor in GOLDEN.items():
            if key.startswith(f"{name}/{words}/") and not key.endswith("/decoded"):
                part = key.rpartition("/")[2]
                tensors[weight if part == "weight" else f"{weight}.{part}"] = tensor
        tensors[f"{weight}.quant_map"] = GOLDEN[f"map/{words[:3]}"].clone()
        if words.endswith("dq"):
            tensors[f"{weight}.nested_quant_map"] = GOLDEN["map/dynamic"].clone()
    config = {"model_type": "llama", "dtype": "bfloat16", "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    (tmp_path / "in").mkdir()
    (tmp_path / "in/config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "in/model.safetensors")
    with open_checkpoint(str(tmp_path / "in")) as back:
        context = bitsandbytes.FORMAT.layout(back, back.schemes)
        out: Tensors = {}
        for name, spec in back.specs.items():
            made = context.parts(name, back.quantized(name) if name in back.schemes else back.read(name))
            expected = {s.name: s for s in context.outputs(spec, back.schemes.get(name))}
            assert {key: tuple(t.shape) for key, t in made.items()} == {key: s.shape for key, s in expected.items()}
            out |= made
    assert out.keys() == tensors.keys()
    assert all(torch.equal(out[key], tensor) and out[key].dtype == tensor.dtype for key, tensor in tensors.items())


# --- what published folders hold -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int8])
def test_codes_stored_in_another_dtype_are_the_same_bytes(dtype: torch.dtype, folders: dict[str, Path], tmp_path: Path) -> None:
    """``bnb_4bit_quant_storage``, which FSDP needs to be the model's own dtype."""

    def change(tensors: Tensors, words: dict) -> None:
        for key in [k for k in tensors if k.endswith("_proj.weight")]:
            tensors[key] = tensors[key].view(-1).view(dtype).view(-1, 1)
        words["bnb_4bit_quant_storage"] = str(dtype).removeprefix("torch.")

    W, scheme, notes = read_q(damaged(folders["nf4"], tmp_path / "x", change))
    expected, scheme_before, _ = read_q(folders["nf4"])
    assert torch.equal(W, expected)
    assert (scheme, notes) == (scheme_before, ())


def test_other_levels_are_noted_and_the_types_own_obeyed_as_engines_do(folders: dict[str, Path], tmp_path: Path) -> None:
    def change(tensors: Tensors, words: dict) -> None:
        tensors[f"{Q}.weight.quant_map"] = torch.linspace(-1, 1, 16)

    W, _, (note,) = read_q(damaged(folders["nf4"], tmp_path / "x", change))
    assert torch.equal(W, read_q(folders["nf4"])[0])
    assert f"{Q}.weight.quant_map differs from bitsandbytes' nf4 levels" in note


def test_another_map_of_scales_is_obeyed_as_engines_do(folders: dict[str, Path], tmp_path: Path) -> None:
    entries = float4.dynamic_map() * 0.5

    def change(tensors: Tensors, words: dict) -> None:
        tensors[f"{Q}.weight.nested_quant_map"] = entries.clone()

    W, scheme, (note,) = read_q(damaged(folders["nf4-dq"], tmp_path / "x", change))
    assert str(scheme) == "nf4-b64"
    assert "nested_quant_map differs" in note
    tensors = load_file(folders["nf4-dq"] / "model.safetensors")
    offset = json.loads(bytes(tensors[STATE].tolist()))["nested_offset"]
    codes, peaks = tensors[f"{Q}.weight.absmax"], tensors[f"{Q}.weight.nested_absmax"]
    scales = entries[codes.int()] * peaks.repeat_interleave(256)[: len(codes)] + offset
    plain, _, _ = read_q(folders["nf4"])
    ratio = W.view(-1, 64).abs().amax(1) / plain.view(-1, 64).abs().amax(1)
    absmax = load_file(folders["nf4"] / "model.safetensors")[f"{Q}.weight.absmax"]
    assert torch.allclose(ratio, scales / absmax, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "drop", "message"),
    [
        ("llm-int8", f"{Q}.SCB", r"is int8 and has no .*\.SCB"),
        ("llm-int8", f"{Q}.weight", r"q_proj\.weight is missing"),
        ("nf4", STATE, r"has no .*quant_state\.bitsandbytes__… next to it"),
        ("nf4", f"{Q}.weight.absmax", r"absmax is missing; expected F32 or F16 or BF16 \[64\]"),
        ("nf4-dq", f"{Q}.weight.nested_absmax", r"nested_absmax is missing; expected F32 \[1\]"),
        ("nf4", f"{Q}.weight", r"q_proj\.weight is missing; its quant_state gives \[64, 64\], which takes 2048"),
    ],
)
def test_a_missing_part_is_named(name: str, drop: str, message: str, folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_q(damaged(folders[name], tmp_path / "x", lambda tensors, words: tensors.__delitem__(drop)))


def test_parts_that_engines_miss_and_we_do_not_are_noted(folders: dict[str, Path], tmp_path: Path) -> None:
    drops = {"nf4": f"{Q}.weight.quant_map", "llm-int8": f"{Q}.weight_format"}
    for name, drop in drops.items():

        def change(tensors: Tensors, words: dict, drop: str = drop) -> None:
            del tensors[drop]

        W, _, (note,) = read_q(damaged(folders[name], tmp_path / name, change))
        assert torch.equal(W, read_q(folders[name])[0])
        assert drop.rpartition(".")[2] in note


def test_tiled_int8_is_unsupported_and_says_what_to_do(folders: dict[str, Path], tmp_path: Path) -> None:
    def change(tensors: Tensors, words: dict) -> None:
        tensors[f"{Q}.weight_format"] = torch.tensor(1, dtype=torch.uint8)

    with pytest.raises(UnsupportedError, match=r"col32.*save the model again"):
        read_q(damaged(folders["llm-int8"], tmp_path / "x", change))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": [64, 65]}, r"2048 bytes; its quant_state gives \[64, 65\], which takes 2080"),
        ({"shape": None}, "lacks shape"),
        ({"shape": [4096]}, r"shape \[4096\]"),
        ({"shape": [True, 4096]}, r"shape \[True, 4096\]"),
        ({"blocksize": 63}, "blocksize 63"),
        ({"blocksize": 128}, r"absmax is F32 \[64\]; expected .* \[32\]"),
        ({"quant_type": "int4"}, "quant_type 'int4'; expected nf4 or fp4"),
        ({"dtype": "float8"}, "dtype 'float8'"),
        ({"nested_offset": 1.0}, "lacks nested_blocksize"),
    ],
)
def test_a_state_that_cannot_be_is_an_error_with_the_tensors_name(
    changes: dict, message: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = damaged(folders["nf4"], tmp_path / "x", lambda tensors, words: rewrite_state(tensors, **changes))
    with pytest.raises(CheckpointError, match=message) as error:
        read_q(folder)
    assert Q in str(error.value)


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"load_in_4bit": False, "load_in_8bit": True}, "config.json loads in 8 bits, and the tensors have 4"),
        ({"bnb_4bit_quant_type": "fp4"}, "bnb_4bit_quant_type is 'fp4', and the tensors have nf4"),
        ({"bnb_4bit_use_double_quant": True}, "bnb_4bit_use_double_quant is True, and the tensors have False"),
        ({"bnb_4bit_quant_storage": "bfloat16"}, "bnb_4bit_quant_storage is 'bfloat16', and the tensors have uint8"),
        ({"llm_int8_skip_modules": ["vision_tower"]}, "names 'vision_tower', and no tensor is under it"),
        ({"llm_int8_skip_modules": ["q_proj"]}, f"names 'q_proj', and {Q}.weight is quantized"),
        ({"llm_int8_skip_modules": "lm_head"}, "llm_int8_skip_modules is 'lm_head'; expected a list"),
    ],
)
def test_a_config_that_contradicts_the_tensors_is_noted_and_not_obeyed(
    changes: dict, note: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    W, _, notes = read_q(damaged(folders["nf4"], tmp_path / "x", lambda tensors, words: words.update(changes)))
    assert torch.equal(W, read_q(folders["nf4"])[0])
    assert [n for n in notes if note in n] == list(notes)


def test_an_old_config_without_a_method_is_known_by_its_flags(folders: dict[str, Path], tmp_path: Path) -> None:
    def change(tensors: Tensors, words: dict) -> None:
        words.clear()
        words["load_in_8bit"] = True

    assert read_q(damaged(folders["llm-int8"], tmp_path / "x", change))[2] == ()


def test_a_dense_folder_that_says_bitsandbytes_is_refused(source: Path, tmp_path: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}})
    )
    save_file(load_file(source / "model.safetensors"), tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="no tensor is quantized: the weights are dense"):
        open_checkpoint(str(tmp_path))


# --- hostile folders -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "n"), [("nf4-dq", 3000), ("llm-int8", 2000)])
def test_damaged_folders_are_errors_of_ours_or_sound_reads(name: str, n: int, folders: dict[str, Path], tmp_path: Path) -> None:
    def keep_little(tensors: Tensors, words: dict) -> None:
        for key in [k for k in tensors if "k_proj" not in k and "layernorm" not in k]:
            del tensors[key]

    assert wrong_answers(damaged(folders[name], tmp_path / "small", keep_little), tmp_path, seed=5, n=n) == []
