"""Importance matrices: llama-imatrix's and ours agree, both file formats are read, and files made with one have llama-quantize's bytes."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader

from data.make_imatrix import FILE_TYPES, TEXT
from data.make_manifest import manifest
from quantcli import ops
from quantcli import recipe as recipes
from quantcli.cli import main
from quantcli.errors import CheckpointError, NumericsError, RecipeError
from quantcli.formats import open_checkpoint
from quantcli.formats.gguf.file.headers import read_header
from quantcli.formats.gguf.imatrix import imatrix, importance
from quantcli.formats.gguf.imatrix.imatrix import Measured
from quantcli.qtypes.q4_k import QTYPE as q4_k
from quantcli.tensors import Scheme, TensorSpec
from quantcli.walk import pipeline
from support.importance_files import GOLDEN, PICO, chunks, everything, measure, quantize, save, written
from support.places import DATA
from support.tiny_models import TinyLlama


def legacy(entries: Mapping[str, tuple[int, Sequence[float]]], tail: bytes = b"") -> bytes:
    """A .dat file: name → (number of calls, values)."""
    data = struct.pack("<i", len(entries))
    for name, (n_calls, values) in entries.items():
        data += struct.pack("<i", len(name)) + name.encode() + struct.pack(f"<ii{len(values)}f", n_calls, len(values), *values)
    return data + tail


@pytest.mark.parametrize("hessian", [False, True])
def test_ours_is_llama_imatrixs_within_float_noise(hessian: bool, tmp_path: Path) -> None:
    """The golden is llama-imatrix's own, on the same text and window."""
    ours = written(measure(tmp_path / "stats.safetensors", chunks(), hessian=hessian), tmp_path / "ours.gguf")
    theirs = imatrix.read(GOLDEN)
    assert read_header(ours.path).specs == read_header(GOLDEN).specs
    assert [(e.counts, ours.n_values(name)) for name, e in ours.entries.items()] == [
        (theirs.entries[name].counts, theirs.n_values(name)) for name in ours
    ]
    assert ours.n_chunks == theirs.n_chunks
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=0)


def test_our_file_is_read_by_the_gguf_package(tmp_path: Path) -> None:
    squares = torch.tensor([[1.0, 2.0], [3.0, 4.0], [0.0, 0.0]])
    measured = {"blk.0.ffn_down_exps.weight": Measured([2, 3, 0], 2, lambda: squares), "a": Measured([5], 2, lambda: squares[:1])}
    imatrix.write(tmp_path / "i.gguf", measured, datasets=["x", "y"], n_chunks=7, chunk_size=64, own_fields={}, overwrite=False)
    reader = GGUFReader(tmp_path / "i.gguf")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert list(tensors) == [f"{name}.{part}" for name in ("a", "blk.0.ffn_down_exps.weight") for part in ("in_sum2", "counts")]
    assert tensors["a.in_sum2"].data.tolist() == [5.0, 10.0]
    assert tensors["blk.0.ffn_down_exps.weight.in_sum2"].data.tolist() == [[2.0, 4.0], [9.0, 12.0], [0.0, 0.0]]
    assert tensors["blk.0.ffn_down_exps.weight.counts"].data.tolist() == [[2.0], [3.0], [0.0]]
    fields = {name: reader.fields[name].contents() for name in reader.fields if not name.startswith("GGUF")}
    assert fields == {"general.type": "imatrix", "imatrix.datasets": ["x", "y"], "imatrix.chunk_count": 7, "imatrix.chunk_size": 64}


@pytest.mark.parametrize("name", FILE_TYPES)
def test_weighed_files_have_llama_quantizes_bytes(name: str, tmp_path: Path) -> None:
    """The manifests were taken from llama-quantize --imatrix: Q4_0 has Q4_1 in its first layers' ffn_down then, and so on."""
    quantize(tmp_path / "pico.gguf", name.lower(), imatrix=GOLDEN)
    assert manifest(tmp_path / "pico.gguf") == json.loads((DATA / "pico-weighed.json").read_text())[name]


