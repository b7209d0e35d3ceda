"""torch.compile for a GPU that is not there: inductor writes its kernels, their launches are counted.

    compiler = FakeCompiler(gpu)      # before the model is compiled
    ... run ...                       # generated wrappers run as they are, on fake tensors
    compiler.kernels                  # every Triton kernel with its launches and bytes
    cubins.compile_kernels(...)       # down to the machine's code: registers, spills, shared memory

It leans on the private names of torch and Triton in NAMES. Where one of them is gone, this is left out.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import types
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from lib.fake_gpu import FakeGPU, footprint

# The private names without which it cannot work: module, then what must be there.
NAMES = (
    ("torch._inductor.compile_fx", "compile_fx"),
    ("torch._inductor.compile_fx", "compile_fx_inner"),
    ("torch._inductor.output_code", "CompiledFxGraph.__call__"),
    ("torch._inductor.codegen.triton", "TritonKernel.codegen_kernel"),
    ("torch._inductor.codegen.triton", "TritonKernel.estimate_kernel_num_bytes"),
    ("torch._inductor.codegen.triton", "TritonKernel.inductor_meta_common"),
    ("torch._inductor.codegen.simd_kernel_features", "SIMDKernelFeatures.scheduler_nodes"),
    ("torch._inductor.dependencies", "MemoryDep.is_indirect"),
    ("torch._inductor.fx_passes.joint_graph", "UniformValueConstantFolder._deduce_value"),
    ("torch._inductor.fx_passes.pad_mm", "_should_pad"),
    ("torch._inductor.runtime.triton_helpers", "set_driver_to_gpu"),
    ("torch._inductor.runtime.triton_heuristics", "CachingAutotuner.precompile"),
    ("torch._inductor.runtime.triton_heuristics", "CachingAutotuner.run"),
    ("torch._C._dynamo.guards", "_empty_strided_cuda"),
    ("torch._C._dynamo.guards", "_reinterpret_tensor"),
    ("triton.backends.compiler", "GPUTarget"),
    ("triton.runtime", "driver.set_active"),
)
CACHES = (  # of inductor, which would ask the device or leave the compiling out
    "fx_graph_cache", "use_static_cuda_launcher", "use_static_triton_launcher", "autotune_local_cache",
    "bundle_triton_into_fx_graph_cache",
)  # fmt: skip


class Kernel:
    """A Triton kernel that inductor has written."""

    def __init__(self, autotuner: Any, part: str):
        self.autotuner, self.part = autotuner, part
        self.name = autotuner.inductor_meta.get("kernel_name", "?")
        self.configurations = list(autotuner.configs)
        self.launches = 0
        self.bytes = 0.0  # of all launches: the fewest
        self.by_inductor = 0.0  # the same by inductor, which counts what is read again


class FakeCompiler:
    """Stands between torch.compile, inductor and Triton; nothing of it is undone."""

    def __init__(self, gpu: FakeGPU):
        self.gpu = gpu
        self.kernels: dict[int, Kernel] = {}  # by the id of their autotuner
        self.padding: list[tuple] = []  # products for which a real card is asked whether to pad them
        self.settings()
        self.without_device()
        self.count_kernels()
        self.allocate_fake()
        self.name_graphs()

    def settings(self) -> None:
        import torch._functorch.config
        import torch._inductor.config as config

        config.compile_threads = 1
        torch._functorch.config.enable_autograd_cache = False
        for name in CACHES:
            if hasattr(config, name):
                setattr(config, name, False)

    def without_device(self) -> None:
        """The three places in which inductor asks the device while it compiles, and Triton's driver."""
        from torch._inductor.fx_passes import joint_graph, pad_mm
        from torch._inductor.runtime import triton_helpers
        from triton.runtime import driver

        folder = joint_graph.UniformValueConstantFolder
        folder._deduce_value = functools.partialmethod(deduce_on_cpu, folder._deduce_value)
        pad_mm._should_pad = functools.partial(never_pad, pad_mm._should_pad, self.padding)
        triton_helpers.set_driver_to_gpu = lambda: None
        driver.set_active(false_triton_driver(self.gpu))

    def count_kernels(self) -> None:
        """Kernels are kept instead of compiled, and counted instead of launched."""
        from torch._inductor.codegen.triton import TritonKernel
        from torch._inductor.runtime import triton_heuristics as heuristics

        write, describe = TritonKernel.codegen_kernel, TritonKernel.inductor_meta_common
        writing = []

        def codegen_kernel(kernel: Any, *args: Any, **kwargs: Any) -> str:
            writing.append(kernel)
            try:
                return write(kernel, *args, **kwargs)
            finally:
                writing.pop()

        def inductor_meta_common(*_: Any) -> dict:
            if not writing:
                return describe()
            estimate = float(writing[-1].estimate_kernel_num_bytes())
            return {**describe(), "dry_run_bytes": estimate, "dry_run_least": least_bytes(writing[-1])}

        def precompile(autotuner: Any, *_: Any, **__: Any) -> None:
            self.kernels.setdefault(id(autotuner), Kernel(autotuner, self.gpu.mode.part))

        def run(autotuner: Any, *args: Any, stream: Any = None, **__: Any) -> None:
            kernel = self.kernels[id(autotuner)]
            kernel.launches += 1
            # what is changed in place is read and written
            times = [2 if name.startswith("in_out") else 1 for name in autotuner.triton_meta["signature"]]
            arguments = sum(n * footprint(x) for n, x in zip(times, args) if isinstance(x, Tensor))
            meta = autotuner.inductor_meta
            by_inductor, least = (meta.get(name) for name in ("dry_run_bytes", "dry_run_least"))
            by_inductor = arguments if by_inductor is None else by_inductor
            least = arguments if least is None else min(arguments, least)
            kernel.bytes += least
            kernel.by_inductor += by_inductor
            counts, part = self.gpu.mode.counts, self.gpu.mode.part
            counts[part, "launches"] += 1
            counts[part, "bytes of kernels"] += least
            counts[part, "bytes of arguments"] += arguments
            counts[part, "bytes by inductor"] += by_inductor

        TritonKernel.codegen_kernel = codegen_kernel
        TritonKernel.inductor_meta_common = staticmethod(inductor_meta_common)
        heuristics.CachingAutotuner._make_launchers = lambda _: None
        for autotuner in (heuristics.CachingAutotuner, *heuristics.CachingAutotuner.__subclasses__()):
            autotuner.precompile, autotuner.run = precompile, run

    def allocate_fake(self) -> None:
        """The allocations of generated code are fake ones."""
        guards, gpu = torch._C._dynamo.guards, self.gpu

        def empty_strided(size: Any, stride: Any, dtype: torch.dtype) -> Tensor:
            with gpu.mode:
                return torch.empty_strided(size, stride, dtype=dtype, device="cuda:0")

        guards._empty_strided_cuda = empty_strided
        guards._reinterpret_tensor = lambda x, size, stride, offset=0: x.as_strided(size, stride, offset)

    def name_graphs(self) -> None:
        """torch.compile, whose graphs know the method that they were made of while they run."""
        from torch._inductor.compile_fx import compile_fx, compile_fx_inner
        from torch._inductor.output_code import CompiledFxGraph

        gpu, run_graph, make = self.gpu, CompiledFxGraph.__call__, torch.compile

        @contextlib.contextmanager
        def running(part: str) -> Any:
            before, gpu.mode.part = gpu.mode.part, part
            try:
                yield
            finally:
                gpu.mode.part = before

        def call_graph(graph: Any, inputs: Any) -> Any:
            with running(getattr(graph, "dry_run_part", gpu.mode.part)):
                return run_graph(graph, inputs)

        def compile(model: Any, **options: Any) -> Callable:
            part = model.__name__

            def inner(*args: Any, **kwargs: Any) -> Any:
                with running(part):
                    graph = compile_fx_inner(*args, **kwargs)
                graph.dry_run_part = part
                return graph

            def backend(module: Any, inputs: Any) -> Any:
                return compile_fx(module, inputs, inner_compile=inner)

            compiled = make(model, backend=backend, **options)

            @functools.wraps(model)
            def call(*args: Any, **kwargs: Any) -> Any:
                with _disable_current_modes():  # dynamo makes a fake mode of its own
                    return compiled(*args, **kwargs)

            return call

        CompiledFxGraph.__call__ = call_graph
        torch.compile = compile


