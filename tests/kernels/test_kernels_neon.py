"""The kernels on Arm, from any machine: every lane source compiles for NEON, and in an emulator it gives ggml's bytes.

The compiler is zig's clang and the emulator is unicorn, both wheels. The image has no operating system under it: neon_harness.cpp stands
in for memory and threads.
"""

from __future__ import annotations

import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from quantcli.ops.blocks import KINDS
from support.block_inputs import INPUTS, assert_as_ggml, gaussian, load_golden, weightings
from support.places import ROOT, SUPPORT

pytest.importorskip("ziglang", reason="no cross compiler: pip install ziglang")
unicorn = pytest.importorskip("unicorn", reason="no emulator: pip install unicorn")
arm64 = pytest.importorskip("unicorn.arm64_const")

pytestmark = pytest.mark.slow  # ten to twenty seconds of compiling

KERNELS = ROOT / "kernels"
SOURCES = re.search(r"set\(LANE_SOURCES (.*?)\)", (KERNELS / "CMakeLists.txt").read_text(), re.S)
FLAGS = ["-std=c++20", "-O2", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fwrapv", "-fno-exceptions", "-fno-builtin"]
FLAGS += ["-fno-threadsafe-statics"]
FLAGS += ["-Wall", "-Wextra", "-Werror", "-DQC_ISA=neon", "-DQC_LANES=4", f"-I{KERNELS}"]
STACK, ARENA, RETURN = 0x4000_0000, 0x5000_0000, 0x6000_0000
MIB = 1 << 20


def zig(*arguments: str | Path) -> None:
    done = subprocess.run([sys.executable, "-m", "ziglang", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """An ELF program of every lane source: a symbol that one of them lacks ends it here."""
    assert SOURCES is not None
    folder = tmp_path_factory.mktemp("neon")
    objects = []
    for source in [*(KERNELS / name for name in SOURCES[1].split()), KERNELS / "grids.cpp", SUPPORT / "neon_harness.cpp"]:
        objects.append(folder / f"{source.stem}.o")
        zig("c++", "-target", "aarch64-linux-gnu", *FLAGS, "-c", source, "-o", objects[-1])
    zig("c++", "-target", "aarch64-freestanding-none", "-nostdlib", "-static", "-Wl,-e,quantize", *objects, "-o", folder / "image")
    return (folder / "image").read_bytes()


def segments(elf: bytes) -> list[tuple[int, int, bytes]]:
    """(address, size in memory, data) of each PT_LOAD of a 64-bit ELF file."""
    start, size, count = struct.unpack_from("<Q", elf, 32)[0], *struct.unpack_from("<HH", elf, 54)
    found = []
    for i in range(count):
        kind, _, offset, address, _, n_file, n_memory, _ = struct.unpack_from("<IIQQQQQQ", elf, start + i * size)
        if kind == 1:
            found.append((address, n_memory, elf[offset : offset + n_file]))
    return found


def symbol(elf: bytes, name: str) -> int:
    """The address of a global symbol, from the symbol table."""
    start, size, count = struct.unpack_from("<Q", elf, 40)[0], *struct.unpack_from("<HH", elf, 58)
    sections = [struct.unpack_from("<IIQQQQIIQQ", elf, start + i * size) for i in range(count)]
    table = next(section for section in sections if section[1] == 2)
    strings = sections[table[6]][4]
    for at in range(table[4], table[4] + table[5], 24):
        label, _, _, _, value, _ = struct.unpack_from("<IBBHQQ", elf, at)
        if elf[strings + label : elf.index(b"\0", strings + label)] == name.encode():
            return value
    raise AssertionError(f"the image has no symbol {name}")


class Arm:
    """An emulated core with the image in its memory."""

    def __init__(self, elf: bytes) -> None:
        self.elf = elf
        self.core = unicorn.Uc(unicorn.UC_ARCH_ARM64, unicorn.UC_MODE_ARM)
        self.core.reg_write(arm64.UC_ARM64_REG_CPACR_EL1, 3 << 20)  # NEON switched on
        loaded = segments(elf)
        low, high = min(s[0] for s in loaded) // MIB * MIB, max(s[0] + s[1] for s in loaded)
        self.core.mem_map(low, -(-(high - low) // MIB) * MIB)
        for address, _, content in loaded:
            self.core.mem_write(address, content)
        for base, size in ((STACK, 8 * MIB), (ARENA, 16 * MIB), (RETURN, MIB)):
            self.core.mem_map(base, size)
        self.end = ARENA

    def put(self, values: Tensor) -> int:
        """The address of a copy of ``values``."""
        at = self.end
        content = values.contiguous().view(torch.uint8).numpy().tobytes()
        self.core.mem_write(at, content)
        self.end += -(-len(content) // 64) * 64
        return at

    def get(self, at: int, n_bytes: int) -> Tensor:
        return torch.frombuffer(self.core.mem_read(at, n_bytes), dtype=torch.uint8)

    def call(self, name: str, *arguments: int) -> None:
        for i, argument in enumerate(arguments):
            self.core.reg_write(arm64.UC_ARM64_REG_X0 + i, argument)
        self.core.reg_write(arm64.UC_ARM64_REG_SP, STACK + 8 * MIB)
        self.core.reg_write(arm64.UC_ARM64_REG_LR, RETURN)
        self.core.emu_start(symbol(self.elf, name), RETURN)
        assert self.core.reg_read(arm64.UC_ARM64_REG_X0) == 0


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_golden()


@pytest.mark.parametrize("kind", KINDS)
def test_an_arm_core_gives_ggmls_bytes(kind: str, image: bytes, golden: dict[str, Tensor]) -> None:
    W = torch.cat([golden[f"{case}/W"] for case in INPUTS])
    rows, cols = W.shape
    row_bytes = cols // KINDS[kind].block * KINDS[kind].n_bytes
    for weights, suffix in weightings(kind, cols):
        arm = Arm(image)
        blocks = arm.put(torch.zeros(rows, row_bytes, dtype=torch.uint8))
        arm.call("quantize", list(KINDS).index(kind), arm.put(W), rows, cols, 0 if weights is None else arm.put(weights), blocks)
        got = arm.get(blocks, rows * row_bytes).view(rows, row_bytes).split(2)
        for case, found in zip(INPUTS, got, strict=True):
            assert_as_ggml(found, golden.get(f"{case}/{kind}{suffix}"), f"{case}{suffix}", kind)


@pytest.mark.parametrize("kind", KINDS)
def test_an_arm_core_gives_ggmls_floats(kind: str, image: bytes, golden: dict[str, Tensor]) -> None:
    arm = Arm(image)
    expected = golden[f"decoded/{kind}"]
    rows, cols = expected.shape
    W = arm.put(torch.zeros(rows, cols))
    arm.call("dequantize", list(KINDS).index(kind), arm.put(gaussian(golden, kind)), rows, cols, W)
    assert torch.equal(arm.get(W, 4 * rows * cols), expected.contiguous().view(torch.uint8).flatten())
