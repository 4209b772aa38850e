"""Hashes of every output that the shipped recipes give on the pico model and on the families: whether a change left them as they were.

    python tests/support/output_hashes.py models FOLDER          makes the models, once
    python tests/support/output_hashes.py hash FOLDER > LIST     runs every recipe over each of them, by the command line

Two lists, taken before and after a change, are compared with diff. What an output says of the run (quantcli.json, and quantcli.* among a
GGUF file's keys) is left out, since it names the version and the recipe's words; the same run's exit code stands in for a hash where a
recipe does not fit a model.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
SHORT = ["--samples", "4", "--seq-len", "64"]


def make_models(folder: Path) -> None:
    """The pico model and every family in ``folder``."""
    sys.path.insert(0, str(TESTS))
    from support import families

    shutil.copytree(TESTS / "data/pico", folder / "pico")
    for name in families.CASES:
        families.make(name, folder / name.replace(" ", "-").replace(",", ""))


def hash_all(folder: Path) -> None:
    """One line for each output, as it is made."""
    from quantcli import recipe as recipes

    work = folder / f"work-{os.getpid()}"
    for model in sorted(path for path in folder.iterdir() if (path / "config.json").is_file()):
        work.mkdir()
        stats, matrix = work / "stats.safetensors", work / "imatrix.gguf"
        code = run("calibrate", model, "-o", stats, "--histograms", *SHORT)
        tell(code, stats, model, "calibrate")
        code = run("calibrate", model, "-o", work / "again.safetensors", "--no-hessian", "--imatrix", matrix, *SHORT)
        tell(code, matrix, model, "calibrate --imatrix")
        for name in recipes.shipped():
            report(model, work, name)
            is_gguf = recipes.load(name).format == "gguf"
            if is_gguf and matrix.is_file():
                report(model, work, name, "--imatrix", str(matrix))
            if is_gguf or recipes.load(name).is_calibrated:
                report(model, work, name, "--stats", str(stats))
        report(model, work, "gptq-q4_k_m", command=["--method", "gptq", "--type", "Q4_K_M", *SHORT])
        shutil.rmtree(work)


def report(model: Path, work: Path, recipe: str, *options: str, command: list[str] | None = None) -> None:
    out = work / "out"
    words = command or ["--recipe", recipe, *options, *([] if options else SHORT)]
    code = run("quantize", model, "-o", out, *words)
    tell(code, out, model, " ".join([recipe, *(word for word in options if word.startswith("-"))]))
    if out.is_dir():
        shutil.rmtree(out)
    out.unlink(missing_ok=True)


def tell(code: int, output: Path, model: Path, what: str) -> None:
    sys.stdout.write(f"{digest(output) if code == 0 else f'exit {code}'}  {model.name}  {what}\n")
    sys.stdout.flush()


def run(*args: object) -> int:
    from quantcli.cli import main

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            main([str(arg) for arg in args])
        except SystemExit as ended:
            return int(ended.code or 0)
    return 0


def digest(path: Path) -> str:
    """The first 16 digits of a sha256 over all files of an output."""
    sha = hashlib.sha256()
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    for file in (file for file in files if file.is_file() and file.name != "quantcli.json"):
        sha.update(str(file.relative_to(path)).encode())
        with file.open("rb") as opened:
            is_gguf = opened.read(4) == b"GGUF"
        sha.update(gguf_without_record(file) if is_gguf else without_version(file))
    return sha.hexdigest()[:16]


def without_version(file: Path) -> bytes:
    if file.suffix != ".json":
        return file.read_bytes()
    config = json.loads(file.read_text("utf8"))
    for block in (config, config.get("quantization_config") if isinstance(config, dict) else None):
        if isinstance(block, dict):
            block.pop("meta", None)
    return json.dumps(config, sort_keys=True).encode()


def gguf_without_record(file: Path) -> bytes:
    """Keys in their order and tensors of a GGUF file, without quantcli.* and the path of an importance matrix."""
    from gguf import GGUFReader

    reader, sha = GGUFReader(file), hashlib.sha256()
    for key, field in reader.fields.items():
        if not key.startswith(("quantcli.", "GGUF.kv_count", "quantize.imatrix.file")):
            sha.update(repr((key, [kind.name for kind in field.types])).encode())
            for index in field.data:
                sha.update(field.parts[index].tobytes())
    for tensor in reader.tensors:
        sha.update(repr((tensor.name, tensor.tensor_type.name, tensor.shape.tolist())).encode())
        sha.update(tensor.data.tobytes())
    return sha.digest()


if __name__ == "__main__":
    verb, where = sys.argv[1], Path(sys.argv[2]).resolve()
    if verb == "models":
        make_models(where)
    else:
        hash_all(where)
