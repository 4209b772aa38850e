"""File types: the type of every tensor is the one llama-quantize chooses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from quantcli.errors import CheckpointError, RecipeError, UnsupportedError
from quantcli.formats.gguf.model.naming import gguf_names
from quantcli.formats.gguf.types import filetypes
from quantcli.formats.gguf.types.filetypes import FILE_TYPES, Options, choose_types, mix
from quantcli.formats.gguf.types.mixes import TABLE, Model, Place
from quantcli.tensors import Scheme, TensorSpec
from support.mix_models import MODELS, golden

GOLDEN = golden()


def config(layers: int = 8, heads: int = 8, kv_heads: int = 8, tied: bool = False) -> dict:
    keys = {"num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads}
    keys |= {"hidden_size": 256, "vocab_size": 100, "intermediate_size": 512, "max_position_embeddings": 64}
    return {"model_type": "llama", "tie_word_embeddings": tied, "rms_norm_eps": 1e-6, **keys}


def specs(layers: int = 8, hidden: int = 256, wide: int = 512, tied: bool = False) -> dict[str, TensorSpec]:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (100, hidden), "model.norm.weight": (hidden,)}
    for i in range(layers):
        p = f"model.layers.{i}"
        shapes |= {f"{p}.self_attn.{x}_proj.weight": (hidden, hidden) for x in "qkvo"}
        shapes |= {f"{p}.mlp.{x}_proj.weight": (wide, hidden) for x in ("gate", "up")} | {f"{p}.mlp.down_proj.weight": (hidden, wide)}
        shapes |= {f"{p}.input_layernorm.weight": (hidden,), f"{p}.self_attn.rotary_emb.inv_freq": (4,)}
    if not tied:
        shapes["lm_head.weight"] = (100, hidden)
    return {name: TensorSpec.dense(name, "BF16", shape) for name, shape in shapes.items()}


def layers_with(chosen: dict[str, Scheme], ending: str, qtype: str) -> list[int]:
    return [int(n.split(".")[2]) for n, s in chosen.items() if n.endswith(ending) and s.qtype == qtype]


# by hand from llama.cpp's src/llama-quant.cpp: more bits for i < n/8, i ≥ 7n/8, and every third between
MORE_BITS = {8: [0, 3, 6, 7], 2: [1], 4: [2, 3], 16: [0, 1, 4, 7, 10, 13, 14, 15], 22: [0, 1, 4, 7, 10, 13, 16, 19, 20, 21]}


@pytest.mark.parametrize("layers", MORE_BITS)
@pytest.mark.parametrize("name", ["Q4_K_M", "Q5_K_M"])
def test_medium_types_give_six_bits_to_v_and_down_of_the_layers_that_hurt_most(name: str, layers: int) -> None:
    chosen = mix(name, specs(layers), config(layers))
    assert layers_with(chosen, "v_proj.weight", "q6_k") == MORE_BITS[layers]
    assert layers_with(chosen, "down_proj.weight", "q6_k") == MORE_BITS[layers]
    assert layers_with(chosen, "q_proj.weight", FILE_TYPES[name].default.lower()) == list(range(layers))


def test_small_q4_k_gives_five_bits_to_the_first_v_and_down() -> None:
    chosen = mix("Q4_K_S", specs(16), config(16))
    assert layers_with(chosen, "v_proj.weight", "q5_k") == [0, 1, 2, 3]
    assert layers_with(chosen, "down_proj.weight", "q5_k") == [0, 1]


@pytest.mark.parametrize(
    ("name", "head"),
    [
        *((name, "q6_k") for name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K_M", "Q6_K")),
        *((name, name.lower()) for name in ("Q8_0", "F16", "BF16", "F32")),
    ],
)
def test_the_head_takes_six_bits_unless_all_take_more(name: str, head: str) -> None:
    untied = mix(name, specs(), config())
    assert untied["lm_head.weight"].qtype == head
    assert untied["model.embed_tokens.weight"].qtype == FILE_TYPES[name].default.lower()
    assert mix(name, specs(tied=True), config(tied=True))["model.embed_tokens.weight"].qtype == head


def test_a_tied_head_that_is_stored_all_the_same_is_no_tensor_of_the_file() -> None:
    assert "lm_head.weight" not in mix("Q4_K_M", specs(), config(tied=True))


def test_norms_biases_and_rotary_tables_have_no_scheme() -> None:
    chosen = mix("Q8_0", specs(), config())
    assert not [name for name in chosen if "norm" in name or "inv_freq" in name]
    assert len(chosen) == 8 * 7 + 2


def test_seventy_billion_with_shared_heads_gives_v_five_bits() -> None:
    chosen = mix("Q4_K_M", specs(80), config(80, heads=64, kv_heads=8))
    assert layers_with(chosen, "v_proj.weight", "q4_k") == []
    assert len(layers_with(chosen, "v_proj.weight", "q5_k")) + len(layers_with(chosen, "v_proj.weight", "q6_k")) == 80
    assert layers_with(mix("Q4_K_M", specs(80), config(80, heads=64, kv_heads=64)), "v_proj.weight", "q5_k") == []


@pytest.mark.parametrize(("name", "fallback"), [("Q4_K_S", "q5_0"), ("Q5_K_S", "q5_1"), ("Q6_K", "q8_0")])
def test_rows_that_are_no_multiple_of_256_fall_back_to_a_type_of_32(name: str, fallback: str) -> None:
    """As tensor_type_fallback in src/llama-quant.cpp: Q4_K → Q5_0, Q5_K → Q5_1, Q6_K → Q8_0."""
    chosen = mix(name, specs(wide=288), config(layers=8))
    first = {"Q4_K_S": ["q5_1"]}.get(name, [fallback])  # the first eighth of ffn_down is Q5_K there
    assert [chosen[f"model.layers.{i}.mlp.down_proj.weight"].qtype for i in range(8)] == first + 7 * [fallback]
    assert layers_with(chosen, "q_proj.weight", FILE_TYPES[name].default.lower()) == list(range(8))


@pytest.mark.parametrize(("name", "fallback"), [("Q4_K_M", "q5_0"), ("Q5_K_M", "q5_1")])
def test_fallbacks_keep_more_bits_where_the_mix_wants_them(name: str, fallback: str) -> None:
    chosen = mix(name, specs(hidden=160, wide=352), config())
    assert layers_with(chosen, "down_proj.weight", "q8_0") == MORE_BITS[8]
    assert layers_with(chosen, "v_proj.weight", "q8_0") == MORE_BITS[8]
    assert layers_with(chosen, "q_proj.weight", fallback) == list(range(8))
    assert (chosen["model.embed_tokens.weight"].qtype, chosen["lm_head.weight"].qtype) == (fallback, "q8_0")


@pytest.mark.parametrize("name", ["Q4_K_M", "Q5_K_M", "Q8_0", "Q4_0"])
def test_rows_that_are_no_multiple_of_32_become_f16(name: str) -> None:
    chosen = mix(name, specs(hidden=256, wide=100), config())
    assert layers_with(chosen, "down_proj.weight", "f16") == list(range(8))


def test_a_head_of_odd_rows_takes_q8_0() -> None:
    assert mix("Q6_K", specs(hidden=288, wide=288), config())["lm_head.weight"].qtype == "q8_0"


def test_pure_gives_every_matrix_the_default_type() -> None:
    assert {s.qtype for s in mix("Q4_K_M", specs(), config(), options={"pure": True}).values()} == {"q4_k"}


def test_the_head_and_the_embedding_can_be_given_a_type() -> None:
    chosen = mix("Q4_K_M", specs(), config(), options={"output_tensor_type": "f16", "token_embedding_type": "Q8_0"})
    assert (chosen["lm_head.weight"].qtype, chosen["model.embed_tokens.weight"].qtype) == ("f16", "q8_0")
    tied = mix("Q4_K_M", specs(tied=True), config(tied=True), options={"output_tensor_type": "q8_0"})
    assert tied["model.embed_tokens.weight"].qtype == "q8_0"


def test_leave_output_tensor_leaves_it() -> None:
    assert "lm_head.weight" not in mix("Q4_K_M", specs(), config(), options={"leave_output_tensor": True})


def test_the_first_tensor_type_that_matches_wins_and_its_layers_are_not_counted() -> None:
    """llama-quantize counts v and down as it decides them, so those a user decides push the pattern of the others on."""
    chosen = mix("Q4_K_M", specs(), config(), options={"tensor_type": [r"blk\.[01]\.attn_v=q8_0", "attn_v=q5_k", "attn_q=q6_k"]})
    assert layers_with(chosen, "v_proj.weight", "q8_0") == [0, 1]
    assert layers_with(chosen, "v_proj.weight", "q5_k") == [2, 3, 4, 5, 6, 7]
    assert layers_with(chosen, "q_proj.weight", "q6_k") == list(range(8))
    shifted = mix("Q4_K_M", specs(), config(), options={"tensor_type": [r"blk\.0\.attn_v=q8_0"]})
    assert layers_with(shifted, "v_proj.weight", "q6_k") == [1, 4, 7]


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ({"tensor_type": ["(=q8_0"]}, "REGEX=TYPE"),
        ({"output_tensor_type": "q9"}, r"lm_head\.weight: quantcli writes no tensors of type Q9; there are: .*Q5_1"),
        ({"colour": 1}, "no option 'colour'"),
    ],
)
def test_options_that_make_no_sense_are_recipe_errors(words: dict, match: str) -> None:
    with pytest.raises(RecipeError, match=match):
        mix("Q4_K_M", specs(), config(), options=words)


def test_unknown_file_types_and_architectures_are_refused() -> None:
    with pytest.raises(RecipeError, match="Q4_K_M"):
        mix("Q9_X", specs(), config())
    with pytest.raises(UnsupportedError, match="model_type 'mamba'"):
        mix("Q8_0", specs(), {"model_type": "mamba"})
    strange = specs() | {"model.layers.0.mlp.router.weight": TensorSpec.dense("model.layers.0.mlp.router.weight", "BF16", (8, 256))}
    with pytest.raises(UnsupportedError, match="router"):
        mix("Q8_0", strange, config())


@pytest.mark.parametrize("name", [name for name in FILE_TYPES if name != "MXFP4_MOE"])  # Q8_0 where there are no experts
def test_general_file_type_is_found_back_from_the_schemes(name: str) -> None:
    assert filetypes.general_file_type(mix(name, specs(), config()), gguf_names(specs(), config()), specs(), config()) is FILE_TYPES[name]


def test_of_file_types_that_choose_alike_the_one_asked_for_names_the_file() -> None:
    narrow = specs(hidden=160, wide=352)
    chosen = mix("Q6_K", narrow, config())
    assert chosen == mix("Q8_0", narrow, config())
    assert filetypes.general_file_type(chosen, gguf_names(narrow, config()), narrow, config(), asked="Q6_K") is FILE_TYPES["Q6_K"]
    assert filetypes.general_file_type(chosen, gguf_names(narrow, config()), narrow, config(), asked="Q8_0") is FILE_TYPES["Q8_0"]


def test_tensors_lie_in_llama_quantizes_order() -> None:
    order = list(gguf_names(specs(11), config(11)).values())
    assert order[:3] == ["output.weight", "output_norm.weight", "token_embd.weight"]
    assert [name.split(".")[1] for name in order if "ffn_up" in name] == [str(i) for i in range(11)]
    assert order[3:11] == [
        f"blk.0.{x}.weight" for x in ("attn_k", "attn_norm", "attn_output", "attn_q", "attn_v", "ffn_down", "ffn_gate", "ffn_up")
    ]


def test_aliases_mean_what_llama_quantize_means() -> None:
    assert filetypes.file_type("q4_k") is FILE_TYPES["Q4_K_M"]


@pytest.mark.parametrize("name", MODELS)
def test_every_file_type_chooses_what_llama_quantize_chose(name: str) -> None:
    model = MODELS[name]
    facts = Model.of(model.fields, model.shapes)
    for row, theirs in GOLDEN[name].items():
        file_type, _, weighed = row.partition(" ")
        ours = choose_types(TABLE[file_type], Options(), facts, model.shapes, is_weighed=weighed)
        assert ours == theirs, row


def test_the_goldens_hold_every_file_type_and_every_rule_of_the_table() -> None:
    """A rule that no golden model reaches would be a rule that nothing tests."""
    assert all({row.partition(" ")[0] for row in rows} == TABLE.keys() - {"F32"} for rows in GOLDEN.values())
    unused = {(name, role, i) for name, kind in TABLE.items() for role, rules in kind.rules.items() for i in range(len(rules))}
    for model in MODELS.values():
        facts = Model.of(model.fields, model.shapes)
        for name in TABLE:
            for weighed in (False, True):
                unused -= {(name, *used) for used in rules_used(name, facts, model.shapes, weighed)}
    assert unused == set()


def rules_used(name: str, facts: Model, shapes: Mapping[str, tuple[int, ...]], weighed: bool) -> set[tuple[str, int]]:
    """(role, number) of the rules of file type ``name`` that decided a tensor of the model."""
    kind, used = TABLE[name], set()

    def note(role: str, i: int, at: Place) -> bool:
        used.add((role, i))
        return True

    rules = {role: tuple((*rule, partial(note, role, i)) for i, rule in enumerate(rows)) for role, rows in kind.rules.items()}
    choose_types(replace(kind, rules=rules), Options(), facts, shapes, is_weighed=weighed)
    return used


def test_metadata_without_an_architecture_choose_no_types() -> None:
    with pytest.raises(CheckpointError, match=r"general\.architecture"):
        Model.of({}, ())


def test_layers_can_be_left_out_and_the_others_close_up() -> None:
    kept = filetypes.without_layers(gguf_names(specs(4), config(4)), [0, 2])
    assert kept["model.layers.1.self_attn.q_proj.weight"] == "blk.0.attn_q.weight"
    assert kept["model.layers.3.self_attn.q_proj.weight"] == "blk.1.attn_q.weight"
    assert not [name for name in kept if ".0." in name or ".2." in name]
    assert filetypes.n_layers_of(kept.values()) == 2
    assert not [name for name in mix("Q4_K_M", specs(4), config(4), options={"prune_layers": [0, 2]}) if ".0." in name or ".2." in name]
    with pytest.raises(RecipeError, match=r"--prune-layers 4: the model has layers 0 … 3"):
        mix("Q4_K_M", specs(4), config(4), options={"prune_layers": [1, 4]})


def test_overridden_metadata_count_in_the_choice() -> None:
    chosen = mix("Q4_K_M", specs(), config(), options={"override_kv": ["llama.expert_count=int:8"]})
    assert layers_with(chosen, "v_proj.weight", "q8_0") == list(range(8))


@pytest.mark.parametrize(
    ("text", "value"),
    [("a.b=int:-7", 7), ("a.b=float:0.5", 0.5), ("a.b=bool:true", True), ("a.b=bool:false", False), ("a.b=str:x=y:z", "x=y:z")],
)
def test_metadata_can_be_overridden_with_a_value_of_a_type(text: str, value: Any) -> None:
    ((key, given),) = Options(override_kv=[text]).overrides.items()
    assert (key, given.value) == ("a.b", value)


@pytest.mark.parametrize("text", ["a.b", "a.b=7", "a.b=int:seven", "a.b=bool:yes", "a.b=i8:1", "=int:1", "a.b=int:4294967296"])
def test_an_override_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="expected KEY=TYPE:VALUE"):
        mix("Q8_0", specs(), config(), options={"override_kv": [text]})
