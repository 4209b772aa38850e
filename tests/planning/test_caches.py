"""Scales of key-value caches: measured as the cache is filled, written as compressed-tensors has them, and simulated as it would round."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantcli import recipe
from quantcli.calibration import calibrate
from quantcli.calibration.data import Windows
from quantcli.calibration.measuring import measure, measure_and_advance
from quantcli.errors import CheckpointError, QuantcliError, RecipeError, UnsupportedError
from quantcli.formats import open_checkpoint
from quantcli.forward import HiddenStates
from quantcli.planning.arrange import open_forward, untied
from quantcli.recipe import PassSpec, Rule
from quantcli.statistics.stats_file import StatsFile
from quantcli.tensors import KV_CACHES, KvCache, Scheme
from quantcli.walk import pipeline
from quantcli.walk.evaluate import perplexity
from support.runs import run
from support.tiny_models import TinyLlama

IDS = torch.randint(2, 512, (6, 40), generator=torch.Generator().manual_seed(3))
HEADS, DIM = 2, 64


@pytest.fixture(scope="module")
def folder(tiny_llama: TinyLlama) -> Path:
    return tiny_llama(layers=2)


def quantize(model: Path, target: Path, how: recipe.Recipe, **options: Any) -> Path:
    run(model, target, how, **{"data": Windows(IDS), **options})
    return target


def with_cache(word: str, **changes: Any) -> recipe.Recipe:
    return replace(recipe.load("fp8-dynamic-kv"), kv_cache=word, **changes)


def filled(model: Path | transformers.PreTrainedModel) -> list[tuple[Tensor, Tensor]]:
    """What the cache of the whole model holds after IDS: of each layer keys and values [B, heads, T, dim]. transformers' own."""
    if isinstance(model, Path):
        model = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        cache = model(input_ids=IDS, use_cache=True).past_key_values
    return [(layer.keys, layer.values) for layer in cache.layers]


def reach_by_head(states: Tensor) -> Tensor:
    return states.abs().amax((0, 2, 3))


# ---- measuring ----


