"""Kernels of a GPU that is not there in its machine code: what fails, registers, spills, shared memory."""

from __future__ import annotations

import dataclasses
import logging
import struct
from collections.abc import Callable, Iterable
from typing import Any

# The private names without which no kernel is compiled: module, then what must be there.
NAMES = (
    ("torch._inductor.runtime.triton_heuristics", "CachingAutotuner._precompile_config"),
    ("triton", "compile"),
)
# Attributes in the section .nv.info of a cubin: (number of a symbol, value) of a function.
FRAME_SIZE, REGISTERS = 0x11, 0x2F
ONLY_KEY, SIZED = (0x01, 0x02, 0x03), 0x04  # forms of an attribute: a value in its head, or bytes behind it


@dataclasses.dataclass
class Cubin:
    """A kernel in one of its configurations. Without `failed` it has been compiled."""

    number: int  # of the kernel: names are not unique
    kernel: str
    part: str
    configuration: str
    registers: int = 0
    spills: int = 0  # bytes of each thread that lie in memory instead of registers
    shared: int = 0  # bytes of a block
    failed: str = ""  # why


def bad_kernels(cubins: Iterable[Cubin]) -> list[int]:
    """Numbers of kernels that fail or spill in every configuration; of others the card takes a good one."""
    cubins = list(cubins)
    good = {cubin.number for cubin in cubins if not (cubin.failed or cubin.spills)}
    return sorted({cubin.number for cubin in cubins} - good)


def attributes(cubin: bytes) -> dict[int, int]:
    """The largest value of each attribute of functions in the section .nv.info of an ELF file of CUDA.

    ValueError for what is none.
    """
    if cubin[:6] != b"\x7fELF\x02\x01":
        raise ValueError("this is no cubin")
    (table,), (size, count, names) = struct.unpack_from("<Q", cubin, 40), struct.unpack_from("<3H", cubin, 58)
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + size * i) for i in range(count)]
    first_name, found = sections[names][4], {}
    for name, _, _, _, begin, length in sections:
        if not cubin[first_name + name :].startswith(b".nv.info\0"):
            continue
        place, end = begin, begin + length
        while place < end:
            form, attribute, value = struct.unpack_from("<BBH", cubin, place)
            place += 4
            if form not in ONLY_KEY and form != SIZED:
                raise ValueError(f"an attribute of the unknown form {form}")
            if form == SIZED and value == 8:
                found[attribute] = max(found.get(attribute, 0), struct.unpack_from("<II", cubin, place)[1])
            place += value if form == SIZED else 0
    return found


def compile_kernel(number: int, kernel: Any, configuration: Any, most_shared: int) -> Cubin:
    """A kernel of `fake_inductor` in a configuration. A failure is noted, not raised."""
    cubin = Cubin(number, kernel.name, kernel.part, str(configuration))
    try:
        compiled = kernel.autotuner._precompile_config(configuration).kernel
        found = attributes(compiled.asm["cubin"])
        cubin.registers, cubin.spills = found.get(REGISTERS, 0), found.get(FRAME_SIZE, 0)
        cubin.shared = compiled.metadata.shared
        if cubin.shared > most_shared:
            cubin.failed = f"{cubin.shared} bytes of shared memory, the card has {most_shared}"
    except Exception as error:  # Triton's, LLVM's or ptxas's: whatever it is, this kernel cannot run
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        cubin.failed = f"{type(error).__name__}: {lines[-1][:160] if lines else ''}"
    return cubin


def compile_kernels(kernels: Iterable[Any], most_shared: int, say: Callable[[str], None]) -> list[Cubin]:
    """All kernels in all configurations; `say` gets what is being done."""
    kernels, cubins = list(kernels), []
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # of a failure inductor prints the whole source
    try:
        for number, kernel in enumerate(kernels):
            say(f"kernel {number + 1} of {len(kernels)}")
            cubins += [compile_kernel(number, kernel, each, most_shared) for each in kernel.configurations]
    finally:
        logging.disable(level)
    return cubins
