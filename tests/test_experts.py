"""Experts: each has its own taps and tokens, fused on disk or not; nothing is skipped in silence."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional
from typer.testing import CliRunner

from quantcli import experts
from quantcli import recipe as recipes
from quantcli.calibration import calibrate, measuring
from quantcli.calibration.data import Windows
from quantcli.cli import app, main
from quantcli.errors import RecipeError, UnsupportedError
from quantcli.formats import gguf, open_checkpoint
from quantcli.planning.arrange import cut_for, open_forward
from quantcli.statistics.stats_file import StatsFile
from quantcli.tensors import TensorReport
from quantcli.walk import pipeline
from quantcli.walk.evaluate import compare, perplexity
from quantcli.walk.pipeline import LayerDone
from support import gptq_peer
from support.runs import run
from support.tiny_models import write_tokenizer

SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 512,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32},
    "qwen2_moe": {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 64,
        "mlp_only_layers": [0],
    },
    "deepseek_v3": {
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "n_shared_experts": 1,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 4,
        "q_lora_rank": 32,
        "kv_lora_rank": 32,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 16,
        "head_dim": 8,
    },
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 32},
    "minimax_m2": {"num_local_experts": 4, "num_experts_per_tok": 2, "rotary_dim": 8},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 96, "sliding_window": 16},
}
HIDDEN = torch.randn(1, 32, 64, generator=torch.Generator().manual_seed(6))
IDS = torch.randint(3, 512, (4, 32), generator=torch.Generator().manual_seed(5))

SaveModel = Callable[..., Path]


@pytest.fixture
def save_model(tmp_path: Path, tiny_tokenizer: Tokenizer) -> SaveModel:
    """``save_model("mixtral", fused=False, **config) -> folder``: the same random model, its experts one by one or in one tensor."""

    def save(model_type: str, *, fused: bool = False, unreached: int | None = None, **options: Any) -> Path:
        config = transformers.AutoConfig.for_model(model_type, **{**SMALL, **FAMILIES[model_type], **options})
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for name, parameter in model.named_parameters():
            parameter.data.normal_(0, 0.2).add_("norm" in name)
        for module in model.modules():
            if unreached is not None and type(module).__name__.endswith("Router"):
                close(module, unreached)
        folder = tmp_path / f"{model_type}-{'fused' if fused else 'one-by-one'}"
        model.save_pretrained(folder, save_original_format=not fused)
        if model_type == "gpt_oss" and not fused:
            shutil.copytree(folder, as_transformers_has_it(folder), dirs_exist_ok=True)
            take_apart(folder / "model.safetensors")
        write_tokenizer(folder, tiny_tokenizer)
        return folder

    return save


def take_apart(file: Path) -> None:
    """gpt-oss's experts one by one, under the names that gptqmodel and llm-compressor give them."""
    apart: dict[str, Tensor] = {}
    for name, tensor in load_file(file).items():
        experts, _, stack = name.partition(".mlp.experts.")
        linear, part = stack.removesuffix("_bias"), "bias" if stack.endswith("_bias") else "weight"
        rows = {"gate_up_proj": {"gate_proj": slice(0, None, 2), "up_proj": slice(1, None, 2)}, "down_proj": {"down_proj": slice(None)}}
        for word, taken in rows.get(linear, {}).items():
            for e, slice_ in enumerate(tensor):
                apart[f"{experts}.mlp.experts.{e}.{word}.{part}"] = (slice_.T if part == "weight" else slice_)[taken].contiguous()
        if not stack:
            apart[name] = tensor
    save_file(apart, file, metadata={"format": "pt"})


def as_transformers_has_it(folder: Path) -> Path:
    """A folder of the same model that transformers reads: it knows gpt-oss's experts in one tensor only."""
    return folder.with_name(f"{folder.name}-stacked") if folder.name == "gpt_oss-one-by-one" else folder


def close(router: Any, expert: int) -> None:
    """No token goes to ``expert`` where each goes to one: its score is the mean of the others'."""
    others = [e for e in range(len(router.weight)) if e != expert]
    router.weight.data[expert] = router.weight.data[others].mean(0)