def test_statistics_of_caches_are_those_of_what_the_whole_models_cache_holds(folder: Path, tmp_path: Path) -> None:
    with open_checkpoint(str(folder)) as source:
        list(calibrate.calibrate(source, IDS, tmp_path / "stats.safetensors", histograms=True))
    stats = StatsFile(tmp_path / "stats.safetensors")
    for i, both in enumerate(filled(folder)):
        for word, states in zip("kv", both, strict=True):
            measured = stats[f"model.layers.{i}.self_attn.{word}_cache"]
            X = states.transpose(1, 2).reshape(-1, HEADS * DIM)
            assert measured.n_tokens == IDS.numel()
            assert measured.H is None
            assert measured.histogram is not None
            torch.testing.assert_close(measured.absmax, X.abs().amax(0), rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(measured.importance, X.square().mean(0), rtol=1e-4, atol=1e-6)


def test_looking_at_caches_changes_nothing(folder: Path) -> None:
    with open_checkpoint(str(folder)) as source:
        forward = open_forward(source)
        assert forward.caches == tuple(KvCache(f"model.layers.{i}.self_attn", HEADS, DIM, DIM) for i in range(2))
        hidden = forward.embed(IDS)
        with forward.layer(0) as layer:
            seen: list[str] = []
            assert torch.equal(layer(hidden, IDS), layer.observe(hidden, IDS, lambda tap, _: seen.append(tap), layer.cache_widths))
    assert seen == list(forward.caches[0].widths)


@pytest.mark.parametrize("model_type", ["qwen3", "gemma2", "phi3", "gpt_neox", "mixtral", "qwen3_next"])
def test_what_keeps_keys_and_values_is_found_by_running_it(model_type: str, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": 512, "pad_token_id": 0}
    special = {"qwen3_next": {"layer_types": ["linear_attention", "full_attention"], "num_experts": 4, "num_experts_per_tok": 2}}
    config = transformers.AutoConfig.for_model(model_type, **sizes, **special.get(model_type, {}))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.save_pretrained(tmp_path)
    with open_checkpoint(str(tmp_path)) as source:
        forward = open_forward(source)
        found = {cache.attention: (cache.heads, cache.k_dim, cache.v_dim) for cache in forward.caches}
    layers = {"qwen3_next": [1], "gpt_neox": []}.get(model_type, [0, 1])  # GPT-NeoX calls its cache by another name
    assert found == {f"model.layers.{i}.self_attn": (2, 16, 16) for i in layers}


# ---- writing ----


@pytest.mark.parametrize("word", KV_CACHES)
def test_scales_are_those_of_the_quantized_model_and_lie_as_the_library_has_them(folder: Path, tmp_path: Path, word: str) -> None:
    target = quantize(folder, tmp_path / "out", with_cache(word, scheme=Scheme.parse("int4-g64-sym"), passes=(PassSpec("gptq"),)))
    words = json.loads((target / "config.json").read_text())["quantization_config"]["kv_cache_scheme"]
    by_head = word.endswith("-head")
    assert (words["num_bits"], words["symmetric"], words["dynamic"]) == (8, True, False)
    assert (words["type"], words["strategy"]) == ("float" if "fp8" in word else "int", "attn_head" if by_head else "tensor")
    files = load_file(target / "model.safetensors")
    with open_checkpoint(str(target)) as output:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        model.load_state_dict({name: output.read(name).float() for name in output.specs if "_scale" not in name}, strict=True)
    for i, both in enumerate(filled(model)):
        for part, states in zip(("k_scale", "v_scale"), both, strict=True):
            scale = files[f"model.layers.{i}.self_attn.{part}"]
            assert scale.dtype == torch.bfloat16
            assert scale.shape == ((HEADS, 1, 1) if by_head else (1,))
            reach = reach_by_head(states) if by_head else states.abs().max()
            expected = reach / (448 if "fp8" in word else 127)
            torch.testing.assert_close(scale.float().flatten(), expected.view(-1), rtol=2**-8, atol=0)


def test_the_plan_has_every_byte(folder: Path, tmp_path: Path) -> None:
    target = quantize(folder, tmp_path / "out", with_cache("fp8-head"))
    with open_checkpoint(str(folder)) as source:
        planned, *_ = pipeline.quantize(source, tmp_path / "dry", with_cache("fp8-head"), dry_run=True)
    written = load_file(target / "model.safetensors")
    assert {spec.name: spec.shape for spec in planned.plan.outputs} == {name: tuple(t.shape) for name, t in written.items()}
    assert planned.plan.n_bytes == sum(t.nbytes for t in written.values())


def test_weights_may_stay_as_they_are(folder: Path, tmp_path: Path) -> None:
    target = quantize(folder, tmp_path / "out", with_cache("fp8", scheme=Scheme.parse("bf16")))
    assert json.loads((target / "config.json").read_text())["quantization_config"]["config_groups"] == {}
    with open_checkpoint(str(target)) as output, open_checkpoint(str(folder)) as source:
        assert output.schemes == {}
        assert list(output.kv_cache.values()) == ["fp8", "fp8"]
        assert perplexity(output, IDS).activations == "simulated"
        assert all(torch.equal(output.read(name), source.read(name)) for name in source.specs)


def test_statistics_from_a_file_serve_in_place_of_windows(folder: Path, tmp_path: Path) -> None:
    with open_checkpoint(str(folder)) as source:
        list(calibrate.calibrate(source, IDS, tmp_path / "stats.safetensors", hessian=False))
    stats = StatsFile(tmp_path / "stats.safetensors")
    given = {"data": stats}
    files = load_file(quantize(folder, tmp_path / "out", with_cache("fp8"), **given) / "model.safetensors")
    for i, both in enumerate(filled(folder)):
        for part, states in zip(("k_scale", "v_scale"), both, strict=True):
            expected = (states.abs().max() / 448).view(1)
            torch.testing.assert_close(files[f"model.layers.{i}.self_attn.{part}"].float(), expected, rtol=2**-8, atol=0)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("word", ["fp8", "int8-head"])
def test_statistics_from_before_a_change_of_basis_serve_too(tiny_llama: TinyLlama, tmp_path: Path, word: str, kv_heads: int) -> None:
    """Values are divided by what o_proj is multiplied by, and scales follow. But for that 8-bit weights leave the cache much as it was."""
    folder = tiny_llama(layers=2, kv_heads=kv_heads)
    with open_checkpoint(str(folder)) as source:
        list(calibrate.calibrate(source, IDS, tmp_path / "stats.safetensors"))
    stats = StatsFile(tmp_path / "stats.safetensors")
    given = {"data": stats}
    how = with_cache(word, passes=(PassSpec("smoothquant", {"alpha": 0.8}), PassSpec("rtn")), scheme=Scheme.parse("int8-channel-sym"))
    files = load_file(quantize(folder, tmp_path / "out", how, **given) / "model.safetensors")
    largest = 448 if word == "fp8" else 127
    with open_checkpoint(str(tmp_path / "out")) as output:
        forward = open_forward(output)
        states, before = HiddenStates.embed(forward, IDS), []
        for i, cache in enumerate(forward.caches):
            with forward.layer(i) as layer:
                found = measure_and_advance(layer, states, taps=list(cache.widths), needs=frozenset({"absmax"}))
            for part, tap in (("k_scale", cache.k_tap), ("v_scale", cache.v_tap)):
                heads = found[tap].absmax.view(kv_heads, -1).amax(1)
                expected = (heads if word.endswith("head") else heads.max().view(1)) / largest
                torch.testing.assert_close(files[f"{cache.attention}.{part}"].float().view(-1), expected, rtol=0.03, atol=0)
            before.append(float(stats[cache.v_tap].absmax.max() / found[cache.v_tap].absmax.max()))
    assert all(abs(ratio - 1) > 0.1 for ratio in before)


def test_a_range_may_be_less_than_the_largest_value(folder: Path, tmp_path: Path) -> None:
    how = with_cache("int8")
    scales = []
    for method in ("minmax", "mse"):
        chosen = replace(how, calibration=replace(how.calibration, input_range=method))
        scales.append(load_file(quantize(folder, tmp_path / method, chosen) / "model.safetensors")["model.layers.0.self_attn.k_scale"])
    assert scales[1] < scales[0]


# ---- simulating ----


class RoundingCache(transformers.DynamicCache):
    """Keys and values as they come back from eight bits, computed the long way."""

    def __init__(self, scales: dict[str, Tensor], word: str) -> None:
        super().__init__()
        self.scales, self.word = scales, word

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        both = []
        for part, states in (("k_scale", keys), ("v_scale", values)):
            scale = self.scales[f"model.layers.{layer_idx}.self_attn.{part}"].float().view(1, -1, 1, 1)
            q = states / scale
            q = q.clamp(-448, 448).to(torch.float8_e4m3fn).float() if "fp8" in self.word else q.round().clamp(-128, 127)
            both.append(q * scale)
        return super().update(*both, layer_idx, *args, **kwargs)


@pytest.mark.parametrize("word", KV_CACHES)
def test_eval_tells_the_perplexity_of_a_model_whose_cache_rounds(folder: Path, tmp_path: Path, word: str) -> None:
    target = quantize(folder, tmp_path / "out", with_cache(word, scheme=Scheme.parse("bf16")))
    files = load_file(target / "model.safetensors")
    if word == "int8":  # so that what is beyond the range is cut, too
        files = {name: t / 4 if name.endswith("k_scale") else t for name, t in files.items()}
        save_file(files, target / "model.safetensors", metadata={"format": "pt"})
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits = model(input_ids=IDS, past_key_values=RoundingCache(files, word), use_cache=True).logits
    truth = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).double(), IDS[:, 1:].flatten()).exp()
    with open_checkpoint(str(target)) as output:
        ours, unrounded = (perplexity(output, IDS, activations=on).perplexity for on in (True, False))
    assert ours == pytest.approx(float(truth), rel=1e-6)
    assert abs(ours / unrounded - 1) > 1e-5


