"""Folders of the families with one thing broken, and what a verb of the command line makes of each.

    for broken in broken_folders(sources, scratch, seed=0, numbers=range(100)):
        fault = fault_of(broken, scratch)

A folder is right or refused: a traceback is a fault, and so is an output that does not evaluate as the broken folder itself does. Each
number gives the same folder and verb, whatever came before it: ``broken_folders(…, numbers=[1234])`` makes one again.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import random
import shutil
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quantcli.cli import main
from quantcli.errors import QuantcliError
from quantcli.formats import open_checkpoint
from quantcli.walk.evaluate import Scores, evaluate
from support import families
from support.mutations import File, size_of, walk

WEIGHTS, INDEX, CONFIG, TOKENIZER = "model.safetensors", "model.safetensors.index.json", "config.json", "tokenizer.json"

RECIPES: dict[str, tuple[str, ...]] = {
    "nf4": ("quantize", "--method", "nf4"),
    "fp8": ("quantize", "--recipe", "fp8-dynamic"),
    "gptq": ("quantize", "--method", "gptq", "--group-size", "16"),
    "Q8_0": ("export", "Q8_0"),
    "F16": ("export", "F16"),
    "calibrate": ("calibrate",),
    "eval": ("eval",),
    "inspect": ("inspect", "--tensors"),
}
OFTEN = {"nf4": 4, "fp8": 3, "gptq": 2, "Q8_0": 4, "F16": 4, "calibrate": 1, "eval": 1, "inspect": 1}
"""How often each is drawn: mostly what writes a model without running the source first."""

LIMITS = {"nf4": 0.6, "fp8": 0.25, "gptq": 0.7, "Q8_0": 0.05, "F16": 0.005}
"""Of each verb that writes a model: the KL divergence from its source, four times what the sound families have at most, or a token's
that takes another expert."""

WRITERS = tuple(LIMITS)
READ_TEXT = ("gptq", "calibrate", "eval")

TEXT = "The rain had stopped before noon, and nobody on the quay remembered who had tied the boat to the iron ring. " * 40

LIMIT_S = 60
"""A verb takes a second of processor time on such a folder; after this many it hangs."""


@dataclass(frozen=True, slots=True)
class Broken:
    """A broken folder of a family, valid until the next one is asked for; ``verb``: a key of :data:`RECIPES`; ``what``: what was done."""

    number: int
    family: str
    path: Path
    verb: str
    what: str

    def __str__(self) -> str:
        return f"{self.number}: {self.family}, {self.verb}, {self.what}"


def broken_folders(sources: Mapping[str, Path], scratch: Path, *, seed: int, numbers: Iterable[int]) -> Iterator[Broken]:
    """A folder for each of ``numbers``: one of ``sources`` (family → folder) with one thing broken."""
    for number in numbers:
        rng = random.Random(f"{seed} {number}")
        family = rng.choice(list(sources))
        verb = rng.choices(list(OFTEN), list(OFTEN.values()))[0]
        work = scratch / "model"
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(sources[family], work)
        breaking: Callable[[random.Random, Path], str] = rng.choices((weights, config, tokenizer, index), (5, 5, 3, 1))[0]
        yield Broken(number, family, work, verb, f"{breaking.__name__}: {breaking(rng, work)}")


# --- one thing broken ----------------------------------------------------------------------------------------------------------------


def weights(rng: random.Random, folder: Path) -> str:
    """A tensor gone, of another shape, of another dtype, or under another name."""
    file = File.read(folder / WEIGHTS)
    what = rng.choice((gone, reshaped, reshaped, retyped, retyped, renamed, doubled))(rng, file)
    (folder / WEIGHTS).write_bytes(file.to_bytes())
    return what


def gone(rng: random.Random, file: File) -> str:
    name = rng.choice(list(file.tensors))
    del file.tensors[name]
    return f"without {name}"


def reshaped(rng: random.Random, file: File) -> str:
    """Fewer or more rows or columns, transposed, empty, flat, or deeper."""
    name = rng.choice(list(file.tensors))
    dtype, shape, data = file.tensors[name]
    new, axis = list(shape), rng.randrange(len(shape))
    action = rng.choice(("one more", "one less", "half", "double", "empty", "transposed", "flat", "deeper"))
    sizes = {"one more": shape[axis] + 1, "one less": shape[axis] - 1, "half": shape[axis] // 2, "double": 2 * shape[axis], "empty": 0}
    if action in sizes:
        new[axis] = sizes[action]
    elif action == "transposed" and len(shape) > 1:
        new[-2:] = new[:-3:-1]
    elif action == "flat":
        new = [size_of(shape)]
    else:
        new = [1, *shape]
    n = size_of(new) * len(data) // size_of(shape)
    file.tensors[name] = (dtype, new, (data * (n // len(data) + 1))[:n])
    return f"{name}: {shape} → {new}"


def retyped(rng: random.Random, file: File) -> str:
    """The same numbers in another dtype, or bytes in their place, or one that is no number."""
    name = rng.choice(list(file.tensors))
    dtype, shape, data = file.tensors[name]
    values = torch.frombuffer(bytearray(data), dtype={"BF16": torch.bfloat16, "U8": torch.uint8}[dtype]).float()
    new, to = rng.choice((("I8", torch.int8), ("U8", torch.uint8), ("F64", torch.float64), ("F32", torch.float32), ("F16", torch.float16)))
    odd = rng.choice(("", "", "Inf", "NaN")) if to.is_floating_point else ""
    if odd:
        values[rng.randrange(values.numel())] = float(odd)
    values = (values * 64).round() if not to.is_floating_point else values
    file.tensors[name] = (new, shape, values.to(to).numpy().tobytes())
    return f"{name}: {dtype} → {new}{' with ' * bool(odd)}{odd}"


def renamed(rng: random.Random, file: File) -> str:
    name = rng.choice(list(file.tensors))
    new = rng.choice((f"{name}_orig", f"module.{name}", name.replace("weight", "kernel"), name.replace("layers.1", "layers.7"), name[:-1]))
    new = f"{name}x" if new == name else new
    file.tensors = {new if key == name else key: value for key, value in file.tensors.items()}
    return f"{name} as {new}"


def doubled(rng: random.Random, file: File) -> str:
    """A tensor a second time under a name of another layer, or of none."""
    name = rng.choice(list(file.tensors))
    other = rng.choice([key for key in file.tensors if key != name])
    new = rng.choice((other, other, name.replace(".0.", ".9."), name.replace(".1.", ".2."), f"{name}.copy", "lm_head.weight"))
    file.tensors[new] = file.tensors[name]
    return f"{new} is a copy of {name}"


ODD: tuple[Any, ...] = (
    0, 1, -1, 3, 7, 10**12, 2**31, 0.5, -0.5, 1e30, None, True, False, "", "4", "none", "float16", "gelu", [], [1], [None], {}, {"a": 1},
    [[1, 2]], {"a": {"b": []}},
)  # fmt: skip


def config(rng: random.Random, folder: Path) -> str:
    """A field of config.json, or of an object in it, changed, retyped or gone."""
    document = json.loads((folder / CONFIG).read_text())
    what = changed(rng, document)
    (folder / CONFIG).write_text(json.dumps(document))
    return what


def changed(rng: random.Random, document: Any) -> str:
    """One value of ``document`` off by one, doubled, halved, of another kind, or gone."""
    parent, key, path = rng.choice(list(walk(document, "")))
    value = parent[key]
    action = rng.choice(("gone", "near", "near", "near", "odd", "odd"))
    if action == "gone":
        del parent[key]
        return f"without {path[1:]}"
    if action == "near" and isinstance(value, bool):
        parent[key] = not value
    elif action == "near" and isinstance(value, int | float):
        parent[key] = rng.choice((value + 1, value - 1, value * 2, value // 2, -value, str(value), float(value), [value]))
    elif action == "near" and isinstance(value, str):
        parent[key] = rng.choice((value[:-1], value + "2", value.upper(), [value]))
    else:
        parent[key] = copy.deepcopy(rng.choice(ODD))
    return f"{path[1:]}: {json.dumps(value)[:40]} → {json.dumps(parent[key])[:40]}"


def tokenizer(rng: random.Random, folder: Path) -> str:
    """A file of the tokenizer gone, cut off, or with one entry changed."""
    paths = sorted(path for path in folder.iterdir() if path.name.startswith("tokenizer"))
    path = rng.choice(paths)
    action = rng.choice(("gone", "cut", "empty", "changed", "changed", "vocabulary", "vocabulary", "vocabulary"))
    if action == "gone":
        path.unlink()
        return f"without {path.name}"
    if action in ("cut", "empty"):
        data = path.read_bytes()
        path.write_bytes(data[: rng.randrange(len(data)) if action == "cut" else 0])
        return f"{path.name} cut to {path.stat().st_size} bytes"
    if path.suffix != ".json":
        data = bytearray(path.read_bytes())
        at = rng.randrange(len(data))
        data[at] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        return f"{path.name}: a bit of byte {at}"
    document = json.loads(path.read_text())
    if path.name == TOKENIZER and action == "vocabulary":
        what = renumbered(rng, document)
    elif path.name == TOKENIZER and rng.random() < 0.7:  # most places of the file are tokens and merges
        key = rng.choice(list(document))
        part = {key: document[key]}
        what = changed(rng, part)
        document = {k: v for k, v in (document | {key: part.get(key, ...)}).items() if v is not ...}
    else:
        what = changed(rng, document)
    path.write_text(json.dumps(document))
    return f"{path.name}: {what}"


def renumbered(rng: random.Random, document: Any) -> str:
    """A token with another's id, with one beyond all, with none, or gone; a merge of what is no token; an added token elsewhere."""
    vocabulary, merges, added = document["model"]["vocab"], document["model"]["merges"], document["added_tokens"]
    token = rng.choice(list(vocabulary))
    action = rng.choice(("id", "id", "gone", "merge", "added", "added gone", "special"))
    if action == "id":
        old = vocabulary[token]
        vocabulary[token] = rng.choice(
            (rng.choice(list(vocabulary.values())), len(vocabulary) + 2, 10**6, 2**31, 10**12, -1, str(old), None)
        )
        return f"{token!r}: {old} → {vocabulary[token]!r}"
    if action == "gone":
        del vocabulary[token]
        return f"without the token {token!r}"
    if action == "merge":
        merges.insert(0, rng.choice((["no", "token"], "no token", "one", ["a", "b", "c"], 7, None)))
        return f"a merge {merges[0]!r}"
    entry = rng.choice(added)
    if action == "added":
        entry["id"] = rng.choice((entry["id"] + 1, len(vocabulary) + 5, 10**9, -1, str(entry["id"])))
        return f"added token {entry['content']!r} with id {entry['id']!r}"
    if action == "special":
        entry["special"] = rng.choice((False, None, "yes"))
        return f"added token {entry['content']!r} special {entry['special']!r}"
    added.remove(entry)
    return f"without the added token {entry['content']!r}"