def inputs_by_hand(folder: Path, ids: Tensor, *, every: bool = False) -> dict[tuple[int, int, str], Tensor]:
    """(layer, expert, "in" | "down") → what it reads: from what transformers' own modules were given, expert by expert."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        as_transformers_has_it(folder), dtype=torch.float32, experts_implementation="eager"
    )
    given: dict[int, tuple[Any, Tensor, Tensor]] = {}
    for name, module in model.named_modules():
        if type(module).__name__.endswith("Experts"):
            i = int(name.split(".")[2])
            module.register_forward_pre_hook(lambda m, args, i=i: given.update({i: (m, args[0], args[1])}))
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    found: dict[tuple[int, int, str], Tensor] = {}
    for i, (module, hidden, index) in given.items():
        for e in range(module.num_experts):
            X = hidden if every else hidden[torch.where((index == e).T)[1]]  # first choices come first
            found[i, e, "in"], found[i, e, "down"] = X, read_by_down(module, e, X).detach()
    return found


def read_by_down(module: Any, e: int, X: Tensor) -> Tensor:
    """What the last linear of expert ``e`` is given where the first ones are given ``X``."""
    if hasattr(module, "limit"):  # gpt-oss
        gate_up = X @ module.gate_up_proj[e] + module.gate_up_proj_bias[e]
        gate, up = gate_up[:, ::2].clamp(max=module.limit), gate_up[:, 1::2].clamp(-module.limit, module.limit)
        return (up + 1) * (gate * torch.sigmoid(module.alpha * gate))
    gate, up = functional.linear(X, module.gate_up_proj[e]).chunk(2, -1)
    return functional.silu(gate) * up


def measured(folder: Path, ids: Tensor, **options: Any) -> tuple[dict[str, str], dict[str, Tensor], Tensor]:
    """The taps of every weight, what each tap read, and the logits of the walk that observed it."""
    seen: dict[str, list[Tensor]] = {}
    with open_checkpoint(str(folder)) as checkpoint:
        forward = open_forward(checkpoint, **options)
        hidden = forward.embed(ids)
        for i in range(len(forward.layers)):
            with forward.layer(i) as layer:
                hidden = layer.observe(hidden, ids, lambda tap, X: seen.setdefault(tap, []).append(X.clone()))
        return forward.taps, {tap: torch.cat(Xs) for tap, Xs in seen.items()}, forward.head(hidden)


def expert_of(tap: str) -> tuple[int, int, str] | None:
    """(layer, expert, "in" | "down") of an expert's tap."""
    words = tap.split(".")
    if "experts" not in words:
        return None
    return int(words[2]), int(words[-2]), "down" if words[-1] in ("w2", "down_proj") else "in"


