"""The GGUF format: a model goes out under llama.cpp's names and comes back under Hugging Face's, whole."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf as peer
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import quantcli as qc
from quantcli import conversions, ops
from quantcli import recipe as recipes
from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.errors import CheckpointError, NumericsError, QuantcliError, RecipeError, UnsupportedError
from quantcli.formats import Request, gguf, open_checkpoint
from quantcli.formats.gguf.file import container, headers
from quantcli.formats.gguf.imatrix.importance import NEEDY
from quantcli.formats.gguf.model import rope
from quantcli.formats.gguf.types import filetypes
from quantcli.formats.gguf.types.filetypes import FILE_TYPES
from quantcli.ops.blocks import KINDS
from quantcli.planning.arrange import cut_for
from quantcli.planning.selection import that_keeps
from quantcli.recipe import Recipe, Rule
from quantcli.tensors import QuantizedTensor, Scheme, TensorSpec
from quantcli.walk import pipeline
from quantcli.walk.events import Finished, Planned
from support import families
from support.gguf_export import LLAMA3, edit_config, export, quantized
from support.gguf_files import u32
from support.gguf_rewriting import rewrite
from support.importance_files import needs_matrix
from support.output_hashes import gguf_without_record


@pytest.mark.parametrize("options", [{}, {"tied": True, "shards": 3}, {"bias": True, "kv_heads": 4}, {"dtype": "float16"}])
def test_a_dense_file_gives_back_every_tensor(tiny_llama: Any, tmp_path: Path, options: dict) -> None:
    with open_checkpoint(str(tiny_llama(**options))) as source:
        path = export(source, tmp_path / "m.gguf", "F32")
        with open_checkpoint(str(path)) as back:
            assert back.kind == "gguf"
            assert back.specs.keys() == source.specs.keys()
            for name, spec in source.specs.items():
                assert torch.equal(back.read(name), source.read(name).float()), name
                assert back.specs[name].shape == spec.shape


@pytest.mark.parametrize("file_type", FILE_TYPES)
def test_every_file_type_comes_back_as_the_blocks_that_went_out(tiny_llama: Any, tmp_path: Path, file_type: str) -> None:
    with open_checkpoint(str(tiny_llama())) as source:
        is_weighed = needs_matrix(FILE_TYPES[file_type])
        schemes = filetypes.mix(file_type, source.specs, source.config, is_weighed=is_weighed)
        with open_checkpoint(str(export(source, tmp_path / "m.gguf", file_type, is_weighed=is_weighed))) as back:
            for name, scheme in schemes.items():
                sent = quantized(source.read(name), scheme, is_weighed=is_weighed)
                if isinstance(sent, QuantizedTensor):
                    assert back.schemes[name] == scheme
                    assert torch.equal(back.quantized(name).parts["blocks"], sent.parts["blocks"]), name
                    assert torch.equal(back.read(name), ops.dequantize_blocks(sent.parts["blocks"], scheme.qtype, sent.shape[1])), name
                else:
                    assert torch.equal(back.read(name).float(), sent.to(back.read(name).dtype).float()), name
            assert back.read("model.norm.weight").dtype == torch.float32
            assert (back.quantization or {})["general.file_type"] == FILE_TYPES[file_type].number  # others choose alike


@pytest.mark.parametrize("file_type", ["Q4_K_M", "Q8_0", "BF16"])
def test_the_gguf_package_decodes_the_same_weights(tiny_llama: Any, tmp_path: Path, file_type: str) -> None:
    with open_checkpoint(str(tiny_llama())) as source:
        path = export(source, tmp_path / "m.gguf", file_type)
    with open_checkpoint(str(path)) as back:
        reader = peer.GGUFReader(path)
        for tensor in reader.tensors:
            name = back.arch.hf_name(tensor.name)
            theirs = torch.from_numpy(peer.dequantize(tensor.data, tensor.tensor_type).copy()).reshape(back.specs[name].shape)
            order = back.arch.row_order(name, theirs.shape[0], back.config)
            ours = back.read(name).float()
            torch.testing.assert_close(ours if order is None else ours[order], theirs, rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_every_block_type_is_written_under_ggmls_name_and_decodes_in_the_gguf_package(tiny_llama: Any, tmp_path: Path, kind: str) -> None:
    ggml_type = container.ggml_type_of(kind)
    assert container.qtype_of(ggml_type) == kind
    with open_checkpoint(str(tiny_llama())) as source:
        path = export(source, tmp_path / "m.gguf", "Q8_0", is_weighed=kind in NEEDY, tensor_type=[f"ffn_up={ggml_type}"])
    with open_checkpoint(str(path)) as back:
        name = "model.layers.0.mlp.up_proj.weight"
        assert (back.specs[name].dtype, back.schemes[name]) == (ggml_type, Scheme.of(kind))
        (stored,) = (tensor for tensor in peer.GGUFReader(path).tensors if tensor.name == "blk.0.ffn_up.weight")
        assert stored.tensor_type.name == ggml_type
        theirs = torch.from_numpy(peer.dequantize(stored.data, stored.tensor_type).copy())
        torch.testing.assert_close(back.read(name).float(), theirs, rtol=0, atol=0)


def test_config_comes_back(tiny_llama: Any, tmp_path: Path) -> None:
    with (
        open_checkpoint(str(tiny_llama(layers=3, tied=True))) as source,
        open_checkpoint(str(export(source, tmp_path / "m.gguf", "F16"))) as back,
    ):
        missing = {"attention_dropout", "initializer_range", "pretraining_tp", "use_cache", "dtype"}
        assert {key: back.config[key] for key in source.config.keys() - missing} == {
            key: value for key, value in source.config.items() if key not in missing
        }


@pytest.mark.parametrize(
    "parameters",
    [
        {"rope_type": "linear", "rope_theta": 1e6, "factor": 2.5},
        {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 512, "beta_fast": 30.0},
        LLAMA3,
        LLAMA3 | {"factor": 32.0},
        LLAMA3 | {"factor": 5.0, "low_freq_factor": 1.0, "high_freq_factor": 3.0, "original_max_position_embeddings": 4096},
    ],
)
def test_rotary_scaling_comes_back(tiny_llama: Any, tmp_path: Path, parameters: dict) -> None:
    folder = edit_config(tiny_llama(), rope_parameters=parameters)
    with open_checkpoint(str(folder)) as source, open_checkpoint(str(export(source, tmp_path / "m.gguf", "F16"))) as back:
        assert back.config["rope_parameters"] == parameters
        assert ("rope_freqs.weight" in headers.read_header(back.path).specs) == (parameters["rope_type"] == "llama3")


def test_transformers_4_configs_mean_the_same(tiny_llama: Any, tmp_path: Path) -> None:
    old = {"rope_parameters": None, "rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}
    with open_checkpoint(str(edit_config(tiny_llama(), **old))) as source:
        fields = headers.read_header(export(source, tmp_path / "m.gguf", "F16")).fields
    assert fields["llama.rope.freq_base"].value == 5e5
    assert (fields["llama.rope.scaling.type"].value, fields["llama.rope.scaling.factor"].value) == ("linear", 2.0)


def test_llama3_factors_are_one_factor_and_between() -> None:
    factors = rope.llama3_factors(LLAMA3, 128)
    assert factors[0] == 1
    assert factors[-1] == 8
    between = factors[(factors > 1) & (factors < 8)]
    assert len(between) > 3
    assert torch.equal(between, between.sort().values)


def test_factors_by_another_rule_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="rope_freqs"):
        rope.llama3_parameters(torch.linspace(1, 8, 64), 500000.0)


def test_metadata_names_the_file_type_and_carries_ours(tiny_llama: Any, tmp_path: Path) -> None:
    ours = {"version": "0.1", "seed": 3, "error": 0.25, "lossless": False, "schemes": {"b": 1, "a": [2]}}
    with open_checkpoint(str(tiny_llama())) as source:
        layout = gguf.FORMAT.layout(source, filetypes.mix("Q4_K_S", source.specs, source.config), Request(mix="Q4_K_S"))
        with layout.writer(tmp_path / "m.gguf", [], ours) as writer:  # below the library, whose own record has fewer kinds of values
            writer.commit()
        fields = headers.read_header(tmp_path / "m.gguf").fields
    assert fields["general.file_type"].value == peer.LlamaFileType.MOSTLY_Q4_K_S
    assert fields["general.quantization_version"].value == peer.GGML_QUANT_VERSION
    assert {key: fields[f"quantcli.{key}"].value for key in ("version", "seed", "error", "lossless")} == {
        k: ours[k] for k in list(ours)[:4]
    }
    assert json.loads(fields["quantcli.schemes"].value) == ours["schemes"]


def test_a_gguf_goes_to_another_type_with_its_metadata(tiny_llama: Any, tmp_path: Path) -> None:
    with open_checkpoint(str(tiny_llama())) as source:
        first = export(source, tmp_path / "a.gguf", "BF16")
        direct = export(source, tmp_path / "b.gguf", "Q4_K_M")
    with open_checkpoint(str(first)) as source:
        second = export(source, tmp_path / "c.gguf", "Q4_K_M")
    a, b, c = (headers.read_header(path) for path in (first, direct, second))
    assert c.fields.keys() == a.fields.keys()
    assert c.fields["quantcli.source"].value == str(first)  # what the first file said of its own source is not handed on
    assert direct.read_bytes()[b.offsets["output.weight"] :] == second.read_bytes()[c.offsets["output.weight"] :]


def test_a_pre_tokenizer_can_be_named(tiny_llama: Any, tmp_path: Path) -> None:
    with open_checkpoint(str(tiny_llama())) as source:
        assert headers.read_header(export(source, tmp_path / "a.gguf", "F16")).get("tokenizer.ggml.pre") == "gpt-2"
        assert headers.read_header(export(source, tmp_path / "b.gguf", "F16", pre_tokenizer="mpt")).get("tokenizer.ggml.pre") == "mpt"


def test_a_pre_tokenizer_can_be_named_for_a_gguf_source_too(tiny_llama: Any, tmp_path: Path) -> None:
    with open_checkpoint(str(tiny_llama())) as source:
        first = export(source, tmp_path / "a.gguf", "F16")
    with open_checkpoint(str(first)) as source:
        assert headers.read_header(export(source, tmp_path / "b.gguf", "F16", pre_tokenizer="mpt")).get("tokenizer.ggml.pre") == "mpt"


def test_the_model_card_names_the_model(tiny_llama: Any) -> None:
    folder = tiny_llama()
    (folder / "README.md").write_text("---\nlicense: mit\ntags:\n- small\n---\n# Model\n")
    (folder / "generation_config.json").write_text(json.dumps({"top_k": 7, "temperature": 0.5}))
    with open_checkpoint(str(folder)) as source:
        fields = gguf.FORMAT.layout(source, {}).fields
    assert (fields["general.license"].value, fields["general.tags"].value) == ("mit", ["small"])
    assert (fields["general.sampling.top_k"].value, fields["general.sampling.temp"].value) == (7, 0.5)


@pytest.mark.parametrize("card", ["---\nfoo: [1\n bar: :\n---\n", "---\nlicense: 3\n---\n"])
def test_a_model_card_that_makes_no_sense_is_a_checkpoint_error(tiny_llama: Any, card: str) -> None:
    folder = tiny_llama()
    (folder / "README.md").write_text(card)
    with open_checkpoint(str(folder)) as source, pytest.raises(CheckpointError, match=r"README\.md"):
        gguf.FORMAT.layout(source, {})


def test_the_plan_knows_every_byte(tiny_llama: Any, tmp_path: Path) -> None:
    with open_checkpoint(str(tiny_llama())) as source:
        schemes = filetypes.mix("Q5_K_M", source.specs, source.config)
        context = gguf.FORMAT.layout(source, schemes)
        for name, spec in source.specs.items():
            (planned,) = context.outputs(spec, schemes.get(name))
            ((got, data),) = context.parts(name, quantized(source.read(name), schemes.get(name))).items()
            assert (got, data.nbytes) == (planned.name, planned.nbytes)


def test_a_matrix_without_a_scheme_keeps_its_type(tiny_llama: Any) -> None:
    with open_checkpoint(str(tiny_llama())) as source:
        context = gguf.FORMAT.layout(source, {})
        assert context.outputs(source.specs["lm_head.weight"], None)[0].dtype == "BF16"
        assert context.outputs(source.specs["model.norm.weight"], None)[0].dtype == "F32"
        assert context.parts("lm_head.weight", source.read("lm_head.weight"))["output.weight"].dtype == torch.bfloat16


def test_norms_take_the_architectures_offset(tiny_llama: Any) -> None:
    with open_checkpoint(str(tiny_llama())) as source:
        context = gguf.FORMAT.layout(source, {})
        shifted = replace(context, arch=replace(context.arch, norm_offset=1.0))
        norm = source.read("model.norm.weight")
        assert torch.equal(shifted.parts("model.norm.weight", norm)["output_norm.weight"], norm.float() + 1)


def test_only_ggml_types_are_supported() -> None:
    assert all(gguf.FORMAT.supports(Scheme.of(qtype)) for qtype in ("q4_k", "q6_k", "q8_0", "f16", "bf16", "f32"))
    assert not gguf.FORMAT.supports(Scheme.parse("int4-g128"))


def test_gguf_has_its_own_packing_of_mxfp4_and_nvfp4() -> None:
    for word in ("mxfp4", "nvfp4"):
        assert not gguf.FORMAT.supports(Scheme.parse(word))
        assert gguf.FORMAT.suited(Scheme.parse(word), {}) == Scheme.of(f"ggml_{word}")
        assert container.ggml_type_of(f"ggml_{word}") == word.upper()
    rounded = Scheme.parse("mxfp4+mxfp4-g32")
    assert gguf.FORMAT.suited(rounded, {}) == rounded  # no engine of GGUF rounds a linear's input so


def test_a_weight_too_large_for_f16_is_named(tiny_llama: Any) -> None:
    with open_checkpoint(str(tiny_llama())) as source:
        schemes = filetypes.mix("F16", source.specs, source.config)
        context = gguf.FORMAT.layout(source, schemes)
        W = source.read("lm_head.weight").float()
        W[3, 5] = 1e5
        with pytest.raises(NumericsError, match=r"lm_head\.weight: a weight of 100000"):
            context.parts("lm_head.weight", W)


def test_an_untied_model_without_a_head_is_refused(tiny_llama: Any) -> None:
    with (
        open_checkpoint(str(edit_config(tiny_llama(tied=True), tie_word_embeddings=False))) as source,
        pytest.raises(CheckpointError, match="tie_word_embeddings"),
    ):
        gguf.FORMAT.layout(source, {})


@pytest.mark.parametrize("key", ["rms_norm_eps", "num_hidden_layers", "num_attention_heads", "max_position_embeddings", "vocab_size"])
def test_an_incomplete_config_is_named(tiny_llama: Any, key: str) -> None:
    folder = tiny_llama()
    config = json.loads((folder / "config.json").read_text())
    del config[key]
    (folder / "config.json").write_text(json.dumps(config))
    with open_checkpoint(str(folder)) as source, pytest.raises(CheckpointError, match=key):
        gguf.FORMAT.layout(source, filetypes.mix("F16", source.specs, source.config))


def test_unknown_rotary_scaling_is_refused(tiny_llama: Any) -> None:
    with (
        open_checkpoint(str(edit_config(tiny_llama(), rope_parameters={"rope_type": "longrope", "rope_theta": 1e4}))) as source,
        pytest.raises(UnsupportedError, match="longrope"),
    ):
        gguf.FORMAT.layout(source, {})


def test_unknown_options_are_refused(tiny_llama: Any) -> None:
    with open_checkpoint(str(tiny_llama())) as source, pytest.raises(RecipeError, match="colour"):
        gguf.FORMAT.layout(source, {}, Request(options={"colour": "red"}))


@pytest.mark.parametrize(
    ("change", "error", "word"),
    [
        ({"drop": "blk.1.ffn_up.weight"}, CheckpointError, "ffn_up.*missing"),
        ({"drop": "token_embd.weight"}, CheckpointError, "token_embd"),
        ({"fields": {"llama.block_count": u32(3)}}, CheckpointError, "missing"),
        ({"fields": {"llama.block_count": u32(2**31)}}, CheckpointError, "layers"),
        ({"fields": {"llama.attention.head_count": u32(3)}}, CheckpointError, "attn_q"),
        ({"fields": {"llama.attention.head_count": u32(0)}}, CheckpointError, "head_count"),
        ({"fields": {"llama.embedding_length": container.Field(peer.GGUFValueType.STRING, "x")}}, CheckpointError, "embedding_length"),
        ({"fields": {"llama.rope.freq_base": container.Field(peer.GGUFValueType.FLOAT32, float("nan"))}}, CheckpointError, "finite"),
        ({"fields": {"general.architecture": u32(1)}}, CheckpointError, "architecture"),
        ({"fields": {"split.count": container.Field(peer.GGUFValueType.UINT16, 2)}}, CheckpointError, "00001-of-00002"),
    ],
)
def test_a_file_that_contradicts_itself_is_refused(
    tiny_llama: Any, tmp_path: Path, change: dict, error: type[Exception], word: str
) -> None:
    with open_checkpoint(str(tiny_llama())) as source:
        path = export(source, tmp_path / "good.gguf", "F16")
    with pytest.raises(error, match=word):
        open_checkpoint(str(rewrite(path, tmp_path / "bad.gguf", **change)))


def test_a_gguf_file_is_known_by_its_name_or_its_first_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"<html>")
    (tmp_path / "b").write_bytes(b"GGUF")
    (tmp_path / "c").write_bytes(b"GGU")
    assert [gguf.FORMAT.detect(tmp_path / name, None) for name in ("a.gguf", "b", "c", ".")] == [True, True, False, False]
    with pytest.raises(CheckpointError, match=r"a\.gguf: not a GGUF file"):
        open_checkpoint(str(tmp_path / "a.gguf"))


STRANGE = (
    u32(0),
    u32(2**32 - 1),
    container.Field(peer.GGUFValueType.STRING, "\udcff x"),
    container.Field(peer.GGUFValueType.BOOL, True),
    container.Field(peer.GGUFValueType.FLOAT32, float("inf")),
    container.Field(peer.GGUFValueType.INT64, -7),
    container.Field(peer.GGUFValueType.ARRAY, [1, 2], peer.GGUFValueType.INT32),
    container.Field(peer.GGUFValueType.ARRAY, [], peer.GGUFValueType.STRING),
)


def test_no_value_of_any_metadata_key_does_more_than_raise(tiny_llama: Any, tmp_path: Path) -> None:
    """Every key with every strange value: the file opens and reads, or is refused by one of our errors."""
    linear = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 64, "beta_fast": 30.0}
    with open_checkpoint(str(edit_config(tiny_llama(layers=1, hidden=64, intermediate=64), rope_parameters=linear))) as source:
        path = export(source, tmp_path / "good.gguf", "F16")
    refused = 0
    keys = [key for key in headers.read_header(path).fields if key.startswith(("general", "llama")) or key.endswith("_id")]
    for key in [*keys, "split.count"]:
        for value in STRANGE:
            try:
                with open_checkpoint(str(rewrite(path, tmp_path / "bad.gguf", fields={key: value}))) as back:
                    back.read("model.layers.0.self_attn.q_proj.weight")
            except QuantcliError:
                refused += 1
    assert refused > 50


def test_a_type_nobody_here_decodes_is_listed_and_refused_when_read(tiny_llama: Any, tmp_path: Path) -> None:
    with open_checkpoint(str(tiny_llama())) as source:
        path = export(source, tmp_path / "good.gguf", "F16")
    with open_checkpoint(str(rewrite(path, tmp_path / "iq.gguf", dtype={"blk.0.ffn_up.weight": "IQ1_S"}))) as back:
        assert back.specs["model.layers.0.mlp.up_proj.weight"].dtype == "IQ1_S"
        with pytest.raises(UnsupportedError, match=r"up_proj\.weight is IQ1_S"):
            back.read("model.layers.0.mlp.up_proj.weight")
        assert np.isfinite(back.read("model.layers.0.mlp.gate_proj.weight").float().numpy()).all()


def test_a_type_nobody_here_decodes_goes_over_byte_for_byte_where_it_is_kept(tiny_llama: Any, tmp_path: Path) -> None:
    with open_checkpoint(str(tiny_llama())) as source:
        path = export(source, tmp_path / "good.gguf", "F16")
    opaque = "blk.0.ffn_up.weight"
    rewrite(path, tmp_path / "iq.gguf", dtype={opaque: "IQ1_M"}, data={opaque: 0xA5})

    def kept(source: Checkpoint, recipe: Recipe) -> tuple[bytes, bool]:
        """The bytes of the opaque tensor in the file that ``recipe`` makes, and whether that is said to be lossless."""
        *_, finished = pipeline.quantize(source, tmp_path / f"{recipe.name}.gguf", recipe)
        assert isinstance(finished, Finished)
        read = headers.read_header(finished.output)
        assert read.specs[opaque].dtype == "IQ1_M"
        return finished.output.read_bytes()[read.offsets[opaque] :][: read.specs[opaque].nbytes], finished.lossless

    with open_checkpoint(str(tmp_path / "iq.gguf")) as source:
        n_bytes = source.specs["model.layers.0.mlp.up_proj.weight"].nbytes
        assert kept(source, that_keeps(source, "gguf")) == (b"\xa5" * n_bytes, True)
        mixed = replace(recipes.load("q8_0"), format_options={"tensor_type": ["blk.0.ffn_up=iq1_m"]})
        assert kept(source, mixed) == (b"\xa5" * n_bytes, False)


def test_a_file_of_types_that_need_importance_is_copied_without_any(tiny_llama: Any, tmp_path: Path) -> None:
    with open_checkpoint(str(tiny_llama())) as source:
        path = export(source, tmp_path / "small.gguf", "IQ2_XXS", is_weighed=True)
    with open_checkpoint(str(path)) as source:
        *_, finished = pipeline.quantize(source, tmp_path / "copy.gguf", that_keeps(source, "gguf"))
        assert isinstance(finished, Finished)
        assert finished.lossless
        with open_checkpoint(str(finished.output)) as back:
            assert {"iq2_xxs"} < {scheme.qtype for scheme in back.schemes.values()}
            assert all(torch.equal(back.quantized(n).parts["blocks"], source.quantized(n).parts["blocks"]) for n in source.schemes)


def test_a_type_nobody_here_decodes_is_refused_before_any_weight_is_read_where_it_is_not_kept(tiny_llama: Any, tmp_path: Path) -> None:
    with open_checkpoint(str(tiny_llama())) as source:
        path = export(source, tmp_path / "good.gguf", "F16")
    with (
        open_checkpoint(str(rewrite(path, tmp_path / "iq.gguf", dtype={"blk.0.ffn_up.weight": "IQ1_S"}))) as source,
        pytest.raises(UnsupportedError, match=r"blk\.0\.ffn_up\.weight: IQ1_S cannot be decoded here"),
    ):
        next(pipeline.quantize(source, tmp_path / "out.gguf", recipes.load("q8_0")))


def test_layers_come_in_their_numbers_order(tiny_llama: Any, tmp_path: Path) -> None:
    with open_checkpoint(str(tiny_llama(layers=11, hidden=64, intermediate=64))) as source:
        path = export(source, tmp_path / "m.gguf", "Q8_0")
    with open_checkpoint(str(path)) as back:
        layers = [int(name.split(".")[2]) for name in back.specs if ".layers." in name]
    assert layers == sorted(layers)


def test_an_extra_tensor_of_the_source_is_an_error(tiny_llama: Any) -> None:
    with open_checkpoint(str(tiny_llama())) as source:
        source.specs["model.layers.0.mlp.router.weight"] = TensorSpec.dense("model.layers.0.mlp.router.weight", "BF16", (8, 256))
        with pytest.raises(UnsupportedError, match="router"):
            gguf.FORMAT.layout(source, {})


@pytest.mark.parametrize(
    ("name", "shape", "reason"),
    [
        ("model.layers.0.self_attn.rotary_emb.inv_freq", (32,), "follow from the config"),
        ("model.vision_tower.encoder.layers.0.mlp.fc1.weight", (8, 8), "file of its own"),
        ("model.layers.2.mlp.up_proj.weight", (512, 256), "layer 2 comes after the 2 of config.json"),
        ("mtp.layers.0.mlp.up_proj.weight", (512, 256), "predicts further tokens"),
    ],
)
def test_what_a_file_has_no_place_for_is_named_with_the_reason(tiny_llama: Any, name: str, shape: tuple[int, ...], reason: str) -> None:
    with open_checkpoint(str(tiny_llama())) as source:
        source.specs[name] = TensorSpec.dense(name, "BF16", shape)
        context = gguf.FORMAT.layout(source, {})
    assert list(context.dropped) == [name]
    assert reason in context.dropped[name]
    assert name in context.metadata({"seed": 0}, None)["quantcli.dropped"].value
    assert context.outputs(source.specs[name], None) == []


def test_an_unknown_model_is_refused_with_the_way_through_a_gguf_source(tiny_llama: Any) -> None:
    with open_checkpoint(str(edit_config(tiny_llama(), model_type="no such model"))) as source:
        with pytest.raises(UnsupportedError, match=r"'no such model'.*convert_hf_to_gguf.*SOURCE") as caught:
            cut_for(source, gguf.FORMAT)
        assert caught.value.exit_code == 5


def mixture(tmp_path: Path) -> Path:
    return families.make("mixtral", tmp_path / "mixtral")


def test_a_layer_without_one_of_its_experts_is_an_error(tmp_path: Path) -> None:
    with open_checkpoint(str(mixture(tmp_path))) as source:
        del source.specs["model.layers.1.block_sparse_moe.experts.2.w3.weight"]
        with pytest.raises(CheckpointError, match=r"number 2 of the 3 or more that make GGUF's blk\.1\.ffn_up_exps"):
            filetypes.mix("BF16", source.specs, source.config)


def test_experts_of_one_layer_that_would_have_two_types_are_refused(tmp_path: Path) -> None:
    with open_checkpoint(str(mixture(tmp_path))) as source:
        schemes = filetypes.mix("BF16", source.specs, source.config)
        schemes["model.layers.1.block_sparse_moe.experts.2.w3.weight"] = Scheme.of("q8_0")
        context = gguf.FORMAT.layout(source, schemes)
        outputs = [out for name, spec in source.specs.items() for out in context.outputs(spec, schemes.get(name))]
        with pytest.raises(UnsupportedError, match=r"blk\.1\.ffn_up_exps\.weight: slice 2 would be Q8_0 .*same scheme"):
            context.writer(tmp_path / "m.gguf", outputs, {}, overwrite=False)


def test_experts_of_every_source_come_out_as_the_same_file(tmp_path: Path) -> None:
    """One by one or fused, with statistics from calibration or without: slices of one tensor, each by its own expert."""
    files = []
    for name in ("qwen3_moe", "qwen3_moe, fused"):
        with open_checkpoint(str(families.make(name, tmp_path / name / "tiny"))) as source:
            files.append(export(source, tmp_path / f"{name}.gguf", "Q8_0", pre_tokenizer="gpt-2"))
    assert gguf_without_record(files[0]) == gguf_without_record(files[1])
    spec = headers.read_header(files[0]).specs["blk.1.ffn_up_exps.weight"]
    assert (spec.dtype, spec.shape, spec.nbytes) == ("Q8_0", (4, 48, 64), 4 * 48 * 2 * 34)


def test_an_nvfp4_folder_keeps_its_codes_and_scales(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Experts too. The scale of a matrix stands beside it, as convert_hf_to_gguf writes it, and counts when the file is read."""
    monkeypatch.setitem(families.CASES, "nvfp4", families.Case("qwen3_moe", families.QWEN_MOE | {"moe_intermediate_size": 64}))
    with open_checkpoint(str(families.make("nvfp4", tmp_path / "dense"))) as source:
        list(pipeline.quantize(source, tmp_path / "coded", recipes.load("nvfp4")))
    with open_checkpoint(str(tmp_path / "coded")) as source:
        recipe = replace(that_keeps(source, "gguf"), format_options={"pre_tokenizer": "gpt-2"})
        *_, finished = pipeline.quantize(source, tmp_path / "m.gguf", recipe)
        read = headers.read_header(tmp_path / "m.gguf")
        assert read.specs["blk.1.attn_q.scale"] == TensorSpec.dense("blk.1.attn_q.scale", "F32", (1,))
        assert read.specs["blk.1.ffn_up_exps.scale"] == TensorSpec.dense("blk.1.ffn_up_exps.scale", "F32", (4,))
        assert read.get("general.file_type") == peer.LlamaFileType.MOSTLY_NVFP4
        with open_checkpoint(str(tmp_path / "m.gguf")) as back:
            assert back.specs.keys() == source.specs.keys()
            assert set(map(str, back.schemes.values())) == {"ggml_nvfp4-scaled"}
            for name in source.schemes:
                kept, _ = conversions.convert(source.quantized(name), back.schemes[name])
                assert all(torch.equal(back.quantized(name).parts[part], kept.parts[part]) for part in ("blocks", "scale")), name
                torch.testing.assert_close(back.read(name), source.read(name), rtol=3e-7, atol=0)
            *_, again = pipeline.quantize(back, tmp_path / "copy.gguf", that_keeps(back, "gguf"))
    assert isinstance(finished, Finished)
    assert isinstance(again, Finished)
    assert (finished.lossless, again.lossless) == (False, True)
    copy = headers.read_header(tmp_path / "copy.gguf")
    assert copy.specs == read.specs


