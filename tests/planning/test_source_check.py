"""A source is held to what its architecture promises before any work: a broken thing is named, and nothing is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import quantcli as qc
from quantcli import archs
from quantcli.checkpoint.checkpoint import open_folder
from quantcli.errors import CheckpointError, UnsupportedError
from quantcli.formats import open_checkpoint
from quantcli.planning import source_check
from quantcli.planning.vocabulary import tokens_of
from support import families
from support.tiny_models import TinyLlama

FAMILIES = ("llama", "qwen2", "mixtral", "qwen3_moe, fused", "gemma2", "phi3", "gpt2", "falcon 7b", "gpt-oss", "deepseek v3", "stablelm")

UNLIKE = ("llama", "mixtral", "gpt2", "deepseek v3")
"""Those of them that differ most in how tensors are named and put together."""

VERBS: Mapping[str, Callable[[Path, Path], object]] = {
    "quantize data-free": lambda folder, out: qc.quantize(folder, out, "nf4", device="cpu"),
    "quantize calibrated": lambda folder, out: qc.quantize(folder, out, "gptq-int4", data=str(out.parent / "no-such.txt"), device="cpu"),
    "export GGUF": lambda folder, out: qc.export(folder, out, "F16", device="cpu"),
    "calibrate": lambda folder, out: qc.calibrate(folder, out, device="cpu"),
    "eval": lambda folder, out: qc.evaluate(folder, device="cpu"),
}
"""Each fails on the check, which comes first: that text is not there."""


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = families.make(name, tmp_path_factory.mktemp("family") / "model")
        return made[name]

    return make


Tensors = dict[str, Tensor]


def broken(folder: Path, to: Path, change: Callable[[Tensors], object] | None = None, **config: Any) -> Path:
    """A copy of ``folder`` with ``change`` made to its tensors, and other values in config.json."""
    shutil.copytree(folder, to, dirs_exist_ok=True)
    if change is not None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file({name: t.contiguous() for name, t in tensors.items()}, to / "model.safetensors", metadata={"format": "pt"})
    path = to / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return to


def gone(name: str, tensors: Tensors) -> None:
    del tensors[name]


def reshaped(name: str, tensors: Tensors) -> None:
    tensors[name] = tensors[name][: tensors[name].shape[0] // 2]


def emptied(name: str, tensors: Tensors) -> None:
    tensors[name] = tensors[name].new_empty(0)


def retyped(name: str, tensors: Tensors) -> None:
    tensors[name] = tensors[name].to(torch.int8)


def refused(folder: Path, tmp_path: Path, verb: str, match: str) -> None:
    out = tmp_path / "out" / "model.gguf"
    out.parent.mkdir(exist_ok=True)
    with pytest.raises(CheckpointError, match=match) as caught:
        VERBS[verb](folder, out)
    assert caught.value.exit_code == 3
    assert not list(out.parent.iterdir())


def names_to_break(folder: Path) -> list[str]:
    """A matrix and a norm of the second layer, and the last norm; of experts the one in the middle."""
    names = sorted(open_folder(folder).specs)
    arch = archs.of(json.loads((folder / "config.json").read_text()))
    assert arch is not None
    second = [name for name in names if arch.layer_of(name) == 1]
    experts = [name for name in second if ".experts." in name]
    outside = [name for name in names if arch.layer_of(name) is None and ("norm" in name or "ln_f" in name)]
    return [next(n for n in second if n.endswith("weight") and "norm" not in n), second[-1], outside[0], *experts[len(experts) // 2 :][:1]]


@pytest.mark.parametrize("name", FAMILIES)
def test_nothing_is_said_of_a_sound_folder(family: Callable[[str], Path], name: str) -> None:
    with open_checkpoint(str(family(name))) as source:
        assert source_check.look(source) == []


@pytest.mark.parametrize(
    ("how", "name"),
    [*((gone, name) for name in FAMILIES), *((how, name) for how in (reshaped, emptied, retyped) for name in UNLIKE)],
)
def test_a_broken_tensor_of_any_family_is_named_by_every_verb(
    family: Callable[[str], Path], how: Callable[[str, Tensors], None], name: str, tmp_path: Path
) -> None:
    verbs = list(VERBS)
    for k, tensor in enumerate(names_to_break(family(name))):
        folder = broken(family(name), tmp_path / str(k), partial(how, tensor))
        for verb in verbs[:3] if k == 0 else [verbs[k % len(verbs)]]:
            refused(folder, tmp_path, verb, tensor.replace(".", r"\."))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_config_that_contradicts_the_tensors_is_an_error(family: Callable[[str], Path], name: str, tmp_path: Path) -> None:
    config = json.loads((family(name) / "config.json").read_text())
    arch = archs.of(config)
    assert arch is not None
    own = {usual: key for key, usual in arch.aliases.items() if key in config}
    layers, vocab, heads = (own.get(key, key) for key in ("num_hidden_layers", "vocab_size", "num_attention_heads"))
    refused(broken(family(name), tmp_path / "a", **{layers: config[layers] + 1}), tmp_path, "export GGUF", "layer 2|layers")
    refused(broken(family(name), tmp_path / "b", **{layers: config[layers] - 1}), tmp_path, "quantize data-free", r"layers|h\.1\.")
    refused(broken(family(name), tmp_path / "c", **{vocab: config[vocab] + 8}), tmp_path, "export GGUF", "384 rows.*vocab_size 392")
    refused(broken(family(name), tmp_path / "d", **{heads: 7}), tmp_path, "quantize data-free", "config.json")


def test_the_first_of_several_faults_counts_the_others_and_inspect_lists_all(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    def damage(tensors: Tensors) -> None:
        del tensors["model.layers.1.mlp.up_proj.weight"]
        reshaped("model.layers.0.self_attn.k_proj.weight", tensors)

    folder = broken(tiny_llama(), tmp_path / "model", damage)
    with (
        open_checkpoint(str(folder)) as source,
        pytest.raises(CheckpointError, match=r"up_proj.*is missing.*quantcli inspect lists 1 more"),
    ):
        source_check.check(source)
    missing, shape = qc.inspect(folder)["notes"]
    assert missing.startswith("model.layers.1.mlp.up_proj.weight (shape [512, 256]) is missing")
    assert shape.startswith("model.layers.0.self_attn.k_proj.weight has shape [64, 256], config.json gives [128, 256]")


def test_a_head_that_is_not_there_and_not_tied_is_an_error(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    folder = broken(tiny_llama(), tmp_path / "model", partial(gone, "lm_head.weight"))
    refused(folder, tmp_path, "quantize data-free", r"lm_head\.weight .* tie_word_embeddings")
    assert qc.inspect(broken(folder, tmp_path / "tied", tie_word_embeddings=True))["notes"] == []


def test_a_save_of_zero_3_is_told_by_its_empty_tensors(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    folder = broken(tiny_llama(), tmp_path / "model", partial(emptied, "model.layers.0.mlp.up_proj.weight"))
    refused(folder, tmp_path, "export GGUF", "ZeRO-3.*zero_to_fp32")


def test_layers_beyond_the_configs_are_an_error_unless_they_predict_further_tokens(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    folder = broken(tiny_llama(layers=3), tmp_path / "model", num_hidden_layers=2)
    refused(folder, tmp_path, "export GGUF", r"model\.layers\.2\..* after the 2 that config\.json tells of")
    further = broken(folder, tmp_path / "uncounted", num_nextn_predict_layers=1)
    refused(further, tmp_path, "export GGUF", r"model\.layers\.2\.")

    def project(tensors: Tensors) -> None:
        tensors["model.layers.2.eh_proj.weight"] = torch.ones(256, 512)

    assert findings(broken(further, tmp_path / "mtp", project)) == []


def test_a_bias_that_the_config_denies_is_an_error(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    folder = broken(tiny_llama(bias=True), tmp_path / "model", attention_bias=False, mlp_bias=False)
    refused(folder, tmp_path, "export GGUF", r"_proj\.bias.* is part of a llama model, but not of the one that config\.json tells of")


def test_what_transformers_would_leave_out_is_a_warning(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    def add(tensors: Tensors) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
        tensors["value_head.weight"] = torch.ones(1, 256)

    folder = broken(tiny_llama(), tmp_path / "model", add)
    with open_checkpoint(str(folder)) as source:
        assert source_check.check(source) == ("value_head.weight: no tensor of LlamaForCausalLM; transformers does not use it",)


@pytest.mark.parametrize(("architecture", "missing"), [("LlamaModel", []), ("LlamaForSequenceClassification", ["score.weight"])])
def test_a_model_of_another_class_of_the_family_needs_its_own_head(
    tiny_llama: TinyLlama, tmp_path: Path, architecture: str, missing: list[str]
) -> None:
    folder = broken(tiny_llama(), tmp_path / "model", partial(gone, "lm_head.weight"), architectures=[architecture])
    assert [finding.text.split()[0] for finding in findings(folder) if finding.is_error] == missing


def findings(folder: Path) -> list[source_check.Finding]:
    with open_checkpoint(str(folder)) as source:
        return source_check.look(source)


def test_a_model_that_transformers_does_not_know_is_held_against_itself(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    known = tiny_llama(layers=4)
    config: dict[str, Any] = {"model_type": "unheard-of", "architectures": ["Unheard"]}
    assert findings(broken(known, tmp_path / "sound", **config)) == []
    lacking = broken(known, tmp_path / "lacking", partial(gone, "model.layers.2.mlp.up_proj.weight"), **config)
    assert [f.text for f in findings(lacking)] == ["model.layers.2.mlp.up_proj.weight is missing, and every other layer has it"]
    short = broken(known, tmp_path / "short", num_hidden_layers=5, **config)
    assert [f.text for f in findings(short)] == ["config.json says num_hidden_layers 5, and the checkpoint has 4 in model.layers"]
    coded = broken(known, tmp_path / "coded", partial(retyped, "model.layers.2.mlp.up_proj.weight"), **config)
    assert "I8" in findings(coded)[0].text


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_weights_of_eight_bits_without_scales_are_codes_too(tiny_llama: TinyLlama, tmp_path: Path, dtype: torch.dtype) -> None:
    def cast(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"].to(dtype)

    (found,) = findings(broken(tiny_llama(), tmp_path / "cast", cast))
    assert found.is_error
    assert "model.layers.1.mlp.up_proj.weight: F8_E" in found.text
    assert "FP8: F8 with a scale beside each weight" in found.text


# -- what tells how a folder was saved -----------------------------------------------------------------------------------------


UP = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("renamed", "beside", "told"),
    [
        (f"{UP}.weight", (f"{UP}.weight.absmax", f"{UP}.weight.quant_map"), "4-bit codes of bitsandbytes.*dequantized"),
        (f"{UP}.weight", (f"{UP}.SCB",), "8-bit codes of bitsandbytes.*dequantized"),
        (f"{UP}.weight", (f"{UP}.scales", f"{UP}.biases"), "codes of MLX's quantization.*--de-quantize"),
        (f"{UP}.weight", (f"{UP}.weight_scale_inv",), "lost the quantization_config"),
        (f"{UP}.base_layer.weight", (f"{UP}.lora_A.default.weight",), r"an adapter \(LoRA\) for org/base that is not merged"),
        (f"base_model.model.{UP}.weight", (), r"an adapter \(LoRA\)"),
    ],
)
def test_names_beside_the_models_own_tell_how_it_was_saved(
    tiny_llama: TinyLlama, tmp_path: Path, renamed: str, beside: tuple[str, ...], told: str
) -> None:
    def rename(tensors: Tensors) -> None:
        tensors[renamed] = tensors.pop(f"{UP}.weight")
        tensors.update({name: torch.ones(4) for name in beside})

    folder = broken(tiny_llama(), tmp_path / "model", rename)
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    for verb in VERBS:
        refused(folder, tmp_path, verb, told)
    (finding,) = findings(folder)
    assert finding.text.startswith((*beside, renamed))


def test_an_adapters_folder_names_its_base(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    save_file({"base_model.model.lm_head.lora_A.weight": torch.ones(2, 2)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base-7b"}')
    for config in (None, tiny_llama() / "config.json"):
        if config is not None:
            shutil.copy(config, tmp_path)
        with pytest.raises(CheckpointError, match=r"an adapter \(LoRA\), not a model: its base is org/base-7b; merge it first"):
            qc.open(tmp_path)


def test_a_quantization_without_a_method_is_mlxs(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    def add(tensors: Tensors) -> None:
        tensors[f"{UP}.scales"] = torch.ones(4)

    folder = broken(tiny_llama(), tmp_path / "model", add, quantization_config={"group_size": 64, "bits": 4})
    with pytest.raises(UnsupportedError, match=r"up_proj\.scales: quantized by MLX.*--de-quantize"):
        qc.open(folder)


def test_two_saves_in_one_folder_are_an_error(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    folder = broken(tiny_llama(shards=2), tmp_path / "model")
    shutil.copy(tiny_llama() / "model.safetensors", folder)
    with pytest.raises(CheckpointError, match=r"two saves of weights, model\.safetensors and the 2 files"):
        qc.open(folder)
    for shard in folder.glob("model-*"):
        shard.unlink()
    qc.open(folder).close()  # an index that was left behind names nothing


# -- the vocabulary ------------------------------------------------------------------------------------------------------------


def with_tokens(folder: Path, *tokens: tuple[str, bool | None]) -> Path:
    """``folder`` with ``tokens``, text and whether special, added behind its tokenizer's."""
    path = folder / "tokenizer.json"
    parsed = json.loads(path.read_text())
    n = tokens_of(folder).size
    for k, (text, special) in enumerate(tokens):
        parsed["added_tokens"].append({"id": n + k, "content": text} | ({} if special is None else {"special": special}))
    path.write_text(json.dumps(parsed))
    return folder