@pytest.mark.parametrize("fused", [False, True], ids=["one-by-one", "fused"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_each_expert_reads_the_tokens_routed_to_it(save_model: SaveModel, model_type: str, fused: bool) -> None:
    folder = save_model(model_type, fused=fused)
    expected = inputs_by_hand(folder, IDS)
    taps, seen, logits = measured(folder, IDS)
    got = {key: X for tap, X in seen.items() if (key := expert_of(tap))}
    assert got.keys() == {key for key, X in expected.items() if len(X)}
    for key, X in got.items():
        assert torch.equal(X, expected[key]), key
    assert len({tap for tap in taps.values() if expert_of(tap)}) == len(expected)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        as_transformers_has_it(folder), dtype=torch.float32, experts_implementation="eager"
    )
    with torch.no_grad():
        assert torch.equal(logits, model(input_ids=IDS, use_cache=False).logits)


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_with_all_tokens_each_expert_reads_every_one_and_the_output_stays(save_model: SaveModel, model_type: str) -> None:
    folder = save_model(model_type)
    expected = inputs_by_hand(folder, IDS, every=True)
    _, seen, logits = measured(folder, IDS, all_tokens=True)
    got = {key: X for tap, X in seen.items() if (key := expert_of(tap))}
    assert got.keys() == expected.keys()
    for key, X in got.items():
        assert torch.equal(X, expected[key]), key
    assert torch.equal(logits, measured(folder, IDS)[2])


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_fused_source_has_the_names_shapes_and_values_of_one_stored_one_by_one(save_model: SaveModel, model_type: str) -> None:
    with open_checkpoint(str(save_model(model_type, fused=True))) as fused, open_checkpoint(str(save_model(model_type))) as published:
        assert any(len(spec.shape) == 3 for spec in fused.specs.values())
        view = open_forward(fused).checkpoint
        assert {name: (s.dtype, s.shape, s.nbytes) for name, s in view.specs.items()} == {
            name: (s.dtype, s.shape, s.nbytes) for name, s in published.specs.items()
        }
        for name in published.specs:
            assert torch.equal(view.read(name), published.read(name)), name


@pytest.mark.parametrize("model_type", ["qwen2_moe", "deepseek_v3"])
def test_routers_and_gates_of_shared_experts_have_no_tap(save_model: SaveModel, model_type: str) -> None:
    with open_checkpoint(str(save_model(model_type))) as checkpoint:
        forward = open_forward(checkpoint)
        last = {name.split(".mlp.")[1] for name in forward.untapped}
        assert last == {"gate.weight"} | ({"shared_expert_gate.weight"} if model_type == "qwen2_moe" else set())
        assert any("shared_expert" in name for name in forward.taps)


def test_an_experts_weight_that_was_set_is_the_one_that_runs_and_what_was_got_before_stays(save_model: SaveModel) -> None:
    name = "model.layers.0.block_sparse_moe.experts.2.w3.weight"
    with open_checkpoint(str(save_model("mixtral"))) as checkpoint:
        forward = open_forward(checkpoint)
        with forward.layer(0) as layer:
            before, first = layer(HIDDEN, IDS[:1]), layer.get(name)
            original = first.clone()
            layer.set(name, torch.zeros_like(first))
            second = layer.get(name)
            assert not torch.equal(layer(HIDDEN, IDS[:1]), before)
            layer.set(name, first)
            assert torch.equal(layer(HIDDEN, IDS[:1]), before)
            assert torch.equal(first, original)
            assert not second.any()


def gptq(model_type: str = "", **calibration: Any) -> recipes.Recipe:
    """GPTQ in groups that fit the small models, whose experts see few tokens; in a format that has a place for these."""
    words = {
        "format": "compressed-tensors" if model_type == "gpt_oss" else "gptq",
        "passes": ["gptq"],
        "scheme": "int4-g32-sym",
        "calibration": {"min_tokens": 1, **calibration},
    }
    return recipes.parse(words, "small")


def quantize(folder: Path, target: Path, recipe: recipes.Recipe, stats: Path | None = None) -> dict[str, TensorReport]:
    """Each coded tensor's report."""
    events = run(folder, target, recipe, Windows(IDS) if stats is None else StatsFile(stats))
    return {report.name: report for event in events if isinstance(event, LayerDone) for report in event.tensors}


def codes(folder: Path, part: str = ".experts.") -> dict[str, dict[str, Tensor]]:
    """The parts of every quantized tensor with ``part`` in its name."""
    with open_checkpoint(str(folder)) as checkpoint:
        return {name: dict(checkpoint.quantized(name).parts) for name in checkpoint.schemes if part in name}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[part], b[part]) for part in a)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_gptq_codes_every_expert_and_the_folder_reads_back(save_model: SaveModel, tmp_path: Path, model_type: str) -> None:
    folder = save_model(model_type)
    reports = quantize(folder, tmp_path / "out", gptq(model_type))
    with open_checkpoint(str(folder)) as source, open_checkpoint(str(tmp_path / "out")) as output:
        experts = {name for name in source.specs if ".experts." in name and name.endswith(".weight")}
        assert experts <= output.schemes.keys()
        assert experts <= reports.keys()
        assert not any("gate.weight" in name for name in output.schemes)
        scores = compare(output, source, IDS)
    assert 0 < scores.kld_mean < 1


def without_source(data: bytes) -> bytes:
    """A file but for the words by which it names the model it was made from."""
    return re.sub(rb'"source(_fingerprint|)": "[^"]*"', b"", data)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_fused_and_an_unfused_source_give_the_same_bytes(save_model: SaveModel, tmp_path: Path, model_type: str) -> None:
    for name, fused in (("a", False), ("b", True)):
        quantize(save_model(model_type, fused=fused), tmp_path / name, gptq(model_type))
    files = {path.name for path in (tmp_path / "a").iterdir()}
    assert files == {path.name for path in (tmp_path / "b").iterdir()}
    assert "model.safetensors" in files
    for name in files - {"quantcli.json"}:
        a, b = (without_source((tmp_path / out / name).read_bytes()) for out in "ab")
        assert a == b, name


def test_an_expert_without_tokens_is_rounded_to_nearest_and_reported(save_model: SaveModel, tmp_path: Path) -> None:
    folder = save_model("mixtral", unreached=2, num_experts_per_tok=1)
    reports = quantize(folder, tmp_path / "gptq", gptq())
    quantize(folder, tmp_path / "rtn", recipes.parse({"format": "gptq", "passes": ["rtn"], "scheme": "int4-g32-sym"}, "rtn"))
    solved, rounded = codes(tmp_path / "gptq"), codes(tmp_path / "rtn")
    for name in solved:
        is_unreached = ".experts.2." in name
        assert any("0 calibration tokens" in note for note in reports[name].notes) == is_unreached, name
        assert same(solved[name], rounded[name]) == is_unreached, name