def test_a_scale_beside_nvfp4_that_is_not_one_a_matrix_is_refused(tiny_llama: Any, tmp_path: Path) -> None:
    with open_checkpoint(str(tiny_llama())) as source:
        path = export(source, tmp_path / "good.gguf", "F32")
    read = headers.read_header(path)
    specs = [container.tensor_spec(s.name, "NVFP4" if s.name == "blk.0.ffn_up.weight" else s.dtype, s.shape) for s in read.specs.values()]
    head, _, size = headers.header(read.fields, [*specs, container.tensor_spec("blk.0.ffn_up.scale", "F32", (2,))])
    path.write_bytes(head + bytes(size - len(head)))
    with pytest.raises(CheckpointError, match=r"blk\.0\.ffn_up\.scale' is F32 \[2\], expected F32 \[1\]"):
        open_checkpoint(str(path))


def test_nvfp4_is_rounded_anew_where_llama_cpp_forgets_the_scale_of_a_matrix(tmp_path: Path) -> None:
    with open_checkpoint(str(families.make("qwen2", tmp_path / "dense"))) as source:
        list(pipeline.quantize(source, tmp_path / "coded", recipes.load("nvfp4")))
    with open_checkpoint(str(tmp_path / "coded")) as source:
        recipe = replace(that_keeps(source, "gguf"), format_options={"pre_tokenizer": "gpt-2"})
        planned = next(pipeline.quantize(source, tmp_path / "m.gguf", recipe))
        assert isinstance(planned, Planned)
        assert {t.scheme for t in planned.plan.tensors if t.name in source.schemes} == {Scheme.of("q8_0")}
        wanted = replace(recipe, rules=(Rule.parse("down_proj", "ggml_nvfp4-scaled"),))
        with pytest.raises(UnsupportedError, match=r"down_proj.weight: ggml_nvfp4-scaled: llama.cpp does not multiply .* in qwen2"):
            next(pipeline.quantize(source, tmp_path / "m.gguf", wanted))