def least_bytes(kernel: Any) -> float | None:
    """Bytes of the elements that a kernel reads and writes, each once; None where sizes are dynamic."""
    from torch._inductor.virtualized import V

    gone = V.graph.removed_buffers | kernel.removed_buffers
    accesses = [node.read_writes for node in kernel.features.scheduler_nodes()]
    written = {dep.name for node in accesses for dep in node.writes}
    found: dict[tuple, Counter] = defaultdict(Counter)  # of a buffer and a way: elements by the first one
    try:
        for node in accesses:
            # what the kernel itself has written it does not read again
            read = [dep for dep in node.reads if dep.name not in written]
            for (name, way), deps in by_buffer([("read", read), ("write", node.writes)]).items():
                # nodes that begin at the same element go over the same ones
                first, elements = min(x for x, _ in deps), sum(x for _, x in deps)
                found[name, way][first] = max(found[name, way][first], elements)
        kept = {key: sum(parts.values()) for key, parts in found.items() if key[0] not in gone}
        return float(sum(
            min(elements, int(V.graph.get_numel(name))) * V.graph.get_dtype(name).itemsize
            for (name, _), elements in kept.items()
        ))  # fmt: skip
    except TypeError:  # a symbol is no number
        return None


def by_buffer(ways: list[tuple[str, Any]]) -> dict[tuple[str, str], set[tuple[int, int]]]:
    """(first element, count of elements) of the accesses to each buffer, by (its name, the way)."""
    found: dict[tuple[str, str], set[tuple[int, int]]] = defaultdict(set)
    for way, deps in ways:
        for dep in deps:
            if not hasattr(dep, "var_names"):  # all of it
                found[dep.name, way].add((0, int(dep.get_numel())))
            elif dep.is_indirect():  # rows of a table
                found[dep.name, way].add((0, int(math.prod(dep.size))))
            else:  # of what is broadcast or sliced, only what is there
                first = dep.index.subs(dict.fromkeys(dep.index.free_symbols, 0))
                found[dep.name, way].add((int(first), int(dep.get_numel())))
    return found