def test_experts_of_few_tokens_fall_back_as_the_recipe_says(save_model: SaveModel, tmp_path: Path) -> None:
    folder = save_model("mixtral", unreached=2, num_experts_per_tok=1)
    n_tokens = {key[:2]: len(X) for key, X in inputs_by_hand(folder, IDS).items()}
    limit = sorted(n_tokens.values())[-2]
    reports = quantize(folder, tmp_path / "out", gptq(min_tokens=limit, fallback="rtn"))
    for name, report in reports.items():
        if (key := expert_of(name.removesuffix(".weight"))) and key[0] == 0:  # what the second layer is given is another thing by then
            few = f"{n_tokens[key[:2]]} calibration tokens reached it, fewer than min_tokens {limit}: rtn in place of gptq"
            few += "; --moe all measures every expert on all tokens"
            assert (few in report.notes) == (n_tokens[key[:2]] < limit)


def test_all_tokens_reach_every_expert_where_the_recipe_says_so(save_model: SaveModel, tmp_path: Path) -> None:
    folder = save_model("mixtral", unreached=2, num_experts_per_tok=1)
    reports = quantize(folder, tmp_path / "out", gptq(moe="all", min_tokens=IDS.numel()))
    assert not any("tokens" in note for report in reports.values() for note in report.notes)


@pytest.mark.parametrize("by_file", [False, True])
@pytest.mark.parametrize(
    ("passes", "scheme"),
    [
        (["rtn"], "fp8-tensor+fp8-tensor"),
        (["gptq"], "nvfp4+nvfp4-g16"),
        (["gptq"], "int8-channel-sym+int8-tensor"),
        (["smoothquant", "rtn"], "int8-channel-sym+int8-tensor"),
    ],
)
def test_an_expert_without_tokens_has_the_widest_range_of_the_others(
    save_model: SaveModel, tmp_path: Path, passes: list[str], scheme: str, by_file: bool
) -> None:
    folder = save_model("qwen3_moe", unreached=2, num_experts_per_tok=1)
    words = {"format": "compressed-tensors", "passes": passes, "scheme": scheme, "calibration": {"min_tokens": 1}}
    with open_checkpoint(str(folder)) as checkpoint:
        list(calibrate.calibrate(checkpoint, IDS, tmp_path / "stats.safetensors"))
    stats = tmp_path / "stats.safetensors" if by_file else None
    reports = quantize(folder, tmp_path / "out", recipes.parse(words, "static"), stats)
    scales = {name: float(parts["input_scale"]) for name, parts in codes(tmp_path / "out").items()}
    assert all(0 < scale < float("inf") for scale in scales.values())
    widest = min if "nvfp4" in scheme else max  # whose scale divides
    for linear in ("gate_proj", "down_proj"):
        of = {e: scales[f"model.layers.0.mlp.experts.{e}.{linear}.weight"] for e in range(8)}
        assert of[2] == widest(of.values())
        assert sorted(of.values()).count(of[2]) >= 2
    assert scales["model.layers.0.mlp.experts.2.gate_proj.weight"] == scales["model.layers.0.mlp.experts.2.up_proj.weight"]
    named = reports["model.layers.0.mlp.experts.2.down_proj.weight"].notes
    assert any("no calibration token reached it: its input scale is that of model.layers.0.mlp.experts." in note for note in named)
    assert any("--moe all" in note for note in named)


def test_experts_take_turns_together_in_a_sequential_recipe(save_model: SaveModel, tmp_path: Path) -> None:
    folder = save_model("qwen3_moe")
    how = recipes.parse(gptq().to_dict() | {"true_sequential": True}, "sequential")
    reports = quantize(folder, tmp_path / "out", how)
    assert len([name for name in reports if ".experts." in name]) == 2 * 8 * 3
    taps = [f"model.layers.1.mlp.experts.{e}.{k}_proj" for k in ("gate", "down") for e in range(8)]
    assert measuring.in_turn(["model.layers.1.self_attn.q_proj", *taps]) == [["model.layers.1.self_attn.q_proj"], taps[:8], taps[8:]]


@pytest.mark.parametrize("moe", recipes.MOE)
@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_statistics_have_each_experts_tokens_and_know_which_these_were(
    save_model: SaveModel, tmp_path: Path, model_type: str, moe: str
) -> None:
    folder = save_model(model_type, unreached=2, num_experts_per_tok=1)
    expected = inputs_by_hand(folder, IDS, every=moe == "all")
    with open_checkpoint(str(folder)) as checkpoint:
        list(calibrate.calibrate(checkpoint, IDS, tmp_path / "stats.safetensors", moe=moe))
    stats = StatsFile(tmp_path / "stats.safetensors")
    measured = {key: stats[tap] for tap in stats if (key := expert_of(tap))}
    assert measured.keys() == expected.keys()
    for key, X in expected.items():
        assert measured[key].n_tokens == len(X)
        assert measured[key].H is not None
        torch.testing.assert_close(measured[key].H.double(), X.double().T @ X.double() / max(1, len(X)), rtol=1e-4, atol=1e-5)
    reports = quantize(folder, tmp_path / "out", gptq(model_type, moe=moe), tmp_path / "stats.safetensors")
    assert any("0 calibration tokens" in note for report in reports.values() for note in report.notes) == (moe == "routed")
    other = next(word for word in recipes.MOE if word != moe)
    with pytest.raises(RecipeError, match=f"moe: {moe}, the recipe says {other}"):
        quantize(folder, tmp_path / "other", gptq(model_type, moe=other), tmp_path / "stats.safetensors")