def test_the_files_of_a_split_model_one_behind_the_other_are_called_so(tiny_llama: Any, tmp_path: Path) -> None:
    """As ``cat`` makes of them: another name would not help."""
    out = tmp_path / "m.gguf"
    qc.export(tiny_llama(), out, "F16", options={"split_max_size": "1M"}, device="cpu")
    parts = sorted(tmp_path.glob("*.gguf"))
    assert len(parts) > 1
    joined = tmp_path / "joined.gguf"
    joined.write_bytes(b"".join(part.read_bytes() for part in parts))
    with pytest.raises(CheckpointError, match=rf"another GGUF file follows.*the {len(parts)} files of a model.*--merge"):
        open_checkpoint(str(joined))
    shutil.copy(parts[0], tmp_path / "renamed.gguf")
    with pytest.raises(CheckpointError, match="rename it"):
        open_checkpoint(str(tmp_path / "renamed.gguf"))


def test_a_file_whose_tokens_are_not_as_many_as_its_rows_is_refused(tiny_llama: Any, tmp_path: Path) -> None:
    with open_checkpoint(str(tiny_llama())) as source:
        path = export(source, tmp_path / "good.gguf", "F16")
    tokens = container.Field(peer.GGUFValueType.ARRAY, [f"t{i}" for i in range(511)], peer.GGUFValueType.STRING)
    with pytest.raises(CheckpointError, match=r"token_embd\.weight has 512 rows, tokenizer\.ggml\.tokens 511 tokens"):
        open_checkpoint(str(rewrite(path, tmp_path / "bad.gguf", fields={"tokenizer.ggml.tokens": tokens})))


def test_dropped_tensors_of_one_reason_are_told_in_one_line(tiny_llama: Any, tmp_path: Path) -> None:
    notes: list[qc.Note] = []
    folder = tiny_llama()
    tensors = load_file(folder / "model.safetensors")
    tensors |= {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(32) for i in range(2)}
    tensors |= {f"mtp.layers.{i}.fc.weight": torch.ones(8, 8) for i in range(50)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    qc.export(folder, tmp_path / "m.gguf", "F16", device="cpu", on_event=lambda e: notes.append(e) if isinstance(e, qc.Note) else None)
    dropped = sorted(note.text for note in notes if "dropped" in note.text)
    assert dropped == [
        "model.layers.0.self_attn.rotary_emb.inv_freq, model.layers.1.self_attn.rotary_emb.inv_freq: dropped (2 tensors): "
        "rotary frequencies follow from the config",
        "mtp.layers.0.fc.weight, mtp.layers.1.fc.weight and 48 more: dropped (50 tensors): a head that predicts further tokens",
    ]
