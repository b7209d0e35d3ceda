"""The GPUs that a dry run knows, and the driver that stands in for theirs. Nothing here imports torch."""

from __future__ import annotations

import ctypes
import importlib.util
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

# What large products and large copies reach of a data sheet's rate, measured by others on an H100: 798 of 989
# Tflop/s and 3.0 of 3.35 TB/s. FP8 is taken to be 1.5 times as fast as bfloat16, not twice.
REACHED_PRODUCTS, REACHED_BYTES, FP8_GAIN = 798 / 989, 3.0 / 3.35, 1.5
OUTSIDE = "outside graphs"  # the name of the part of a run that no graph does


class Card(NamedTuple):
    """A GPU: what torch says of one, and the rates of its data sheet (dense products, fp32 sums)."""

    title: str
    capability: tuple[int, int]
    memory: float  # bytes, as torch reports them
    processors: int
    shared: int  # bytes of shared memory that a block may have
    cache: int  # bytes, level 2
    tflops: float  # bfloat16
    tb_per_s: float  # memory
    link_gb_per_s: float  # to the other GPUs, each way
    source: str

    @property
    def products(self) -> float:
        """Operations per second that large products in bfloat16 reach."""
        return 1e12 * self.tflops * REACHED_PRODUCTS

    @property
    def fp8_products(self) -> float:
        """The same in FP8, which exists from capability 8.9 on."""
        return self.products * (FP8_GAIN if self.capability >= (8, 9) else 1.0)

    @property
    def bytes_per_s(self) -> float:
        """Bytes per second, read and written, that large copies reach."""
        return 1e12 * self.tb_per_s * REACHED_BYTES

    @property
    def link(self) -> float:
        """Bytes per second that a GPU sends."""
        return 1e9 * self.link_gb_per_s


CARDS = {
    "h100": Card("NVIDIA H100 80GB HBM3", (9, 0), 85_028_765_696, 132, 232_448, 52_428_800,
                 989, 3.35, 450, "data sheet of H100 SXM"),
    "h200": Card("NVIDIA H200", (9, 0), 150_754_820_096, 132, 232_448, 62_914_560,
                 989, 4.8, 450, "data sheet of H200 SXM"),
    "a100": Card("NVIDIA A100-SXM4-80GB", (8, 0), 84_987_740_160, 108, 166_912, 41_943_040,
                 312, 2.04, 300, "data sheet of A100 SXM"),
    "b200": Card("NVIDIA B200", (10, 0), 191_502_000_000, 148, 232_448, 132_644_864,
                 2250, 8.0, 900, "data sheet of HGX B200"),
    "4090": Card("NVIDIA GeForce RTX 4090", (8, 9), 25_386_352_640, 128, 101_376, 75_497_472,
                 165, 1.008, 32, "white paper on Ada; PCIe 4.0"),
    "5090": Card("NVIDIA GeForce RTX 5090", (12, 0), 33_669_000_000, 170, 101_376, 100_663_296,
                 209, 1.792, 64, "white paper on RTX Blackwell; PCIe 5.0"),
}  # fmt: skip


def table() -> str:
    """The cards with their rates, and where these come from."""
    lines = [
        "| --gpu | card | capability | GB | bf16 Tflop/s | TB/s | link, GB/s | source |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, card in CARDS.items():
        capability = "{}.{}".format(*card.capability)
        rates = f"{card.tflops:g} | {card.tb_per_s:g} | {card.link_gb_per_s:g}"
        memory = f"{card.memory / 1e9:.1f}"
        lines.append(f"| {name} | {card.title} | {capability} | {memory} | {rates} | {card.source} |")
    return "\n".join(lines)


def real_driver() -> str:
    """What says that a real driver is here, beside which the false one must not be loaded; "" for none."""
    for place in ("/dev/nvidiactl", "/dev/nvidia0", "/proc/driver/nvidia/version", "/dev/dxg"):
        if Path(place).exists():
            return place
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return ""
    return "libcuda.so.1"


def cuda_build() -> bool:
    """Whether the torch that would be imported is built for CUDA, found out without importing it."""
    found = importlib.util.find_spec("torch")
    return bool(found and list(Path(found.origin).parent.glob("lib/libtorch_cuda.so")))


def false_driver(folder: Path, devices: int) -> str:
    """Make and load the driver that does nothing, before torch is imported; why that failed, or ""."""
    compiler = shutil.which("gcc") or shutil.which("cc") or shutil.which("clang")
    if compiler is None:
        return "there is no C compiler (apt install gcc)"
    library = folder / "libcuda.so.1"
    folder.mkdir(parents=True, exist_ok=True)
    words = ["-shared", "-fPIC", "-w", "-Wl,-soname,libcuda.so.1", "-o", str(library)]
    command = [compiler, *words, str(Path(__file__).with_name("no_driver.c"))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return f"{compiler} does not make the driver that does nothing ({done.stderr.strip()[-200:]})"
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL).set_devices(devices)
    return ""
