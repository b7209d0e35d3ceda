"""A GPU that is not there: torch answers for one, tensors on it have no content, and their bytes are counted.

    gpu = FakeGPU(CARDS["h100"], devices=8)
    with gpu.mode:                         # all tensors are fake: shapes, dtypes and devices, no numbers
        train_gpt.main([...])
    gpu.mode.peak, gpu.mode.take()         # the most bytes that were alive; what was done since the last time

On a CUDA build of torch, with `cards.false_driver` loaded before it, the tensors are on the device "cuda". On
a CPU build, whose autograd knows no such device, they are on "cpu", and nobody sees whether all are on one.
"""

from __future__ import annotations

import collections
import functools
import importlib
import math
import types
import weakref
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves

from lib.cards import OUTSIDE, Card

# The private names without which nothing can be counted: module, then what must be there.
NAMES = (
    ("torch._subclasses.fake_tensor", "FakeTensor.fake_device"),
    ("torch._subclasses.fake_tensor", "FakeTensorMode.dispatch"),
    ("torch._subclasses.fake_tensor", "FakeTensorMode.avoid_device_init"),
    ("torch._subclasses.fake_tensor", "init_gpu_context"),
    ("torch.utils._python_dispatch", "_disable_current_modes"),
    ("torch.testing._internal.distributed.fake_pg", "FakeStore"),
)

BLOCK = 512  # bytes: the allocator of torch gives memory in multiples of it
ATTENTION = ("varlen_attn", "flash_attention")  # in the names of the operations that attend
GRADIENTS = ("aten._to_copy.default", "aten.add_.Tensor")  # operations that add a gradient to those before
LIKE = ("_like.", "new_zeros", "new_ones", "new_full")  # in the names of those that read only a shape
# In the names of operations that touch no bytes, or whose bytes are counted as communication.
FREE = ("empty", "detach", "alias", "_unsafe_view", "_assert", "sym_", "prim.", "c10d.")


def missing_names(names: Sequence[tuple[str, str]] = NAMES) -> list[str]:
    """The names that this torch or Triton does not have."""

    def found(module: str, name: str) -> bool:
        try:
            functools.reduce(getattr, name.split("."), importlib.import_module(module))
        except (ImportError, AttributeError):
            return False
        return True

    return [f"{module}.{name}" for module, name in names if not found(module, name)]


def footprint(x: Tensor) -> int:
    """Bytes that a kernel reads of a tensor once: an expanded dimension counts once."""
    sizes = [size for size, stride in zip(x.shape, x.stride()) if stride != 0]
    return math.prod(sizes) * x.element_size()


def place_of(x: Tensor) -> tuple:
    """Where its elements lie: a matrix and its transpose are one operand."""
    return x.untyped_storage()._cdata, x.storage_offset(), *sorted(zip(x.stride(), x.shape))


def product_operations(func: Any, args: tuple, out: Any) -> tuple[str, float]:
    """The kind of a matrix product and its operations; "" for what is none."""
    name = func.overloadpacket.__name__
    at = {"mm": 0, "bmm": 0, "_scaled_mm": 0, "addmm": 1, "baddbmm": 1}.get(name)
    if at is None:
        return "", 0.0
    left = args[at]
    kind = {1: "products in FP8", 2: "products", 4: "products in fp32"}[left.element_size()]
    return kind, 2.0 * out.numel() * left.size(-1)