def test_ordinary_tokens_without_a_row_are_an_error_and_special_ones_a_warning(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    folder = broken(tiny_llama(), tmp_path / "model")
    n = tokens_of(folder).size
    assert n == 512
    assert findings(folder) == []
    (finding,) = findings(with_tokens(folder, ("<pad>", True), ("<mask>", None)))
    assert not finding.is_error
    assert finding.text.startswith("2 special tokens of the tokenizer are beyond the 512 rows of model.embed_tokens.weight")
    path = tmp_path / "out.gguf"
    qc.export(folder, path, "F16", device="cpu")
    with open_checkpoint(str(path)) as back:
        assert "<pad>" not in back.file_metadata["tokenizer.ggml.tokens"].value
    path.unlink()
    refused(with_tokens(folder, ("hello", False)), tmp_path, "export GGUF", r"'hello' has id 514, of 515 tokens, and .* has 512 rows")


@pytest.mark.parametrize(("rows", "said"), [(520, 512), (512, 520)])
def test_rows_that_differ_from_vocab_size_are_named_with_both_numbers(tiny_llama: TinyLlama, tmp_path: Path, rows: int, said: int) -> None:
    folder = broken(tiny_llama(vocab=rows), tmp_path / "model", vocab_size=said)
    message = f"has {rows} rows, config.json says vocab_size {said}, and the tokenizer has 512 tokens; set vocab_size to {rows}"
    refused(folder, tmp_path, "export GGUF", message)
    assert findings(broken(folder, tmp_path / "padded", vocab_size=rows)) == []


def test_a_padding_token_without_a_row_is_of_no_matter_in_gguf_alone(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    folder = broken(tiny_llama(), tmp_path / "model", pad_token_id=512)
    refused(folder, tmp_path, "quantize data-free", "pad_token_id 512 is beyond the 512 rows")
    qc.export(folder, tmp_path / "out.gguf", "F16", device="cpu")
    with open_checkpoint(str(tmp_path / "out.gguf")) as back:
        assert "tokenizer.ggml.padding_token_id" not in back.file_metadata


def test_an_output_that_cannot_be_read_back_has_no_name(tiny_llama: TinyLlama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check of the finished output runs before it is renamed, on its own files."""
    looked: list[bool] = []

    def look(checkpoint: Any, *, is_read_back: bool = False) -> list[source_check.Finding]:
        looked.append(is_read_back)
        return [source_check.Finding(f"{len(checkpoint.specs)} tensors")] if is_read_back else []

    monkeypatch.setattr(source_check, "look", look)
    for name, recipe in (("out", "nf4"), ("out.gguf", "q8_0")):
        with pytest.raises(CheckpointError, match=r"refused when it is read back: 21 tensors; nothing is written"):
            qc.quantize(tiny_llama(), tmp_path / name, recipe, device="cpu")
    assert looked == [False, True] * 2
    assert not list(tmp_path.iterdir())