def index(rng: random.Random, folder: Path) -> str:
    """Two shards and an index that disagree."""
    file = File.read(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = list(file.tensors)
    halves = {"model-00001-of-00002.safetensors": names[: len(names) // 2], "model-00002-of-00002.safetensors": names[len(names) // 2 :]}
    for shard, members in halves.items():
        (folder / shard).write_bytes(File(shard, {name: file.tensors[name] for name in members}).to_bytes())
    places = {name: shard for shard, members in halves.items() for name in members}
    document: dict[str, Any] = {"metadata": {"total_size": sum(len(data) for _, _, data in file.tensors.values())}, "weight_map": places}
    name, shard = rng.choice(names), rng.choice(list(halves))
    action = rng.choice(("entry gone", "no file", "other file", "shard gone", "shard cut", "path", "index gone", "size", "type", "cut"))
    if action == "entry gone":
        del places[name]
    elif action == "no file":
        places[name] = "model-00003-of-00003.safetensors"
    elif action == "other file":
        places[name] = next(other for other in halves if other != places[name])
    elif action == "path":
        places[name] = rng.choice((f"../{places[name]}", "/etc/passwd", "", CONFIG))
    elif action == "type":
        places[name] = rng.choice((None, 7, [shard], {}))
    elif action == "size":
        document["metadata"] = rng.choice(({"total_size": 1}, {"total_size": "many"}, None, [], {}))
    elif action == "shard gone":
        (folder / shard).unlink()
    elif action == "shard cut":
        data = (folder / shard).read_bytes()
        (folder / shard).write_bytes(data[: rng.randrange(len(data))])
    text = json.dumps(document)
    if action != "index gone":
        (folder / INDEX).write_text(text[: len(text) // 2] if action == "cut" else text)
    return f"{action}, {name}, {shard}"


# --- what a verb makes of it ---------------------------------------------------------------------------------------------------------


def fault_of(broken: Broken, scratch: Path) -> str | None:
    """What is wrong with the answer to ``broken``, or None."""
    output = scratch / ("out.gguf" if broken.verb in ("Q8_0", "F16") else "out")
    code, said = answer(broken.verb, broken.family, broken.path, output)
    if code == 1:
        return f"exit 1: {said}"
    if code != 0 or broken.verb not in WRITERS:
        return None
    try:
        divergence = divergence_of(output, broken.path)
    except (QuantcliError, TimeoutError) as error:
        return f"exit 0, and no evaluation: {error}" if evaluates(broken.path) else None
    limit = limit_of(broken)
    return None if divergence <= limit else f"exit 0, and the KL divergence is {divergence:.4f}, over {limit:.4f}"


def limit_of(broken: Broken) -> float:
    """The KL divergence that the output of ``broken`` may have from its source."""
    if broken.family.startswith("gpt-oss") and broken.verb in ("Q8_0", "F16"):
        return 0.4  # its yarn's ``truncate: true`` has no key in GGUF
    return LIMITS[broken.verb]


def answer(verb: str, family: str, source: Path, output: Path) -> tuple[int, str]:
    """Exit code of ``verb`` on ``source``, and what it said on stderr; what stood at ``output`` is gone."""
    for path in output.parent.glob(f"{output.name}*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    name, *options = RECIPES[verb]
    arguments = [name, str(source), *options, "--quiet"]
    if verb in READ_TEXT:
        text = output.parent / "text.txt"
        text.write_text(TEXT)
        arguments += ["--dataset", str(text), "--samples", "2", "--seq-len", "32"]
    if verb in (*WRITERS, "calibrate"):
        arguments += ["-o", str(output)]
    if name == "export":
        arguments += [word for key, value in families.options(family).items() for word in (f"--{key.replace('_', '-')}", value)]
    if verb != "inspect":
        arguments += ["--device", "cpu"]
    errors = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors), within(LIMIT_S):
        try:
            main(arguments)
        except SystemExit as end:
            return int(end.code or 0), errors.getvalue()
    raise AssertionError("main always exits")


def divergence_of(output: Path, source: Path) -> float:
    """KL(source ‖ output) on a few tokens that both have."""
    with within(LIMIT_S), open_checkpoint(str(output)) as made, open_checkpoint(str(source)) as original:
        ids = torch.randint(0, 200, (2, 24), generator=torch.Generator().manual_seed(0))
        scores = [event for event in evaluate(made, ids, baseline=original, device="cpu") if isinstance(event, Scores)]
    assert scores[0].kld_mean is not None
    return scores[0].kld_mean


def evaluates(source: Path) -> bool:
    """Whether ``source`` itself can be run: a negative rotary base makes a model that has NaN everywhere, in transformers too."""
    try:
        divergence_of(source, source)
    except QuantcliError:
        return False
    return True


@contextlib.contextmanager
def within(limit_s: int) -> Iterator[None]:
    """A :class:`TimeoutError` after ``limit_s`` seconds of processor time: a busy machine is no fault."""

    def stop(number: int, frame: object) -> None:
        raise TimeoutError(f"no end after {limit_s} s of processor time")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, limit_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