# ---- refusals ----


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"format": "gptq", "scheme": Scheme.parse("int4-g64-sym")}, UnsupportedError, "gptq format has no place for the scales"),
        (
            {
                "passes": (PassSpec("awq"), PassSpec("rtn")),
                "scheme": Scheme.parse("int4-g64-sym"),
                "calibration": recipe.Calibration(input_range="percentile"),
            },
            RecipeError,
            "all inputs of a tap together, and awq scales each for itself",
        ),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_written(
    folder: Path, tmp_path: Path, changes: dict[str, Any], error: type[QuantcliError], message: str
) -> None:
    with open_checkpoint(str(folder)) as source:
        list(calibrate.calibrate(source, IDS, tmp_path / "stats.safetensors", histograms=True))
    stats = StatsFile(tmp_path / "stats.safetensors")
    with pytest.raises(error, match=message):
        quantize(folder, tmp_path / "out", with_cache("fp8", **changes), data=stats)
    assert not (tmp_path / "out").exists()


def test_scales_that_are_there_already_are_carried_over_and_not_measured_twice(folder: Path, tmp_path: Path) -> None:
    first = quantize(folder, tmp_path / "first", with_cache("fp8"))
    with pytest.raises(RecipeError, match="has scales for its cache already"):
        quantize(first, tmp_path / "second", with_cache("int8"))
    again = quantize(first, tmp_path / "third", replace(recipe.load("gptq-w4a16"), scheme=Scheme.parse("int4-g64-sym")))
    with open_checkpoint(str(again)) as output, open_checkpoint(str(first)) as before:
        assert output.kv_cache == before.kv_cache
        assert all(map(torch.equal, output.cache_scales("model.layers.1.self_attn"), before.cache_scales("model.layers.1.self_attn")))