def deduce_on_cpu(folder: Any, deduce: Callable, node: Any) -> Any:
    """A constant is folded on the CPU: inductor would make a tensor of one element on the device."""
    device = node.kwargs.get("device") if node.op == "call_function" else None
    if device is None or torch.device(device).type != "cuda":
        return deduce(folder, node)
    if node.target is torch.ops.aten.full.default and len(node.args) == 2:
        value = folder.fetch_args_kwargs_from_env(node)[0][1]
        if not isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return torch.full([1], value, dtype=node.kwargs.get("dtype"))
    return folder.unknown_value


def never_pad(should_pad: Callable, asked: list, *args: Any, **kwargs: Any) -> bool:
    """Whether to pad a product is measured on a device; here the question is noted, and the answer is no."""

    class Measured(Exception):
        pass

    def measure(*_: Any, **__: Any) -> None:
        raise Measured

    randn, torch.randn = torch.randn, measure
    try:
        return should_pad(*args, **kwargs)
    except Measured:
        bound = inspect.signature(should_pad).bind(*args, **kwargs).arguments
        asked.append(tuple(str(tuple(bound[name].shape)) for name in ("mat1", "mat2")))
        return False
    finally:
        torch.randn = randn


def false_triton_driver(gpu: FakeGPU) -> Any:
    """What Triton asks of a driver in order to compile for the card."""
    from triton.backends.compiler import GPUTarget

    major, minor = gpu.card.capability
    target = GPUTarget("cuda", 10 * major + minor, 32)
    properties = dict(
        max_shared_mem=gpu.card.shared, multiprocessor_count=gpu.card.processors, max_num_regs=65536,
        warpSize=32, sm_clock_rate=1, mem_clock_rate=1, mem_bus_width=1,
    )  # fmt: skip
    return types.SimpleNamespace(
        get_current_target=lambda: target,
        get_current_device=lambda: 0,
        get_current_stream=lambda device=0: 0,
        get_active_torch_device=lambda: torch.device("cuda", 0),
        utils=types.SimpleNamespace(get_device_properties=lambda device: properties),
    )