class CountingMode(FakeTensorMode):
    """Fake tensors on one device, whose live bytes, products and moved bytes are counted.

    `counts` has bytes and operations by (part, what). `part` says which graph is running: outside of graphs
    an operation reads each input once and writes each output once; in a graph only what is no Triton kernel
    passes here. A number that only a device could know is 0.

    While `accumulating`, what adds gradients outside of graphs is counted by itself, as one pass of a kernel:
    a cast goes with the addition that reads its result.
    """

    def __init__(self, device_type: str):
        super().__init__(allow_non_fake_inputs=True)
        self.device_type = device_type
        self.alive: dict[int, tuple[Any, int]] = {}  # storage -> (reference, bytes)
        self.live = self.peak = 0
        self.part = OUTSIDE
        self.counts: collections.Counter = collections.Counter()
        self.inside = False  # an operation that is made of others is counted as one
        self.accumulating = False
        self.casts: dict[int, int] = {}  # storage of a cast's result -> its bytes

    def take(self) -> collections.Counter:
        """What was counted since the last time; the peak begins anew."""
        counts, self.counts = self.counts, collections.Counter()
        self.peak = self.live
        return counts

    def note_storage(self, x: Tensor) -> None:
        """Count a storage from now until it is freed."""
        if not isinstance(x, FakeTensor) or x.fake_device.type != self.device_type:
            return
        storage = x.untyped_storage()
        key, size = storage._cdata, -(-storage.nbytes() // BLOCK) * BLOCK
        if key in self.alive:
            return

        def freed(_: Any) -> None:
            if self.alive.pop(key, None) is not None:
                self.live -= size

        self.alive[key] = weakref.ref(storage, freed), size
        self.live += size
        self.peak = max(self.peak, self.live)

    def note_work(self, func: Any, args: tuple, kwargs: dict, out: Any) -> None:
        """Count the operations of a product, and the bytes that an operation reads and writes."""
        name = str(func)
        if func.is_view or any(word in name for word in FREE):
            return
        self.counts[self.part, "operations"] += 1
        kind, operations = product_operations(func, args, kwargs.get("out", out))
        if kind:
            self.counts[self.part, kind] += operations
        fills = any(word in name for word in LIKE)
        given = {key: x for key, x in kwargs.items() if key != "out"}
        read = {place_of(x): x for x in tree_leaves((args, given)) if isinstance(x, Tensor) and not fills}
        written = {place_of(x): x for x in tree_leaves(out) if isinstance(x, Tensor)}
        if func._schema.is_mutable and not written:  # updates its arguments and returns none of them
            written = read
        attends = any(word in name for word in ATTENTION)
        if attends:
            self.counts[self.part, "attention backward" if "backward" in name else "attention forward"] += 1
        moved = sum(map(footprint, [*read.values(), *written.values()]))
        what = "bytes of products" if kind else "bytes of attention" if attends else "bytes"
        if self.accumulating and self.part == OUTSIDE and name in GRADIENTS:
            what = "bytes of gradients"
            moved -= self.saved_by_fusion(name, args, out)
        self.counts[self.part, what] += moved

    def saved_by_fusion(self, name: str, args: tuple, out: Tensor) -> int:
        """Bytes that are not moved where a cast and the addition of its result are one kernel."""
        if "add_" not in name:
            self.casts[out.untyped_storage()._cdata] = footprint(out)
            return 0
        return 2 * self.casts.pop(args[1].untyped_storage()._cdata, 0)  # neither written nor read

    def dispatch(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.ops.aten._local_scalar_dense.default:
            dtype = args[0].dtype
            return False if dtype == torch.bool else 0.0 if dtype.is_floating_point else 0
        if func is torch.ops.aten._scaled_mm.out:  # the form of generated code; it has no rule for shapes
            out = kwargs.pop("out")
            with self:
                made = torch.ops.aten._scaled_mm.default(*args, **kwargs)
            assert (made.shape, made.dtype) == (out.shape, out.dtype)
            return out
        if self.inside:
            return super().dispatch(func, types, args, kwargs)
        self.inside = True
        try:
            out = super().dispatch(func, types, args, kwargs)
        finally:
            self.inside = False
        self.note_work(func, args, kwargs, out)
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self.note_storage(x)
        return out


def answers(card: Card, devices: int) -> list[tuple[Any, dict[str, Any]]]:
    """What torch is to answer for the card: (module, {name of a function: its result})."""
    current = torch.device("cuda", 0)
    properties = types.SimpleNamespace(
        name=card.title, major=card.capability[0], minor=card.capability[1], total_memory=int(card.memory),
        multi_processor_count=card.processors, warp_size=32, regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=1536 if card.capability in ((8, 9), (12, 0)) else 2048,
        max_threads_per_block=1024, shared_memory_per_block=49152,
        shared_memory_per_block_optin=card.shared, shared_memory_per_multiprocessor=card.shared + 1024,
        L2_cache_size=card.cache, gcnArchName="", is_integrated=False, is_multi_gpu_board=False,
        clock_rate=1, memory_clock_rate=1, memory_bus_width=1, uuid="", pci_bus_id=0, pci_device_id=0,
        pci_domain_id=0,
    )  # fmt: skip
    stream = types.SimpleNamespace(
        cuda_stream=0, stream_id=0, device_index=0, device_type=1, device=current, synchronize=lambda: None
    )
    of_cuda = dict(
        is_available=True, device_count=devices, _device_count_nvml=devices, current_device=0,
        is_initialized=True, init=None, _lazy_init=None, set_device=None, synchronize=None, empty_cache=None,
        get_device_properties=properties, _get_device_properties=properties,
        get_device_capability=card.capability, get_device_name=card.title,
        is_bf16_supported=True, is_current_stream_capturing=False, max_memory_allocated=0,
        memory_allocated=0, reset_peak_memory_stats=None, _exchange_device=0, _maybe_exchange_device=0,
        get_arch_list=[], set_rng_state=None, manual_seed=None, manual_seed_all=None,
        current_stream=stream, default_stream=stream,
    )  # fmt: skip
    of_c = dict(
        _cuda_getCurrentRawStream=0, _cuda_getDevice=0, _cuda_setDevice=None, _cuda_exchangeDevice=0,
        _cuda_maybeExchangeDevice=0, _cuda_getDeviceCount=devices, _cuda_synchronize=None,
        _cuda_isCurrentStreamCapturing=False, _cuda_init=None, _get_accelerator=torch.device("cuda"),
    )  # fmt: skip
    of_accelerator = dict(
        is_available=True, device_count=devices, current_accelerator=torch.device("cuda"), synchronize=None,
        set_device_index=None, set_device_idx=None, current_device_index=0, max_memory_allocated=0,
    )  # fmt: skip
    return [(torch.cuda, of_cuda), (torch._C, of_c), (torch.accelerator, of_accelerator)]


class NoGuard:
    """In place of torch.cuda.device: there is one device, and it is always the current one."""

    def __init__(self, *_: Any):
        self.idx = self.prev_idx = 0

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: Any) -> bool:
        return False


class FakeGPU:
    """Makes this process one of a machine with such cards; nothing of it is undone."""

    def __init__(self, card: Card, devices: int, on_cpu: bool = False):
        self.card, self.devices = card, devices
        self.mode = CountingMode("cpu" if on_cpu else "cuda")
        FakeTensor.data_ptr = lambda x: x.untyped_storage()._cdata + x.storage_offset() * x.element_size()
        if not on_cpu:
            self.answer_for_cuda()

    def answer_for_cuda(self) -> None:
        for module, results in answers(self.card, self.devices):
            for name, result in results.items():
                if hasattr(module, name) or name == "_get_device_properties":  # made by CUDA's initialisation
                    setattr(module, name, lambda *_, result=result, **__: result)
        torch.cuda.get_rng_state = lambda *_, **__: torch.random.get_rng_state()
        torch.cuda.device = torch.cuda._DeviceGuard = NoGuard
        torch.Tensor.pin_memory = lambda x, *_, **__: x
        fake_tensor.init_gpu_context = lambda _: None
        FakeTensorMode.avoid_device_init = property(lambda _: True)


# ---- several processes of which only this one exists


def sent_by(name: str, size: int, ranks: int) -> float:
    """Bytes that a rank sends in a collective over tensors of `size` bytes in all, by a ring."""
    share = (ranks - 1) / ranks
    return {"all_reduce": 2 * share, "broadcast": 1.0}.get(name, share) * size


def fake_ranks(train_gpt: Any, ranks: int, log: list[tuple[str, str, int, float]]) -> None:
    """torch.distributed with so many ranks; the log gets (name, dtype, bytes, bytes sent) of each call."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    join = dist.init_process_group

    def init_process_group(backend: str, **_: Any) -> None:
        join("fake", store=FakeStore(), rank=0, world_size=ranks)

    def all_gather_object(found: list, x: Any, **_: Any) -> None:
        """All ranks are like this one."""
        found[:] = [x] * len(found)

    dist.init_process_group = init_process_group
    dist.all_gather_object = all_gather_object
    dist.rendezvous = lambda *_, **__: iter([(dist.HashStore(), 0, ranks)])
    dist.get_default_backend_for_device = lambda _: "fake"
    train_gpt.on_rank_0 = lambda _, work: work()
    train_gpt.watch = lambda *_: None
    tensor_collectives = ("reduce_scatter_single", "reduce_scatter_tensor", "all_gather_single")
    others = ("all_gather_into_tensor", "all_to_all_single", "all_reduce", "broadcast")
    for name in (*tensor_collectives, *others):
        if hasattr(dist, name):
            setattr(dist, name, noting(name, getattr(dist, name), ranks, log))


def noting(name: str, collective: Any, ranks: int, log: list) -> Any:
    """A collective that is noted before it is called."""

    def call(*args: Any, **kwargs: Any) -> Any:
        largest = max((x for x in args if isinstance(x, Tensor)), key=torch.numel)
        size = largest.numel() * largest.element_size()
        log.append((name, str(largest.dtype).removeprefix("torch."), size, sent_by(name, size, ranks)))
        return collective(*args, **kwargs)

    return call
