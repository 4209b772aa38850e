"""The command line as scripts and people meet it: exit codes, what goes to stdout and to stderr, and that nothing is left or lost."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantcli import __version__
from quantcli.cli import main
from quantcli.cli.console import Console, Steps, count, size
from quantcli.formats.gguf.file.headers import read_header
from quantcli.planning.memory import kv_cache_bytes

TinyLlama = Callable[..., Path]
SHORT = ["--samples", "2", "--seq-len", "16"]

INSPECT_KEYS = {"source", "kind", "architecture", "n_params", "n_bytes", "bpw", "quantization"}
CALIBRATE_KEYS = {"stats", "imatrix", "n_samples", "n_tokens", "taps", "dataset_sha256", "calibration_perplexity", "seconds"}
CALIBRATE_KEYS |= {"tokens_per_input", "warnings", "rows"}
WRITER_KEYS = {"output", "format", "recipe", "n_bytes", "bpw", "seconds", "peak_ram_bytes", "tensors", "lossless", "layers"}
EVAL_KEYS = {"perplexity", "perplexity_stderr", "n_tokens", "seq_len", "activations", "bpw", "n_bytes"}
BASELINE_KEYS = {"baseline_perplexity", "kld_mean", "kld_p99", "kld_max", "top1_agreement"}


@dataclass(frozen=True)
class Run:
    """How one call of the command line ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """Stdout as the one JSON object that it must be."""
        return json.loads(self.out, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Run]:
    """Runs ``quantcli ARGS`` in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*args: object) -> Run:
        with pytest.raises(SystemExit) as ended:
            main([str(arg) for arg in args])
        return Run(ended.value.code, *capfd.readouterr())  # type: ignore[arg-type]

    return run


@pytest.fixture(scope="module")
def model(tiny_llama: TinyLlama, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that no test changes, in a folder named pico."""
    return tiny_llama(layers=1).rename(tmp_path_factory.mktemp("models") / "pico")


