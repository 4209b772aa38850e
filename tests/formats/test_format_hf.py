"""Dense folders: what is copied is copied to the bit, what changes dtype changes as asked."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.errors import NumericsError, UnsupportedError
from quantcli.formats import Request, gptq, hf, open_checkpoint
from quantcli.tensors import QuantizedTensor, Scheme

TinyLlama = Callable[..., Path]
SMALL = {"hidden": 64, "intermediate": 96, "layers": 1, "heads": 2, "kv_heads": 1, "vocab": 300}
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def write(source: Checkpoint, target: Path, schemes: Mapping[str, Scheme] | None = None, **options: int) -> None:
    """The source through the writer, dense tensors cast by ``parts`` where ``schemes`` ask for it."""
    schemes = schemes or {}
    context = hf.FORMAT.layout(source, schemes, Request(options=options))
    outputs = [out for spec in source.specs.values() for out in context.outputs(spec, schemes.get(spec.name))]
    with context.writer(target, outputs, {}, overwrite=False) as writer:
        for name in source.specs:
            for part, tensor in context.parts(name, source.read(name)).items():
                writer.put(part, tensor)
        writer.commit()


def files_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_copy_has_the_same_tensors_and_files(tiny_llama: TinyLlama, tmp_path: Path, dtype: str, tied: bool) -> None:
    folder = tiny_llama(**SMALL, dtype=dtype, tied=tied, shards=3)
    (folder / "LICENSE").write_text("free")
    (folder / "modeling_x.py").write_text("pass")
    with open_checkpoint(str(folder)) as source:
        write(source, tmp_path / "out", max_shard_bytes=50_000)
    theirs, ours = files_of(folder), files_of(tmp_path / "out")
    assert ("lm_head.weight" in ours) is not tied
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) and ours[name].dtype == tensor.dtype for name, tensor in theirs.items())
    small = {p.name for p in folder.iterdir() if "safetensors" not in p.name}
    assert {p.name for p in (tmp_path / "out").iterdir() if "safetensors" not in p.name} == small
    assert all((tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes() for name in small)


def test_a_copy_in_one_file_equals_the_original_to_the_byte(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    folder = tiny_llama(**SMALL)
    with open_checkpoint(str(folder)) as source:
        write(source, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_weights_and_their_indexes_and_pickles_are_not_copied_as_sidecars(tiny_llama: TinyLlama) -> None:
    folder = tiny_llama(**SMALL, shards=2)
    for name in ("pytorch_model.bin", "pytorch_model.bin.index.json", "quantcli.json", "README.md"):
        (folder / name).write_text("{}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool.jinja").write_text("x")
    with open_checkpoint(str(folder)) as source:
        assert set(source.sidecars().files) == {
            "README.md",
            "generation_config.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "additional_chat_templates/tool.jinja",
        }


@pytest.mark.parametrize("qtype", list(DTYPES))
def test_a_scheme_changes_dtype_and_config(tiny_llama: TinyLlama, tmp_path: Path, qtype: str) -> None:
    folder = tiny_llama(**SMALL, dtype="float32")
    with open_checkpoint(str(folder)) as source:
        write(source, tmp_path / "out", {name: Scheme.of(qtype) for name in source.specs if "norm" not in name})
    for name, tensor in files_of(tmp_path / "out").items():
        original = files_of(folder)[name]
        assert torch.equal(tensor, original.to(torch.float32 if "norm" in name else DTYPES[qtype]))
    word = str(DTYPES[qtype]).removeprefix("torch.")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads((folder / "config.json").read_text()) | {"dtype": word}


def test_a_config_with_torch_dtype_keeps_its_word(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    folder = tiny_llama(**SMALL, dtype="float32")
    config = json.loads((folder / "config.json").read_text())
    config["torch_dtype"] = config.pop("dtype")
    (folder / "config.json").write_text(json.dumps(config))
    with open_checkpoint(str(folder)) as source:
        write(source, tmp_path / "out", {name: Scheme.of("f16") for name in source.specs})
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == config | {"torch_dtype": "float16"}


def test_codes_of_a_dense_qtype_are_written_as_they_are(tiny_llama: TinyLlama) -> None:
    scheme = Scheme.of("f16")
    with open_checkpoint(str(tiny_llama(**SMALL))) as source:
        context = hf.FORMAT.layout(source, {"model.norm.weight": scheme})
    data = torch.randn(64).half()
    assert context.parts("model.norm.weight", QuantizedTensor(scheme, (64,), {"data": data})) == {"model.norm.weight": data}


def test_a_value_that_does_not_fit_is_an_error_by_name(tiny_llama: TinyLlama) -> None:
    with open_checkpoint(str(tiny_llama(**SMALL, dtype="float32"))) as source:
        context = hf.FORMAT.layout(source, {"model.norm.weight": Scheme.of("f16")})
    with pytest.raises(NumericsError, match=r"model\.norm\.weight: a value of magnitude 7e\+04 does not fit F16; use bf16 or f32"):
        context.parts("model.norm.weight", torch.full((64,), 7e4))


def test_a_quantized_source_becomes_dense_again(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    name, scheme = "model.layers.0.mlp.down_proj.weight", Scheme.of("int", bits=4, group_size=32, sym=True)
    codes = torch.randint(0, 16, (64, 96), dtype=torch.uint8)
    parts = {"codes": codes, "scale": torch.rand(64, 3).half(), "zero": torch.full((64, 3), 8, dtype=torch.uint8)}
    folder = tiny_llama(**SMALL, dtype="float16")
    with open_checkpoint(str(folder)) as source:
        context = gptq.FORMAT.layout(source, {name: scheme})
        outputs = [o for s in source.specs.values() for o in context.outputs(s, scheme if s.name == name else None)]
        with context.writer(tmp_path / "q", outputs, {}, overwrite=False) as writer:
            for spec in source.specs:
                tensor = QuantizedTensor(scheme, (64, 96), parts) if spec == name else source.read(spec)
                for part, value in context.parts(spec, tensor).items():
                    writer.put(part, value)
            writer.commit()
    with open_checkpoint(str(tmp_path / "q")) as quantized:
        write(quantized, tmp_path / "dense")
        expected = quantized.read(name)
    with open_checkpoint(str(tmp_path / "dense")) as back:
        assert back.kind == "hf"
        assert "quantization_config" not in back.config
        assert back.specs[name].dtype == "F16"
        assert torch.equal(back.read(name), expected.half())
    assert not (tmp_path / "dense" / "quantize_config.json").exists()


def test_only_dense_schemes_are_supported(tiny_llama: TinyLlama) -> None:
    assert [hf.FORMAT.supports(Scheme.of(q)) for q in ("f32", "f16", "bf16", "q4_k", "int")] == [True, True, True, False, False]
    with (
        open_checkpoint(str(tiny_llama(**SMALL))) as source,
        pytest.raises(UnsupportedError, match=r"lm_head\.weight: int4-g128-sym cannot be stored"),
    ):
        hf.FORMAT.layout(source, {"lm_head.weight": Scheme.of("int", bits=4, group_size=128, sym=True)})