@pytest.mark.parametrize("words", [{"moe": "some"}, {"min_tokens": 0}, {"fallback": "gptq"}, {"fallback": "own-invention"}])
def test_a_recipe_that_says_something_else_of_experts_is_refused(words: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=next(iter(words))):
        gptq(**words)


def test_what_one_expert_reads_can_be_changed_and_no_other_sees_it(save_model: SaveModel) -> None:
    """Engines that round inputs are simulated so; doubling what w2 of an expert reads is doubling its weights."""
    folder, name = save_model("mixtral"), "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    with open_checkpoint(str(folder)) as checkpoint:
        changed, other = open_forward(checkpoint), open_forward(checkpoint)
        assert changed.on_read(name, lambda X: 2 * X)
        for index, is_same in ((0, True), (1, False)):
            with changed.layer(index) as a, other.layer(index) as b:
                output, plain = a(HIDDEN, IDS[:1]), b(HIDDEN, IDS[:1])
                assert torch.equal(output, plain) == is_same
                if not is_same:
                    b.set(name, 2 * b.get(name))
                    torch.testing.assert_close(output, b(HIDDEN, IDS[:1]))


def test_activations_of_experts_are_simulated(save_model: SaveModel, tmp_path: Path) -> None:
    folder = save_model("qwen3_moe")
    words = {"format": "compressed-tensors", "passes": ["rtn"], "scheme": "int8-channel-sym+int8-token"}
    with open_checkpoint(str(folder)) as source:
        list(pipeline.quantize(source, tmp_path / "out", recipes.parse(words, "w8a8")))
    with open_checkpoint(str(folder)) as source, open_checkpoint(str(tmp_path / "out")) as output:
        rounded, plain = (compare(output, source, IDS, activations=activations) for activations in (True, False))
    assert rounded.not_simulated == ()
    assert rounded.kld_mean > plain.kld_mean > 0


def test_a_run_in_bfloat16_equals_the_whole_models_and_gives_back_what_was_set(save_model: SaveModel) -> None:
    folder, name = save_model("qwen3_moe"), "model.layers.1.mlp.experts.5.down_proj.weight"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, experts_implementation="eager")
    with torch.no_grad():
        expected = model(input_ids=IDS, use_cache=False).logits
    assert torch.equal(measured(folder, IDS, dtype=torch.bfloat16)[2], expected)
    with open_checkpoint(str(folder)) as checkpoint, open_forward(checkpoint, dtype=torch.bfloat16).layer(1) as layer:
        for W in (torch.rand(64, 32).bfloat16(), torch.rand(64, 32), torch.rand(64, 32).bfloat16()):
            layer.set(name, W)
            assert torch.equal(layer.get(name), W)


def test_a_layers_experts_are_gone_when_its_context_ends(save_model: SaveModel) -> None:
    with open_checkpoint(str(save_model("mixtral"))) as checkpoint:
        forward = open_forward(checkpoint)
        with forward.layer(0) as layer:
            layer.set(name := "model.layers.0.block_sparse_moe.experts.1.w1.weight", layer.get(name))
        held = {name for name, p in forward._model.named_parameters() if p.device.type != "meta" and p.untyped_storage().nbytes() > 8}
    assert held == {"model.norm.weight"}


def test_an_expert_is_shown_no_token_twice_and_no_more_than_its_own(save_model: SaveModel) -> None:
    """So one batch of one expert is all that is held at a time, however many experts there are."""
    folder = save_model("qwen3_moe")
    with open_checkpoint(str(folder)) as checkpoint:
        forward = open_forward(checkpoint)
        n_tokens: dict[str, int] = {}
        with forward.layer(0) as layer:
            layer.observe(forward.embed(IDS), IDS, lambda tap, X: n_tokens.update({tap: n_tokens.get(tap, 0) + len(X)}))
    shown = {tap: n for tap, n in n_tokens.items() if expert_of(tap)}
    assert sum(shown.values()) == 2 * 3 * IDS.numel()  # two taps of each of the three experts of a token
    assert max(shown.values()) <= IDS.numel()