@pytest.fixture(scope="module")
def wrecks(tiny_llama: TinyLlama, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of folders that are no good: empty, pickled, cut (a truncated shard), other (an unknown dialect), broken (a NaN)."""
    root = tmp_path_factory.mktemp("wrecks")
    (root / "empty").mkdir()
    (root / "pickled").mkdir()
    (root / "pickled" / "pytorch_model.bin").write_bytes(b"x")
    cut = tiny_llama(layers=1, shards=3).rename(root / "cut")
    os.truncate(cut / "model-00002-of-00003.safetensors", 1000)
    config = tiny_llama(layers=1).rename(root / "other") / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "quantization_config": {"quant_method": "eetq"}}))
    weights = tiny_llama(layers=1).rename(root / "broken") / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(tensors, weights, metadata={"format": "pt"})
    return root


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog, and the dog does not mind at all. " * 40)
    return path


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_version_and_help(cli: Callable[..., Run]) -> None:
    assert cli("--version") == Run(0, f"quantcli {__version__}\n", "")
    for verb in ([], ["inspect"], ["calibrate"], ["quantize"], ["export"], ["eval"]):
        run = cli(*verb, "--help")
        assert (run.code, run.err) == (0, "")
        assert "Usage: quantcli" in run.out
    bare = cli()
    assert (bare.code, bare.out) == (2, "")
    assert "Usage: quantcli" in bare.err


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["frobnicate"], "No such command 'frobnicate'"),
        (["inspect", "--frobnicate"], "No such option"),
        (["quantize"], "Missing argument"),
        (["calibrate", "MODEL"], "'--output'"),
        (["quantize", "MODEL", "--bits", "x"], "--bits"),
        (["quantize", "MODEL", "--threads", "0"], "--threads"),
        (["quantize", "MODEL", "--method", "magic"], "no method 'magic'; there are: "),
        (["quantize", "MODEL", "--format", "hf"], "hf holds no quantized tensors"),
        (["quantize", "MODEL", "--type", "Q4_K_X"], "'Q4_K_X' is no GGUF file type; there are: BF16"),
        (["quantize", "MODEL", "--format", "zip"], "no format 'zip' to write; there are: "),
        (["quantize", "MODEL", "--format", "gguf"], "give --type"),
        (["quantize", "MODEL", "--recipe", "gptq-int4", "--method", "rtn"], "either --recipe or --method"),
        (["quantize", "MODEL", "--rule", "q_proj"], "expected REGEX=VALUE, not 'q_proj'"),
        (["quantize", "MODEL", "--stats", "s.safetensors", "--samples", "4"], "--samples has no meaning beside it"),
        (["export", "Q4_K_X"], "'Q4_K_X' is no GGUF file type"),
        (["export", "MODEL", "Q4_K_M", "--format", "zip"], "no format 'zip' to write; there are: "),
        (["export", "MODEL", "Q4_K_M", "--tensor-type", "ffn"], "expected REGEX=VALUE, not 'ffn'"),
        (["export", "MODEL", "Q4_K_M", "--device", "tpu"], "expected auto, cpu, cuda or cuda:N"),
        (["eval", "MODEL", "--max-kld", "1"], "it needs --baseline"),
    ],
)
def test_wrong_usage_ends_with_2_and_says_where_help_is(cli: Callable[..., Run], model: Path, args: list[str], told: str) -> None:
    run = cli(*(str(model) if arg == "MODEL" else arg for arg in args))
    assert (run.code, run.out) == (2, "")
    assert told in run.err
    assert run.err.startswith("error: ")
    assert run.err.rstrip().endswith("--help")
    assert "Traceback" not in run.err


@pytest.mark.parametrize(
    ("code", "args", "told"),
    [
        (3, ["inspect", "nowhere"], "nowhere: no such file or folder"),
        (3, ["eval", "empty"], "config.json: missing"),
        (3, ["export", "pickled", "Q4_K_M"], "is a pickle file"),
        (3, ["quantize", "cut", "--method", "rtn"], "model-00002-of-00003.safetensors"),
        (3, ["quantize", "MODEL", "--dataset", "nowhere.txt"], "nowhere.txt: no such file"),
        (3, ["quantize", "MODEL", "--stats", "nowhere.safetensors"], "nowhere.safetensors: cannot be read"),
        (4, ["quantize", "MODEL", "--method", "rtn", "--group-size", "100"], "is not a multiple of the int4-g100-sym block 100"),
        (4, ["quantize", "MODEL", "--damp-percent", "-1"], "in (0, 1]"),
        (4, ["quantize", "MODEL", "--method", "rtn", "--damp-percent", "0.1"], "has no gptq pass"),
        (4, ["quantize", "MODEL", "--type", "Q4_K_M", "--bits", "3"], "no bits to set"),
        (4, ["quantize", "MODEL", "--method", "rtn", "--pre-tokenizer", "gpt-2"], "the gptq format has no option 'pre_tokenizer'"),
        (4, ["quantize", "MODEL", "--recipe", "nowhere"], "no recipe 'nowhere'"),
        (4, ["quantize", "MODEL", "--method", "rtn", "--skip", "zebra"], "rule 'zebra' matches no"),
        (4, ["quantize", "MODEL", "--method", "rtn", "-o", "cut/config.json/x"], "is no folder; choose another -o"),
        (4, ["export", "MODEL", "Q4_K_M", "-o", "empty"], "is a folder and the output a file"),
        (5, ["quantize", "MODEL", "--method", "rtn", "--format", "hf"], "the hf format cannot hold int4-g128-sym"),
        (5, ["inspect", "other"], "is quantized by"),
        (6, ["quantize", "broken", "--method", "rtn"], "model.layers.0.mlp.up_proj.weight: the source has NaN or Inf"),
        (7, ["quantize", "MODEL", "--device", "cuda:99"], "use --device cpu"),
    ],
)
def test_a_failure_is_a_sentence_with_its_exit_code_and_leaves_nothing(
    cli: Callable[..., Run], model: Path, wrecks: Path, monkeypatch: pytest.MonkeyPatch, code: int, args: list[str], told: str
) -> None:
    monkeypatch.chdir(wrecks)
    before = snapshot(wrecks)
    run = cli(*(str(model) if arg == "MODEL" else arg for arg in args), *(["-q"] if args[0] != "inspect" else []))
    assert (run.code, run.out) == (code, "")
    assert told in run.err
    assert run.err.startswith("error: ")
    assert run.err.count("\n") == 1
    assert snapshot(wrecks) == before


def test_a_folder_without_permission_is_told_before_the_work(cli: Callable[..., Run], model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root, who may run the tests, may write anywhere
    run = cli("quantize", model, "--method", "rtn", "-q")
    assert run.code == 4
    assert "no permission to write in" in run.err


def test_a_hub_id_that_cannot_be_reached_says_what_was_tried(
    cli: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    run = cli("inspect", "nobody-at-all/no-such-model")
    assert run.code == 3
    assert "no such local folder, not in the local cache" in run.err


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "somewhere"), 8, "somewhere: No space left"),
        (MemoryError(), 8, "not enough memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), 8, "not enough memory"),
        (PermissionError(errno.EACCES, "Permission denied", "config.json"), 3, "config.json: Permission denied"),
        (RuntimeError("CUDA error: an illegal instruction was encountered\nmore"), 7, "illegal instruction was encountered; try"),
        (ZeroDivisionError("this one is ours"), 1, "this is a bug in quantcli; please report it"),
    ],
)
def test_what_the_system_refuses_is_told_apart_from_a_bug(
    cli: Callable[..., Run], model: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, code: int, told: str
) -> None:
    def fail(source: str) -> None:
        raise error

    monkeypatch.setattr("quantcli.walk.inputs.open_checkpoint", fail)
    run = cli("inspect", model)
    assert (run.code, run.out) == (code, "")
    assert told in run.err
    assert ("Traceback" in run.err) == (code == 1)
    assert "Traceback" in cli("inspect", model, "-v").err


def test_inspect_lists_what_scripts_rely_on(cli: Callable[..., Run], model: Path) -> None:
    run = cli("inspect", model, "--json", "--tensors", "--memory", "--context", "1000")
    data = run.json
    assert run.code == 0
    assert run.err == ""
    assert data.keys() >= INSPECT_KEYS
    assert list(data) == sorted(data)
    assert (data["architecture"], data["kind"], data["bpw"], data["quantization"]) == ("LlamaForCausalLM", "hf", 16, None)
    assert data["n_bytes"] == sum(t["n_bytes"] for t in data["tensors"]) == 2 * data["n_params"]
    assert all(t.keys() == {"name", "dtype", "shape", "n_bytes", "scheme"} for t in data["tensors"])
    assert data["memory"]["kv_cache_bytes"] == 2 * 1 * 2 * 64 * 1000 * 2  # K and V, layer, KV heads, head_dim, tokens, bytes
    assert "KV cache of 4096 tokens" in cli("inspect", model, "--memory").out


def test_inspect_memory_is_the_size_that_is_then_written(cli: Callable[..., Run], model: Path) -> None:
    planned = {row["recipe"]: row["n_bytes"] for row in cli("inspect", model, "--memory", "--json").json["memory"]["recipes"]}
    for recipe in ("q4_k_m", "rtn-int4"):
        assert cli("quantize", model, "--recipe", recipe, "--json", "-q").json["n_bytes"] == planned[recipe]


def test_a_kv_cache_of_unknown_shape_has_no_size() -> None:
    assert kv_cache_bytes({"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64}, 10) == 2 * 2 * 4 * 16 * 10 * 2
    assert kv_cache_bytes({"num_hidden_layers": 2}, 10) is None


def test_calibrate_then_quantize_from_its_statistics(cli: Callable[..., Run], model: Path, text: Path) -> None:
    run = cli("calibrate", model, "-o", "s.safetensors", "--dataset", text, *SHORT, "--json")
    assert run.code == 0
    assert run.json.keys() == CALIBRATE_KEYS
    assert (run.json["n_samples"], run.json["n_tokens"], run.json["taps"]) == (2, 32, 5)
    done = cli("quantize", model, "--stats", "s.safetensors", "--json", "-q", "-o", "out")
    assert done.code == 0
    (warning,) = done.json["warnings"]
    assert done.err == f"warning: {warning}\n"  # which -q does not silence
    assert warning.startswith("32 calibration tokens are fewer than the 512 inputs of model.layers.0.mlp.down_proj")
    assert json.loads(Path("out/quantcli.json").read_text())["dataset_sha256"] == run.json["dataset_sha256"] == done.json["dataset_sha256"]
    assert run.json["calibration_perplexity"] > 1
    assert done.json["calibration_perplexity"] is None  # no window was run
    assert done.json["calibrated_by"] == "statistics"


@pytest.mark.parametrize("type_", [[], ["--type", "Q4_K_M"]])
def test_every_output_tells_its_calibration_text_and_eval_warns_of_it(
    cli: Callable[..., Run], model: Path, text: Path, type_: list[str]
) -> None:
    sizes = ["--samples", "4", "--seq-len", "64"]
    target = "out.gguf" if type_ else "out"
    run = cli("quantize", model, "--method", "gptq", *type_, "--dataset", text, *sizes, "--json", "-q", "-o", target)
    assert run.json["calibration_perplexity"] > 1
    if type_:
        told = read_header(Path(target)).fields["quantcli.dataset_sha256"].value
    else:
        told = json.loads(Path("out/quantcli.json").read_text())["dataset_sha256"]
    assert told == run.json["dataset_sha256"]
    warning = "of this text was calibrated on"
    assert warning in cli("eval", run.json["output"], "--dataset", text, *sizes, "-q").err
    assert warning not in cli("eval", run.json["output"], *sizes, "-q").err
    assert warning not in cli("eval", model, "--dataset", text, *sizes, "-q").err


def test_a_text_that_the_model_does_not_know_is_warned_about(cli: Callable[..., Run], model: Path, text: Path) -> None:
    """A random model knows none."""
    sizes = ["--samples", "8", "--seq-len", "64"]
    for args in (["calibrate", model, "-o", "s"], ["quantize", model, "-o", "q"]):
        run = cli(*args, "--dataset", text, *sizes, "-q")
        assert run.code == 0
        assert "it is no text that the model has learned; check --dataset" in run.err
        assert "perplexity of the" in run.out


def test_calibrate_replaces_statistics_but_no_other_file(cli: Callable[..., Run], tiny_llama: TinyLlama, text: Path) -> None:
    folder = tiny_llama(layers=1)
    shard, before = folder / "model.safetensors", snapshot(folder)
    args = ["--dataset", text, *SHORT, "-q"]
    assert cli("calibrate", folder, "-o", "s", *args).code == 0
    assert cli("calibrate", folder, "-o", "s", *args).code == 4
    assert cli("calibrate", folder, "-o", "s", *args, "--overwrite").code == 0
    run = cli("calibrate", folder, "-o", shard, *args, "--overwrite")
    assert run.code == 3
    assert "not one that `quantcli calibrate` wrote" in run.err
    assert snapshot(folder) == before


@pytest.mark.parametrize(
    ("args", "name", "format_"),
    [
        (["quantize", "MODEL", "--method", "rtn"], "pico-rtn-int4", "gptq"),
        (["quantize", "MODEL", "--method", "rtn", "--bits", "8"], "pico-rtn-int8-g128-sym", "gptq"),
        (["quantize", "MODEL", "--type", "q4_k_m"], "pico-Q4_K_M.gguf", "gguf"),
        (["quantize", "MODEL", "--method", "gptq", "--type", "Q4_K_M", "--dataset", "TEXT", *SHORT], "pico-Q4_K_M.gguf", "gguf"),
        (["quantize", "MODEL", "--method", "gptq", "--group-size", "128", "--dataset", "TEXT", *SHORT], "pico-gptq-int4", "gptq"),
        (["export", "MODEL", "Q4_K"], "pico-Q4_K_M.gguf", "gguf"),
        (["export", "MODEL", "bf16", "--format", "gguf"], "pico-BF16.gguf", "gguf"),
    ],
)
def test_json_and_default_name_of_what_was_written(
    cli: Callable[..., Run], model: Path, text: Path, args: list[str], name: str, format_: str
) -> None:
    words = {"MODEL": str(model), "TEXT": str(text)}
    run = cli(*(words.get(arg, arg) for arg in args), "--json")
    data = run.json
    assert run.code == 0
    assert data.keys() >= WRITER_KEYS
    assert list(data) == sorted(data)
    assert (data["output"], data["format"], data["dry_run"]) == (name, format_, False)
    assert sum(data["tensors"].values()) == 12
    assert data["tensors"].keys() == {"quantized", "copied", "dropped"}
    assert all(layer.keys() == {"name", "relative_error", "held_out_error", "bpw", "seconds"} for layer in data["layers"])
    assert data["lossless"] == ("bf16" in args)
    assert Path(name).exists()


@pytest.mark.parametrize(
    "args",
    [
        ["quantize", "MODEL", "--method", "rtn"],
        ["quantize", "MODEL", "--method", "gptq"],
        ["quantize", "MODEL", "--type", "Q4_K_M", "--method", "gptq"],
        ["export", "MODEL", "Q4_K_M"],
    ],
)
def test_a_dry_run_touches_nothing_and_knows_the_size(cli: Callable[..., Run], model: Path, tmp_path: Path, args: list[str]) -> None:
    before = snapshot(model)
    args = [str(model) if arg == "MODEL" else arg for arg in args]
    run = cli(*args, "--dry-run", "--json", "-q")
    assert (run.code, run.err) == (0, "")
    assert run.json.keys() >= WRITER_KEYS
    assert run.json["dry_run"]
    table = cli(*args, "--dry-run").out
    assert "model.layers.0.mlp.up_proj.weight" in table
    assert "nothing was written" in table
    assert os.listdir(tmp_path) == []
    assert snapshot(model) == before
    written = cli(*args, "--json", "-q", *([*SHORT] if "gptq" in args else [])).json
    assert [(layer["name"], layer["bpw"]) for layer in written["layers"]] == [(layer["name"], layer["bpw"]) for layer in run.json["layers"]]
    assert written["n_bytes"] == run.json["n_bytes"]


def test_the_line_of_the_model_card(cli: Callable[..., Run], tiny_llama: TinyLlama, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_llama(layers=1)
    before = snapshot(folder)
    monkeypatch.chdir(folder)
    line = ["export", "--format", "gguf", "Q4_K_M"]
    run = cli(*line)
    name = f"{folder.name}-Q4_K_M.gguf"
    assert run.code == 0
    assert run.out.startswith(name)
    assert "lossless" not in run.out
    again = cli(*line)
    assert again.code == 4
    assert "give --overwrite" in again.err
    assert cli(*line, "--overwrite").code == 0
    after = snapshot(folder)
    assert after.pop(name)
    assert after == before


def test_a_folder_named_like_a_type_is_a_source(cli: Callable[..., Run], tiny_llama: TinyLlama, tmp_path: Path) -> None:
    tiny_llama(layers=1).rename(tmp_path / "Q8_0")
    assert "a GGUF file type is missing" in cli("export", "Q8_0").err
    assert cli("export", "Q8_0", "Q4_0", "--json").json["output"] == "Q8_0-Q4_0.gguf"


def test_the_source_is_never_the_output(cli: Callable[..., Run], tiny_llama: TinyLlama, tmp_path: Path) -> None:
    folder = tiny_llama(layers=1).rename(tmp_path / "src")
    assert cli("export", "src", "Q8_0", "-o", "src.gguf", "-q").code == 0
    before = snapshot(tmp_path)
    for args in (["quantize", "src", "--method", "rtn", "-o", "src"], ["quantize", folder, "--method", "rtn", "-o", "."]):
        assert cli(*args, "--overwrite").code == 4
    assert cli("export", "src.gguf", "Q4_0", "-o", "src.gguf", "--overwrite").code == 4
    assert snapshot(tmp_path) == before


def test_overwrite_replaces_models_and_nothing_else(cli: Callable[..., Run], model: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "child.jpg").write_bytes(b"irreplaceable")
    for args, told in [
        (["export", model, "Q4_0", "-o", "thesis.txt"], "is no GGUF file"),
        (["export", model, "Q4_0", "-o", "pipe"], "is a device or a pipe"),
        (["quantize", model, "--method", "rtn", "-o", "photos"], "holds no model"),
    ]:
        run = cli(*args, "--overwrite", "-q")
        assert run.code == 4
        assert told in run.err
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
    assert (tmp_path / "photos" / "child.jpg").exists()
    assert (tmp_path / "pipe").is_fifo()


def test_an_interrupted_run_leaves_no_output_and_says_how_to_go_on(
    cli: Callable[..., Run], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Steps, "step", lambda *args: signal.raise_signal(signal.SIGINT))
    for args in (["quantize", model, "--method", "rtn"], ["export", model, "Q4_K_M"], ["calibrate", model, "-o", "s", *SHORT]):
        run = cli(*args)
        assert (run.code, run.out) == (130, "")
        assert run.err.endswith("run the same command again to go on behind the last finished layer\n")
        assert "Traceback" not in run.err
        (work,) = tmp_path.iterdir()
        assert work.suffix == ".part"
        shutil.rmtree(work)


def test_progress_is_a_line_for_each_layer_unless_quiet(cli: Callable[..., Run], model: Path) -> None:
    run = cli("quantize", model, "--method", "rtn", "--json")
    assert [line.split()[:2] for line in run.err.splitlines()] == [
        ["[1/4]", "model.embed_tokens.weight"],
        ["[2/4]", "model.layers.0"],
        ["[3/4]", "lm_head.weight"],
        ["[4/4]", "model.norm.weight"],
    ]
    assert run.json
    assert cli("quantize", model, "--method", "rtn", "--overwrite", "-q").err == ""
    loud = cli("quantize", model, "--method", "rtn", "--overwrite", "-v").err
    assert "kernels for" in loud
    assert "model.layers.0.mlp.up_proj.weight  error" in loud


def read_all(leader: int) -> str:
    """What was written to a pseudo-terminal whose other end is closed: the kernel says EIO at the end."""
    data = b""
    while True:
        try:
            data += os.read(leader, 1 << 16)
        except OSError:
            os.close(leader)
            return data.decode()


@pytest.mark.parametrize("colour", [True, False])
def test_a_terminal_gets_a_bar_in_colour_unless_no_color(monkeypatch: pytest.MonkeyPatch, colour: bool) -> None:
    leader, follower = os.openpty()
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    if not colour:
        monkeypatch.setenv("NO_COLOR", "1")
    with os.fdopen(follower, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        with Console().progress("starting") as progress:
            progress.step(0, 2, "model.layers.0")
    shown = read_all(leader)
    assert "model.layers.0" in shown
    assert "1/2" in shown
    assert ("\x1b[3" in shown) == colour


def test_what_is_quantized_already_is_told_of(cli: Callable[..., Run], model: Path) -> None:
    assert cli("quantize", model, "--method", "rtn", "-o", "once", "-q").code == 0
    run = cli("export", "once", "Q4_K_M", "-q")
    assert run.code == 0
    assert run.err == "warning: once is quantized already, and its error stays; better start from the original weights\n"
    assert cli("export", "once", "F32", "-q").err == ""
    assert "int4-g128-sym" in cli("inspect", "once").out


def test_calibration_that_nothing_reads_is_told_of(cli: Callable[..., Run], model: Path) -> None:
    run = cli("quantize", model, "--method", "rtn", "--samples", "4", "-q")
    assert run.code == 0
    assert "recipe 'rtn-int4' uses no calibration: --samples ignored" in run.err


def test_the_default_text_is_told_of(cli: Callable[..., Run], model: Path, text: Path) -> None:
    assert "give --dataset with text of your own domain" in cli("calibrate", model, "-o", "a", *SHORT).err
    assert "note:" not in cli("calibrate", model, "-o", "b", *SHORT, "--dataset", text).err
    long = cli("calibrate", model, "-o", "c", "--samples", "1", "--seq-len", "2049", "--dataset", text).err
    assert "longer than the 2048 this model was made for" in long


def test_eval_and_its_gates(cli: Callable[..., Run], model: Path, text: Path) -> None:
    assert cli("export", model, "Q4_0", "-o", "q.gguf", "-q").code == 0
    assert cli("quantize", model, "--method", "rtn", "-o", "q", "-q").code == 0
    common = ["--dataset", text, *SHORT, "--json", "-q"]
    alone = cli("eval", model, *common)
    assert (alone.code, alone.err) == (0, "")
    assert alone.json.keys() == EVAL_KEYS
    assert alone.json["n_tokens"] == 30
    for source in ("q.gguf", "q"):
        run = cli("eval", source, "--baseline", model, *common)
        assert run.json.keys() >= EVAL_KEYS | BASELINE_KEYS
        assert run.json["baseline_perplexity"] == alone.json["perplexity"]
        assert run.json["kld_mean"] > 0
    missed = cli("eval", "q", "--baseline", model, "--max-kld", "1e-9", *common)
    assert missed.code == 9
    assert missed.json["kld_mean"] > 1e-9
    assert "is above --max-kld 1e-09" in missed.err
    assert cli("eval", "q", "--max-perplexity", "1", *common).code == 9
    assert cli("eval", "q", "--baseline", model, "--max-kld", "99", "--max-perplexity", "1e9", *common).code == 0


def test_eval_rounds_inputs_as_the_engine_does_and_says_so(cli: Callable[..., Run], model: Path, text: Path) -> None:
    assert cli("quantize", model, "--recipe", "fp8-dynamic", "-o", "q", "-q").code == 0
    common = ["--dataset", text, *SHORT, "--json"]
    found = cli("eval", "q", *common)
    assert "note: inputs are rounded as the engine does: fp8-token of 7 linears; --no-activations measures the weights alone" in found.err
    weights_alone = cli("eval", "q", "--no-activations", *common)
    assert "note: inputs are taken as they are, where the engine rounds them: fp8-token of 7 linears" in weights_alone.err
    assert (found.json["activations"], weights_alone.json["activations"]) == ("simulated", "none")
    assert found.json["perplexity"] != weights_alone.json["perplexity"]
    assert "activations     simulated" in cli("eval", "q", *common[:-1]).out
    assert "inputs" not in cli("eval", model, *common).err


def test_json_has_null_where_a_number_does_not_exist(cli: Callable[..., Run], model: Path, text: Path) -> None:
    run = cli("eval", model, "--dataset", text, "--samples", "1", "--seq-len", "2", "--json", "-q")
    assert run.json["perplexity_stderr"] is None  # of one token


def test_the_same_seed_gives_the_same_bytes_whatever_the_threads(cli: Callable[..., Run], model: Path, text: Path) -> None:
    threads = torch.get_num_threads()
    args = ["quantize", model, "--method", "gptq", "--dataset", text, *SHORT, "-q", "--seed", "7"]
    try:
        for n in (1, 2):
            assert cli(*args, "-o", f"out{n}", "--threads", n).code == 0
    finally:
        torch.set_num_threads(threads)
    assert Path("out1/model.safetensors").read_bytes() == Path("out2/model.safetensors").read_bytes()


def test_a_reader_that_leaves_early_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        Console().out("much more than was wanted")
        assert sys.stdout is not stream
        with pytest.raises(BrokenPipeError):
            stream.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def test_sizes_and_counts_for_people() -> None:
    assert [size(n) for n in (0, 1023, 1536, 5 << 30)] == ["0B", "1023B", "1.5KiB", "5.0GiB"]
    assert [count(n) for n in (999, 1500, 7.24e9)] == ["999", "1.5 K", "7.2 B"]