def test_the_file_says_which_importance_matrix_it_was_made_with(tmp_path: Path) -> None:
    quantize(tmp_path / "pico.gguf", "q4_k_s", imatrix=GOLDEN, override_kv=["general.name=str:weighed"], prune_layers=[1])
    fields = read_header(tmp_path / "pico.gguf").fields
    theirs = imatrix.read(GOLDEN)
    said = {key.removeprefix("quantize.imatrix."): field.value for key, field in fields.items() if key.startswith("quantize.")}
    assert said == {"file": str(GOLDEN)[:127], "dataset": theirs.datasets[0], "entries_count": 21, "chunks_count": theirs.n_chunks}
    order = [key for key in fields if not key.startswith(("quantcli.", "tokenizer."))]
    assert order[-8:] == [
        *("general.quantization_version", "general.file_type", "general.name"),
        *(f"quantize.imatrix.{key}" for key in ("file", "dataset", "entries_count", "chunks_count")),
        "llama.block_count",
    ]
    assert (fields["general.name"].value, fields["llama.block_count"].value) == ("weighed", 2)


def test_a_layer_that_closes_up_keeps_its_own_importance(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    folder = tiny_llama(layers=3)
    sums = everything(folder)
    path = save(tmp_path / "i.gguf", sums, {name: [4] for name in sums})
    quantize(tmp_path / "whole.gguf", "q4_k_s", folder, imatrix=path, pre_tokenizer="gpt-2", pure=True)
    quantize(tmp_path / "pruned.gguf", "q4_k_s", folder, imatrix=path, pre_tokenizer="gpt-2", pure=True, prune_layers=[1])
    whole, pruned = manifest(tmp_path / "whole.gguf"), manifest(tmp_path / "pruned.gguf")
    assert {name: found for name, found in pruned.items() if "blk.1." in name} == {
        name.replace("blk.2.", "blk.1."): found for name, found in whole.items() if "blk.2." in name
    }
    assert {name for name in whole if "blk.2." not in name} == set(pruned)


def test_both_formats_give_the_same_means(tmp_path: Path) -> None:
    """The legacy one has no sums: its values are means times the number of calls."""
    save(tmp_path / "i.gguf", {"a": np.array([6.0, 1.5])}, {"a": [3]}, datasets=["set"], n_chunks=9)
    tail = struct.pack("<ii", 9, 3) + b"set"
    (tmp_path / "i.dat").write_bytes(legacy({"a": (7, [14.0, 3.5])}, tail))
    for name in ("i.gguf", "i.dat"):
        matrix = imatrix.read(tmp_path / name)
        assert (matrix["a"].tolist(), matrix.datasets, matrix.n_chunks) == ([2.0, 0.5], ("set",), 9)


def test_old_files_without_chunks_or_calls_are_read(tmp_path: Path) -> None:
    (tmp_path / "i.dat").write_bytes(legacy({"a": (0, [2.0]), "b": (2, [3.0])}))
    matrix = imatrix.read(tmp_path / "i.dat")
    assert ({name: row.tolist() for name, row in matrix.items()}, matrix.datasets, matrix.n_chunks) == ({"a": [2.0], "b": [1.5]}, (), 0)


def test_an_expert_that_saw_no_token_counts_all_its_inputs_alike(tmp_path: Path) -> None:
    """As llama-quantize has it: ones."""
    matrix = imatrix.read(save(tmp_path / "i.gguf", {"e": np.array([[8.0, 4.0], [0.0, 0.0], [3.0, 9.0]])}, {"e": [4, 0, 3]}))
    assert matrix["e"].tolist() == [2.0, 1.0, 1.0, 1.0, 1.0, 3.0]
    assert matrix.unseen("e") == [1]


def stacked(n: int, width: int = 32) -> tuple[Any, dict[str, str]]:
    """A layer's experts as a source has them one by one, and their GGUF names."""
    names = {f"model.layers.0.mlp.experts.{e}.down_proj.weight": "blk.0.ffn_down_exps.weight" for e in range(n)}
    return SimpleNamespace(specs={name: TensorSpec.dense(name, "BF16", (4, width)) for name in names}), names


def test_every_expert_has_its_own_row_and_those_without_tokens_are_told_of(tmp_path: Path) -> None:
    sums = np.random.default_rng(0).random((3, 32)) + 1
    matrix = imatrix.read(save(tmp_path / "i.gguf", {"blk.0.ffn_down_exps.weight": sums}, {"blk.0.ffn_down_exps.weight": [2, 0, 0]}))
    source, names = stacked(3)
    found = importance.of_imatrix(matrix, source, names)
    assert found["model.layers.0.mlp.experts.0.down_proj.weight"].tolist() == pytest.approx(sums[0] / 2)
    assert found["model.layers.0.mlp.experts.2.down_proj.weight"].tolist() == [1.0] * 32
    (tmp_path / "i.dat").write_bytes(legacy({"blk.0.ffn_down_exps.weight": (2, sums.flatten().tolist())}))
    old = importance.of_imatrix(imatrix.read(tmp_path / "i.dat"), source, names)
    assert old["model.layers.0.mlp.experts.1.down_proj.weight"].tolist() == pytest.approx(sums[1] / 2)
    assert "blk.0.ffn_down_exps.weight: no token reached experts 1, 2, whose inputs all count alike" in found.notes[0]


def test_a_stack_of_experts_is_coded_with_a_row_for_each(tmp_path: Path) -> None:
    sums = np.random.default_rng(0).random((2, 256)) + 0.01
    matrix = imatrix.read(save(tmp_path / "i.gguf", {"e": sums}, {"e": [1, 1]}))
    source = SimpleNamespace(specs={"e": TensorSpec.dense("e", "BF16", (2, 8, 256))})
    rows = importance.of_imatrix(matrix, source, {"e": "e"})["e"]  # type: ignore[arg-type]
    W = torch.randn(2, 8, 256, generator=torch.Generator().manual_seed(0))
    blocks = q4_k.encode(W, Scheme.of("q4_k"), rows).parts["blocks"]
    assert torch.equal(blocks, torch.cat([ops.quantize_blocks(W[e], "q4_k", rows[e]) for e in range(2)]))
    assert not torch.equal(blocks, ops.quantize_blocks(W.flatten(0, 1), "q4_k", rows[0]))


def test_a_missing_entry_is_named(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    folder = tiny_llama()
    sums = everything(folder)
    for name in ("blk.1.attn_k.weight", "blk.0.ffn_up.weight"):
        del sums[name]
    path = save(tmp_path / "i.gguf", sums, {name: [4] for name in sums})
    notes = quantize(tmp_path / "m.gguf", "q4_k_m", folder, imatrix=path, pre_tokenizer="gpt-2")
    told = [note for note in notes if "no entry" in note]
    assert [name in note for name, note in zip(("blk.0.ffn_up.weight", "blk.1.attn_k.weight"), told, strict=True)] == [True, True]


def test_a_matrix_of_another_model_is_refused(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    folder = tiny_llama()
    wide = everything(folder, width=64)
    other = {"blk.70.attn_q.weight": np.ones(256)}
    for sums, words in ((wide, "64 values, and .* needs 256"), (other, "no entry for any of this model's tensors")):
        path = save(tmp_path / "i.gguf", sums, {name: [4] for name in sums})
        with pytest.raises(RecipeError, match=words):
            quantize(tmp_path / "m.gguf", "q4_k_m", folder, imatrix=path, pre_tokenizer="gpt-2")
        path.unlink()


def test_an_embedding_of_another_width_goes_without(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    """llama-quantize takes it so too: old files have an entry for the embedding that fits nothing."""
    folder = tiny_llama()
    sums = everything(folder) | {"token_embd.weight": np.ones(512)}
    path = save(tmp_path / "i.gguf", sums, {name: [4] for name in sums})
    quantize(tmp_path / "m.gguf", "q4_k_m", folder, imatrix=path, pre_tokenizer="gpt-2")
    del sums["token_embd.weight"]
    quantize(
        tmp_path / "n.gguf",
        "q4_k_m",
        folder,
        imatrix=save(tmp_path / "j.gguf", sums, {name: [4] for name in sums}),
        pre_tokenizer="gpt-2",
    )
    assert manifest(tmp_path / "m.gguf") == manifest(tmp_path / "n.gguf")


def test_values_that_are_not_finite_are_an_error_with_their_name(tmp_path: Path) -> None:
    matrix = imatrix.read(save(tmp_path / "i.gguf", {"blk.0.attn_q.weight": np.array([1.0, np.nan])}, {"blk.0.attn_q.weight": [1]}))
    with pytest.raises(NumericsError, match=r"blk\.0\.attn_q\.weight has NaN"):
        matrix["blk.0.attn_q.weight"]


@pytest.mark.parametrize(
    ("sums", "counts", "words"),
    [
        ({"a": np.ones(6)}, {"a": [1, 1, 1, 1]}, "a.counts is no count"),
        ({"a": np.ones(6)}, {"a": [-1]}, "a.counts is no count"),
        ({"a": np.ones(6)}, {"a": [float("nan")]}, "a.counts is no count"),
        ({}, {}, "no importance matrix"),
    ],
)
def test_a_damaged_gguf_matrix_is_refused(sums: dict, counts: dict, words: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=words):
        imatrix.read(save(tmp_path / "i.gguf", sums, counts))


def test_a_gguf_file_that_lacks_one_of_two_tensors_is_refused(tmp_path: Path) -> None:
    data = save(tmp_path / "i.gguf", {"a": np.ones(6)}, {"a": [1]}).read_bytes()
    (tmp_path / "j.gguf").write_bytes(data.replace(b"a.counts", b"a.cOunts"))
    with pytest.raises(CheckpointError, match=r"a\.counts is missing, expected F32"):
        imatrix.read(tmp_path / "j.gguf")


def test_a_legacy_file_cut_short_or_changed_is_read_or_refused(tmp_path: Path) -> None:
    data = legacy({"blk.0.attn_q.weight": (3, [1.0, 2.0, 3.0]), "b": (1, [4.0])}, struct.pack("<ii", 5, 4) + b"text")
    path = tmp_path / "i.dat"
    refused = 0
    for k in range(len(data)):
        for changed in (data[:k], data[:k] + b"\xff" + data[k + 1 :], data[:k] + b"\x7f" + data[k + 1 :]):
            path.write_bytes(changed)
            try:
                imatrix.read(path)
            except CheckpointError:
                refused += 1
    assert refused > len(data) / 2
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"i\.dat: .*number of entries is the end of the file"):
        imatrix.read(path)


def test_statistics_serve_as_importance_without_a_second_run(tmp_path: Path) -> None:
    """2048 tokens, so that a sum by their number is exact, and the matrix made of the statistics says the very same."""
    stats = measure(tmp_path / "stats.safetensors", chunks()[:32], hessian=True)
    written(stats, tmp_path / "i.gguf")
    quantize(tmp_path / "a.gguf", "q4_k_m", imatrix=stats.path)
    quantize(tmp_path / "b.gguf", "q4_k_m", imatrix=tmp_path / "i.gguf")
    quantize(tmp_path / "c.gguf", "q4_k_m")
    assert manifest(tmp_path / "a.gguf") == manifest(tmp_path / "b.gguf") != manifest(tmp_path / "c.gguf")
    said = [read_header(tmp_path / f"{k}.gguf").fields["quantcli.dataset_sha256"].value for k in "ab"]
    assert said == [stats.dataset_sha256] * 2


def test_statistics_of_other_weights_are_refused_as_importance(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    stats = measure(tmp_path / "stats.safetensors", chunks()[:2], hessian=False)
    with pytest.raises(RecipeError, match="weights are not those"):
        quantize(tmp_path / "m.gguf", "q4_k_m", tiny_llama(), imatrix=stats.path, pre_tokenizer="gpt-2")


def test_a_matrix_beside_a_pass_that_learns_from_statistics_is_refused(tmp_path: Path) -> None:
    recipe = replace(recipes.load("q4_k_m"), passes=recipes.default_for("gptq").passes)
    with open_checkpoint(str(PICO)) as source, pytest.raises(RecipeError, match="leave one out"):
        list(pipeline.quantize(source, tmp_path / "m.gguf", recipe, data=imatrix.read(GOLDEN)))


def test_types_that_are_garbage_without_importance_are_refused_but_for_the_ends() -> None:
    names = {"model.embed_tokens.weight": "token_embd.weight", "lm_head.weight": "output.weight", "q": "blk.0.attn_q.weight"}
    check = partial(importance.check, names=names)
    ends = {name: Scheme.of("iq2_xxs") for name in ("model.embed_tokens.weight", "lm_head.weight")}
    check({}, ends, file_type=19)
    check({}, {"q": Scheme.of("q2_k")}, file_type=10)
    check({"q": torch.ones(256)}, {"q": Scheme.of("iq3_xxs")}, file_type=23)
    for qtype, number in (("iq2_xxs", 19), ("iq2_xs", 20), ("iq2_s", 29), ("iq3_xxs", 23), ("q2_k", 21)):
        with pytest.raises(RecipeError, match=r"q \(blk\.0\.attn_q\.weight\).*give --imatrix FILE"):
            check({}, {"q": Scheme.of(qtype)}, file_type=number)


Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Cli:
    """Runs ``quantcli WORDS``; its exit code, stdout and stderr."""

    def run(*words: str | Path) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main([str(word) for word in words])
        return (ended.value.code, *capfd.readouterr())  # type: ignore[return-value]

    return run


def test_the_command_line_measures_and_uses_a_matrix(cli: Cli, tmp_path: Path) -> None:
    text, stats, matrix = tmp_path / "text.txt", tmp_path / "stats.safetensors", tmp_path / "i.gguf"
    text.write_text(TEXT)
    window = ("--dataset", text, "--samples", "8", "--seq-len", "64")
    code, out, _ = cli("calibrate", PICO, "-o", stats, "--imatrix", matrix, "--no-hessian", "--json", *window)
    assert (code, json.loads(out)["imatrix"]) == (0, str(matrix))
    assert imatrix.read(matrix).datasets == (str(text),)
    assert cli("export", PICO, "Q4_0", "--imatrix", matrix, "-o", tmp_path / "a.gguf")[0] == 0
    assert cli("quantize", PICO, "--type", "Q4_0", "--stats", stats, "-o", tmp_path / "b.gguf")[0] == 0
    assert manifest(tmp_path / "a.gguf") == manifest(tmp_path / "b.gguf")
    code, _, err = cli("calibrate", PICO, "-o", tmp_path / "other.safetensors", "--imatrix", matrix, *window)
    assert (code, "--overwrite" in err) == (4, True)


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("export", PICO, "int8-g128-sym", "--format", "gptq", "--imatrix", GOLDEN), 2, "belongs to --format gguf"),
        (("quantize", PICO, "--imatrix", GOLDEN), 2, "belongs to --format gguf"),
        (("quantize", PICO, "--type", "Q4_0", "--imatrix", GOLDEN, "--stats", GOLDEN), 2, "give one of the two"),
        (("export", PICO, "Q4_0", "--imatrix", "nowhere.gguf"), 3, "No such file"),
        (("export", PICO, "Q4_0", "--prune-layers", "1,x"), 2, "numbers of layers"),
        (("export", PICO, "Q4_0", "--prune-layers", "3"), 4, "the model has layers 0 … 2"),
        (("export", PICO, "Q4_0", "--override-kv", "a=b"), 4, "KEY=TYPE:VALUE"),
    ],
)
def test_words_that_do_not_fit_are_refused_with_a_reason(words: tuple, code: int, said: str, cli: Cli, tmp_path: Path) -> None:
    got, _, err = cli(*words, "-o", tmp_path / "out")
    assert (got, said in " ".join(err.replace("│", " ").split())) == (code, True), err