def test_the_command_line_says_once_a_layer_that_experts_saw_few_tokens(
    save_model: SaveModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_model("mixtral")
    words = [
        "quantize",
        str(folder),
        "-o",
        str(tmp_path / "out"),
        "--method",
        "gptq",
        "--group-size",
        "32",
        "--samples",
        "4",
        "--seq-len",
        "32",
    ]
    run = CliRunner().invoke(app, [*words, "--moe", "all"])
    assert run.exit_code == 0, run.output
    warnings = [line for line in run.stderr.splitlines() if "calibration tokens reached it" in line]
    assert len(warnings) == 2
    for i, line in enumerate(warnings):
        assert f"layers.{i}." in line
        assert f"128 calibration tokens reached it, fewer than min_tokens 512: rtn in place of gptq; likewise {4 * 3 - 1} more of" in line
    with pytest.raises(SystemExit) as ended:
        main([*words, "--moe", "some"])
    assert ended.value.code == 2
    assert "routed or all" in capsys.readouterr().err


def test_awq_and_gptq_after_it_code_every_expert(save_model: SaveModel, tmp_path: Path) -> None:
    folder = save_model("mixtral")
    loss = {}
    for passes in (["rtn"], ["awq"], ["awq", "gptq"]):
        how = recipes.parse(gptq().to_dict() | {"passes": passes}, "small")
        out = tmp_path / "-".join(passes)
        quantize(folder, out, how)
        with open_checkpoint(str(folder)) as source, open_checkpoint(str(out)) as output:
            assert {name for name in source.specs if ".experts." in name} <= output.schemes.keys()
            loss[out.name] = compare(output, source, IDS).kld_mean
    assert loss["awq"] < loss["rtn"]
    assert loss["awq-gptq"] < loss["rtn"]


def by_awq(*passes: str, **calibration: Any) -> recipes.Recipe:
    return recipes.parse(gptq(**calibration).to_dict() | {"passes": list(passes)}, "small")


@pytest.mark.parametrize(("model_type", "passes"), [("mixtral", ["awq"]), ("qwen2_moe", ["smoothquant", "gptq"]), ("deepseek_v3", ["awq"])])
def test_experts_share_one_scale_whether_stored_one_by_one_or_fused(
    save_model: SaveModel, tmp_path: Path, model_type: str, passes: list[str]
) -> None:
    for name, fused in (("a", False), ("b", True)):
        reports = quantize(save_model(model_type, fused=fused), tmp_path / name, by_awq(*passes))
    a, b = (without_source((tmp_path / out / "model.safetensors").read_bytes()) for out in "ab")
    assert a == b
    word = {"awq": "awq_ratio", "smoothquant": "smoothquant_alpha"}[passes[0]]
    first = {
        name: report for name, report in reports.items() if re.search(r"layers\.1\..*expert.*\.(w1|w3|gate_proj|up_proj)\.weight", name)
    }
    assert len(first) >= 8
    assert len({report.settings[word] for report in first.values()}) == 1
    assert not any("stay as they are" in note for report in first.values() for note in report.notes)
    assert all(report.settings.get("awq_loss", 0) <= 1 for report in first.values())


def test_experts_are_scaled_by_statistics_from_a_file_as_by_windows(save_model: SaveModel, tmp_path: Path) -> None:
    folder = save_model("qwen2_moe", num_hidden_layers=1, mlp_only_layers=[])
    with open_checkpoint(str(folder)) as checkpoint:
        list(calibrate.calibrate(checkpoint, IDS, tmp_path / "stats.safetensors"))
    quantize(folder, tmp_path / "windows", by_awq("awq", "gptq"))
    quantize(folder, tmp_path / "stats", by_awq("awq", "gptq"), tmp_path / "stats.safetensors")
    for name, parts in codes(tmp_path / "windows", "").items():
        assert same(parts, codes(tmp_path / "stats", name)[name]), name


def test_starved_experts_routers_and_shared_experts_are_scaled_as_their_norm_is(save_model: SaveModel, tmp_path: Path) -> None:
    folder = save_model("qwen2_moe", num_hidden_layers=1, mlp_only_layers=[])
    n_tokens = sorted(len(X) for (_, _, k), X in inputs_by_hand(folder, IDS).items() if k == "in")
    words = by_awq("awq", min_tokens=n_tokens[4]).to_dict() | {"scheme": "int8-g32-sym"}
    reports = quantize(folder, tmp_path / "out", recipes.parse(words, "eight bits"))
    few = {name for name, report in reports.items() if any("calibration tokens reached it" in note for note in report.notes)}
    assert 0 < len(few) < sum(".experts." in name for name in reports)
    mlp = "model.layers.0.mlp."
    with open_checkpoint(str(folder)) as source, open_checkpoint(str(tmp_path / "out")) as output:
        norm = "model.layers.0.post_attention_layernorm.weight"
        s = source.read(norm) / output.read(norm)
        assert s.max() / s.min() > 1.1
        for name in (f"{mlp}gate.weight", f"{mlp}shared_expert_gate.weight"):
            torch.testing.assert_close(output.read(name), source.read(name) * s, rtol=1e-5, atol=0)
        coded = [name for name in output.schemes if name.startswith(mlp) and name.endswith(("gate_proj.weight", "up_proj.weight"))]
        assert len(coded) == 2 * (8 + 1)
        for name in coded:
            rows = 1 if name.endswith("gate_proj.weight") else (output.read(name) / source.read(name) / s).median(1, keepdim=True).values
            W, scaled = source.read(name) * s * rows, output.read(name)
            assert float((scaled - W).norm() / W.norm()) < 0.03, name


GGUF = {"format": "gguf", "format_options": {"pre_tokenizer": "gpt-2"}, "calibration": {"min_tokens": 1}}


def test_gpt_oss_is_solved_onto_ggufs_types_expert_by_expert(save_model: SaveModel, tmp_path: Path) -> None:
    folder = save_model("gpt_oss", fused=True, intermediate_size=64)
    loss = {}
    for name in ("rtn", "gptq"):
        reports = quantize(folder, tmp_path / f"{name}.gguf", recipes.parse({**GGUF, "passes": [name], "mix": "Q4_0"}, name))
        assert sum(".experts." in name for name in reports) == 2 * 4 * 3
        with open_checkpoint(str(folder)) as source, open_checkpoint(str(tmp_path / f"{name}.gguf")) as output:
            loss[name] = compare(output, source, IDS).kld_mean
    assert loss["gptq"] < loss["rtn"]


@pytest.mark.parametrize("format_", ["gptq", "awq", "fp8"])
def test_gpt_osss_experts_go_to_no_format_whose_engines_do_not_know_them_one_by_one(
    save_model: SaveModel, tmp_path: Path, format_: str
) -> None:
    scheme = {"gptq": "int4-g32-sym", "awq": "int4-g32-asym", "fp8": "fp8-block"}[format_]
    words = {"format": format_, "passes": ["rtn"], "scheme": scheme}
    for fused in (False, True):
        folder = save_model("gpt_oss", fused=fused)
        with pytest.raises(UnsupportedError, match=r"experts of gpt_oss in one tensor.*--skip '\\.experts\\.', or choose --format gguf"):
            quantize(folder, tmp_path / "out", recipes.parse(words, "refused"))


@pytest.mark.parametrize("fused", [False, True], ids=["one-by-one", "fused"])
def test_experts_that_stay_dense_stay_in_the_one_tensor_that_transformers_knows(save_model: SaveModel, tmp_path: Path, fused: bool) -> None:
    folder = save_model("gpt_oss", fused=fused)
    words = {
        "format": "compressed-tensors",
        "passes": ["rtn"],
        "scheme": "int4-g32-sym",
        "rules": [{"match": r"\.experts\.", "scheme": "keep"}],
    }
    quantize(folder, tmp_path / "out", recipes.parse(words, "attention"))
    stacks = load_file(as_transformers_has_it(folder) / "model.safetensors")
    with open_checkpoint(str(tmp_path / "out")) as output:
        kept = {name for name in output.specs if ".experts." in name}
        assert kept == {name for name in stacks if ".experts." in name}
        for name in kept:
            assert torch.equal(output.read(name), stacks[name]), name
        assert len(output.schemes) == 2 * 4


def test_a_gptq_folder_of_gpt_oss_whose_gate_and_up_are_other_rows_is_not_misread(save_model: SaveModel, tmp_path: Path) -> None:
    folder = save_model("gpt_oss")
    quantize(folder, tmp_path / "out", gptq("gpt_oss"))
    with open_checkpoint(str(tmp_path / "out")) as output:
        output.kind = "gptq"
        with pytest.raises(UnsupportedError, match="other rows than those of gate and up"):
            open_forward(output)
        with pytest.raises(UnsupportedError, match="other rows than those of gate and up"):
            cut_for(output, gguf.FORMAT)


needs_peer = pytest.mark.skipif(
    gptq_peer.PYTHON is None, reason="QUANTCLI_GPTQMODEL_PYTHON names no Python with transformers and gptqmodel"
)


@pytest.mark.peer
@needs_peer
def test_gptqmodel_runs_every_expert_that_was_coded(save_model: SaveModel, tmp_path: Path) -> None:
    folder = save_model("qwen3_moe", moe_intermediate_size=64)
    quantize(folder, tmp_path / "out", gptq())
    answer = gptq_peer.ask(tmp_path, IDS, "gptqmodel", tmp_path / "out")
    assert "error" not in answer, answer["error"]
    with open_checkpoint(str(tmp_path / "out")) as output:
        assert sum(answer["kernels"].values()) == len(output.schemes) == 2 * (4 + 8 * 3)
        assert answer["perplexity"] == pytest.approx(perplexity(output, IDS).perplexity, rel=0.01)  # theirs in 16 bits: routers flip


@pytest.mark.peer
@needs_peer
def test_transformers_by_itself_has_no_place_for_gptqs_experts_as_the_readme_says(save_model: SaveModel, tmp_path: Path) -> None:
    folder = save_model("qwen3_moe", moe_intermediate_size=64)
    quantize(folder, tmp_path / "out", gptq())
    answer = gptq_peer.ask(tmp_path, IDS, "transformers", tmp_path / "out")
    assert "error" in answer or sum(answer["kernels"].values()) == 2 * 4


@pytest.mark.parametrize("true_sequential", [False, True])
def test_a_layer_of_many_experts_is_measured_in_shares_with_the_same_result(
    save_model: SaveModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, true_sequential: bool
) -> None:
    folder = save_model("qwen3_moe", unreached=2, num_experts_per_tok=1)
    how = recipes.parse(gptq().to_dict() | {"true_sequential": true_sequential}, "small")
    for name, n_bytes in (("whole", 1 << 30), ("shared", 3 * 4 * (64**2 + 32**2))):
        monkeypatch.setattr(measuring, "MAX_HESSIAN_BYTES", n_bytes)
        quantize(folder, tmp_path / name, how)
        with open_checkpoint(str(folder)) as checkpoint:
            list(calibrate.calibrate(checkpoint, IDS, tmp_path / f"{name}.safetensors"))
    assert (tmp_path / "whole/model.safetensors").read_bytes() == (tmp_path / "shared/model.safetensors").read_bytes()
    assert (tmp_path / "whole.safetensors").read_bytes() == (tmp_path / "shared.safetensors").read_bytes()


@pytest.mark.parametrize("stack", ["model.layers.3.block_sparse_moe.experts", "blocks.11.ffn.experts", "model.layers.0.mlp.experts"])
@pytest.mark.parametrize("linear", ["w1", "w1.weight", "down_proj.bias"])
def test_an_expert_is_told_by_the_names_of_its_tensors(stack: str, linear: str) -> None:
    at = experts.expert_of(f"{stack}.12.{linear}")
    assert at == experts.ExpertName(stack, 12, linear)
    assert at.expert == f"{stack}.12"
    for other in (f"{stack}.{linear}", f"{stack}.12", f"model.layers.3.mlp.shared_experts.{linear}", f"model.layers.3.mlp.{linear}"):
        assert experts.expert_of(other) is None


def test_shares_keep_an_experts_taps_together_and_others_for_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "MAX_HESSIAN_BYTES", 4 * 2 * (8**2 + 4**2))
    experts = {f"layers.0.mlp.experts.{e}.{k}_proj": width for e in range(5) for k, width in (("down", 4), ("gate", 8))}
    widths = {"layers.0.self_attn.q_proj": 8} | experts
    names = list(experts)
    needs = frozenset({"H"})
    assert measuring.shares(widths, widths, needs) == [names[:4], names[4:8], [*names[8:], "layers.0.self_attn.q_proj"]]
    assert measuring.shares(widths, widths, frozenset({"importance"})) == [[*names, "layers.0.self_attn.q_proj"]]


@pytest.mark.parametrize(
    "name", ["m.mlp.gate.weight", "m.feed_forward.router.weight", "m.router.proj.weight", "m.mlp.shared_expert_gate.weight"]
)
def test_a_router_is_told_by_the_experts_beside_it(name: str) -> None:
    stack = f"{name.partition('.gate')[0].partition('.router')[0].partition('.shared')[0]}.experts"
    stacks = experts.stacks_of([f"{stack}.0.gate_proj.weight", f"{stack}.gate_up_proj", name])
    assert stacks == {stack}
    assert experts.is_router(name, stacks)
    assert not experts.is_router(name, {"other.experts"})


@pytest.mark.parametrize("name", ["m.mlp.gate_proj.weight", "m.mlp.experts.0.gate.weight", "m.mlp.shared_expert.gate_proj.weight"])
def test_what_is_called_like_a_router_and_has_no_experts_beside_it_is_none(name: str) -> None:
    assert not experts.is_router(name, {"m.mlp.experts"})