def test_a_view_of_a_checkpoint_has_its_caches_scales(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    """Or an untied head would have them measured anew, beside those that are carried over."""
    first = quantize(tiny_llama(layers=1, tied=True), tmp_path / "first", with_cache("fp8"))
    with open_checkpoint(str(first)) as source:
        view = untied(source, "model.embed_tokens.weight")
        assert view.kv_cache == source.kv_cache
        assert all(map(torch.equal, view.cache_scales("model.layers.0.self_attn"), source.cache_scales("model.layers.0.self_attn")))
    head = with_cache("int8", rules=(Rule.parse("lm_head", "fp8-channel"),))
    with pytest.raises(RecipeError, match="has scales for its cache already"):
        quantize(first, tmp_path / "second", head)


def test_a_latent_attention_is_refused(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 512}
    sizes |= {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16, "head_dim": 8}
    config = transformers.AutoConfig.for_model("deepseek_v3", **sizes, first_k_dense_replace=1)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path / "model")
    with pytest.raises(UnsupportedError, match="its attention is latent"):
        quantize(tmp_path / "model", tmp_path / "out", with_cache("fp8"), dry_run=True)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda scale: scale.fill_(-1), "expected numbers above zero"),
        (lambda scale: scale.repeat(3), "3 scales of keys and 1 of values for its cache; fp8 has 1 of each"),
    ],
)
def test_a_damaged_scale_is_an_error_that_names_it(folder: Path, tmp_path: Path, spoil: Any, message: str) -> None:
    target = quantize(folder, tmp_path / "out", with_cache("fp8"))
    files = load_file(target / "model.safetensors")
    files["model.layers.1.self_attn.k_scale"] = spoil(files["model.layers.1.self_attn.k_scale"])
    save_file(files, target / "model.safetensors", metadata={"format": "pt"})
    with open_checkpoint(str(target)) as output, pytest.raises(CheckpointError, match=message) as error:
        perplexity(output, IDS)
    assert "model.layers.1.self_attn" in str(error.value)


@pytest.mark.parametrize(
    "scheme",
    [
        {"num_bits": 4, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True},
        {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True, "symmetric": True},
    ],
)
def test_other_caches_are_taken_as_they_are_with_a_note(folder: Path, tmp_path: Path, scheme: dict[str, Any]) -> None:
    target = quantize(folder, tmp_path / "out", with_cache("fp8"))
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"]["kv_cache_scheme"] = scheme
    (target / "config.json").write_text(json.dumps(config))
    with open_checkpoint(str(target)) as output:
        assert output.kv_cache == {}
        assert any("no name for" in note for note in output.notes)


def test_a_recipe_with_another_word_is_refused() -> None:
    with pytest.raises(RecipeError, match="kv_cache is one of fp8, int8"):
        recipe.parse({**recipe.load("fp8-dynamic-kv").to_dict(), "kv_cache": "fp4"}, "x")


def test_the_recipe_needs_text_and_no_h() -> None:
    how = recipe.load("fp8-dynamic-kv")
    assert (how.needs, how.cache_needs, how.is_calibrated) == (frozenset(), {"absmax"}, True)
    assert recipe.parse(how.to_dict(), how.name).kv_cache == "fp8"


def test_caches_are_measured_behind_the_weights_as_set(folder: Path) -> None:
    with open_checkpoint(str(folder)) as source:
        forward = open_forward(source)
        states = HiddenStates.embed(forward, IDS)
        with forward.layer(0) as layer:
            taps = list(layer.cache_widths)
            before = measure(layer, states, taps=taps, needs=frozenset({"absmax"}))
            layer.set("model.layers.0.self_attn.v_proj.weight", layer.tensors["model.layers.0.self_attn.v_proj.weight"].float() * 2)
            after = measure(layer, states, taps=taps, needs=frozenset({"absmax"}))
    torch.testing.assert_close(after[taps[1]].absmax, 2 * before[taps[1]].absmax)
    assert torch.equal(after[taps[0]].absmax, before[taps[0]].absmax)
