"""MuonEq on several gloo processes against the same class in one process.

A step has ROWS rows of tokens with one gradient each; a rank holds the sum over its rows, so the reduced
gradient does not depend on the number of ranks. Each world size starts its processes once, from a fork
server that has imported torch, and runs every case in a process group of its own: a failing case cannot
hang or disturb the others.
"""

import contextlib
import copy
import datetime
import functools
import math
import multiprocessing
import time
import traceback
from dataclasses import dataclass, field
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from train_gpt import MuonEq

ROWS = 12  # divisible by every world size
WORLDS = (1, 2, 3, 4)
STEPS = 5
TIMEOUT, DEADLINE = 20, 90  # seconds for a collective, and for all cases of a world size: what hangs, fails

MATRIX = dict(
    kind="matrix",
    lr=0.02,
    weight_decay=0.1,
    cautious=True,
    momentum=0.9,
    nesterov=True,
    equilibrate="row",
    equilibrate_exponent=-0.5,
    phase=None,
    orthogonalize="polar_express",
    steps=5,
    norm_bound="frobenius",
    normuon=True,
    normuon_axis="auto",
    beta2=0.9,
    scale="spectral",
    lr_mul=1.0,
    work_dtype=torch.float32,
    every=1,
)
ADAM = dict(kind="adam", lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, cautious=True, every=1)
ROWWISE = ADAM | dict(betas=(0.0, 0.9), rowwise=True)
FP32, BF16 = torch.float32, torch.bfloat16


@dataclass(frozen=True)
class Case:
    """Groups given as dicts with `shapes` for `params`. `whole`: gradients are small integers, so sums
    are exact. `few`: most rows have no gradient, other ones on each rank. `absent`: (rank, parameter index)
    pairs without a gradient, rank -1 being the last one and None every rank."""

    groups: tuple
    grads: str = "token_sum"
    dtypes: tuple = (FP32,)
    steps: int = STEPS
    whole: bool = False
    few: bool = False
    absent: tuple = ()
    resting: str = ""  # name of a parameter that rests before step 3
    named: bool = True
    extra: dict = field(default_factory=dict)


LIST = MATRIX | dict(shapes=[(4, 6)] * 5)
BANK = MATRIX | dict(shapes=[(7, 6, 4)])
SMALL = MATRIX | dict(shapes=[(5, 5)])  # fewer matrices than ranks
TABLES = ADAM | dict(shapes=[(7, 3), (5,), (), (2, 3, 4), (4099,)])
MIXED_SHAPES = MATRIX | dict(shapes=[(4, 6), (6, 4), (3, 4, 6), (6, 4), (4, 6)], lr_mul=tuple(range(1, 8)))
EVERYTHING = (LIST, BANK, SMALL, TABLES, MIXED_SHAPES)
LARGE = ADAM | dict(shapes=[(16387,)])  # an odd number of elements
# padded at some world sizes, fewer rows than ranks, no padding; rows of a bank
ROW_TABLES = ROWWISE | dict(shapes=[(47, 3), (3, 5), (24, 4), (2, 11, 6)])
EVEN = (MATRIX | dict(shapes=[(12, 4, 6)]), ADAM | dict(shapes=[(24, 768)]))  # no padding at any world size


def fancy(group):
    return group | dict(
        equilibrate="rowcol", phase=3, norm_bound="spc", scale="match_rms_adamw", nesterov=False
    )


def two_sided(group):
    return group | dict(equilibrate="both")


CASES = {
    "list": Case((LIST,)),
    "bank": Case((BANK,)),
    "adam": Case((TABLES, LARGE)),
    "even": Case(EVEN, steps=3),
    "even_mean": Case(EVEN, grads="mean", steps=3),
    "even_bf16": Case(EVEN, dtypes=(BF16,), whole=True, steps=3),
    "everything": Case(EVERYTHING, named=False),
    "mean": Case(EVERYTHING, grads="mean"),
    "fancy": Case(tuple(fancy(g) if g["kind"] == "matrix" else g for g in EVERYTHING)),
    "both": Case((two_sided(LIST), two_sided(BANK), two_sided(SMALL))),
    "callable": Case((LIST | dict(orthogonalize=torch.sign), BANK | dict(orthogonalize=torch.sign))),
    "every": Case((LIST, LIST | dict(every=2), TABLES | dict(every=3), TABLES), steps=7),
    "every_mean": Case((LIST, BANK | dict(every=2), TABLES | dict(every=3)), grads="mean", steps=7),
    "resting": Case((TABLES, LARGE), resting="p5"),
    "rows": Case((ROW_TABLES, LIST), few=True),
    "rows_that_all_decay": Case((ROW_TABLES | dict(cautious=False),), few=True),
    "rows_every_mean": Case((ROW_TABLES | dict(every=2),), grads="mean", few=True, steps=6),
    "rows_bf16": Case((ROW_TABLES,), dtypes=(BF16,), whole=True, few=True),
    "bf16": Case(EVERYTHING, dtypes=(BF16,), whole=True),
    "bf16_and_fp32": Case(EVERYTHING, dtypes=(BF16, FP32, FP32), whole=True),
    "bf16_mean": Case(EVERYTHING, grads="mean", dtypes=(BF16,), whole=True),
    "bf16_work": Case((LIST | dict(work_dtype=BF16), BANK | dict(work_dtype=BF16))),
    "absent": Case(
        (LIST, BANK, TABLES), absent=((0, 0), (-1, 1), (None, 2), (0, 5), (None, 6), (-1, 7), (0, 9))
    ),
    "absent_bank_and_every": Case(
        (BANK | dict(every=2), TABLES | dict(every=2)), absent=((None, 0), (0, 1)), steps=4
    ),
    "absent_rows": Case((ROW_TABLES,), few=True, absent=((None, 0), (0, 1), (-1, 2))),
    "absent_mean": Case((LIST, BANK, TABLES), grads="mean", absent=((None, 1), (None, 5), (None, 6))),
}
RESUME = {
    "resume": Case(
        (fancy(MIXED_SHAPES), two_sided(BANK), SMALL, TABLES | dict(every=2)), dtypes=(FP32, BF16), whole=True
    ),
    "resume_rows": Case(
        (ROW_TABLES | dict(every=2), ROW_TABLES), dtypes=(FP32, BF16), whole=True, few=True
    ),
    "resume_mean": Case((fancy(MIXED_SHAPES), BANK, TABLES), grads="mean", named=False),
}
SAVED_AT, SAVED_STEPS, ALL_STEPS = 2, 4, 8  # world size and step of the checkpoint, end of the run
LOOSE = {"bf16_work": 2e-3}  # a batched bfloat16 product may round differently in another batch size


# --------------------------------------------------------------------------------------------------
# One run of a case, on any number of ranks


def randn(shape, *key):
    seed = functools.reduce(lambda a, b: 1009 * a + b, key, 1)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tokens_of(step):
    return ROWS * (10 + 7 * (step % 3))


def local_gradient(case, param, index, step, rank, world):
    """Sum over the rows of this rank; in "mean" mode the mean over all tokens, the same on every rank."""
    if any(i == index and r in (None, rank, rank - world) for r, i in case.absent):
        return None
    share = ROWS // world
    rows = range(ROWS) if case.grads == "mean" else range(rank * share, (rank + 1) * share)
    each = [randn(param.shape, step, row, index) for row in rows]
    if case.few:
        each = [g * (randn((*g.shape[:-1], 1), step, row, index, 5) > 1.7) for g, row in zip(each, rows)]
    total = sum(g.mul(2).round().clamp(-8, 8) if case.whole else g for g in each)
    return (total / (64 if case.whole else tokens_of(step)) if case.grads == "mean" else total).to(
        param.dtype
    )


def build(case, weights=None):
    params, groups = [], []
    for group in case.groups:
        group, first = dict(group), len(params)
        for shape in group.pop("shapes"):
            index = len(params)
            start = randn(shape, 77, index) if weights is None else weights[index]
            params.append(start.to(case.dtypes[index % len(case.dtypes)]).clone().requires_grad_())
        chunk = [(f"p{first + i}", p) for i, p in enumerate(params[first:])] if case.named else params[first:]
        groups.append(group | dict(params=chunk))
    return params, MuonEq(groups, grads=case.grads)


def run(case, rank=0, world=1, first=0, last=None, checkpoint=None):
    """Weights after each step, and the final state."""
    params, opt = build(case, checkpoint and checkpoint["weights"])
    if checkpoint:
        opt.load_state_dict(checkpoint["state"])
    history, calls = [], []
    for step in range(first, case.steps if last is None else last):
        for index, p in enumerate(params):
            g = local_gradient(case, p, index, step, rank, world)
            if g is not None:
                p.grad = g.to(p.grad_dtype) if p.grad is None else p.grad + g
        before = [None if p.grad is None else p.grad.clone() for p in params]
        opt.resting = [case.resting] if case.resting and step < 3 else []
        opt.step(tokens=tokens_of(step) if case.grads == "token_sum" else None)
        assert all(g is None or torch.equal(g, p.grad) for g, p in zip(before, params, strict=True)), (
            "gradient changed"
        )
        opt.zero_grad()
        history.append([p.detach().clone() for p in params])
        calls.append(opt.comm.calls)
    return dict(history=history, weights=history[-1], calls=calls, state=opt.state_dict())


def large_and_small(rank, world):
    """256 on rank 0 and 1 elsewhere: the sum needs more bits than bfloat16 has."""
    params = [torch.ones(2, 4, 4, dtype=BF16).requires_grad_(), torch.ones(7, dtype=BF16).requires_grad_()]
    groups = [MATRIX | dict(params=params[:1]), ADAM | dict(params=params[1:])]
    opt = MuonEq(groups, grads="token_sum")
    for p in params:
        p.grad = torch.full_like(p, 256.0 if rank == 0 else 1.0, dtype=p.grad_dtype)
    opt.step(tokens=10)
    return opt.state_dict()["state"]


def sent(rank, world):
    """What travels of a table in a step in which each rank reads row 5 and one of its own."""
    table = torch.ones(600, 4).requires_grad_()
    opt = MuonEq([ROWWISE | dict(params=[table])], grads="token_sum")
    table.grad, seen, real = torch.zeros(600, 4), [], dist.all_to_all_single
    table.grad[[5, 7 + rank]] = 1.0

    def noting(received, rows, *args, **options):
        seen.append(tuple(rows.shape))
        return real(received, rows, *args, **options)

    with mock.patch.object(dist, "all_to_all_single", noting):
        opt.step(tokens=10)
    moved = (table != 1).any(1).nonzero().flatten().tolist()
    return dict(sent=seen, moved=moved)


DIFFERENCES = {
    "name": (("a", (4, 6), FP32), ("b", (4, 6), FP32)),
    "shape": (("a", (4, 6), FP32), ("a", (6, 4), FP32)),
    "dtype": (("a", (4, 6), FP32), ("a", (4, 6), BF16)),
}


def different_ranks(rank, world):
    """What is said when the last rank has another parameter, at construction and later."""
    said = []
    for pair in DIFFERENCES.values():
        name, shape, dtype = pair[rank == world - 1]
        group = MATRIX | dict(params=[(name, torch.zeros(shape, dtype=dtype))])
        same = ADAM | dict(params=[("same", torch.zeros(3))])
        later = MuonEq([same])
        for build in (MuonEq, later.add_param_group):
            try:
                build(group)
                said.append("nothing")
            except ValueError as error:
                said.append(str(error))
    return dict(said=said)


def apart(rank, world):
    """Each rank an optimizer of its own, of one process; it is copied, not pickled."""
    groups = [dist.new_group([other]) for other in range(world)]
    w = randn((3, 4, 6), rank).requires_grad_()
    opt = MuonEq([MATRIX | dict(params=[w])], process_group=groups[rank])
    outside = MATRIX | dict(params=[torch.zeros(4, 4)])
    said = "nothing"
    try:
        MuonEq([outside], process_group=groups[rank - 1])
    except ValueError as error:
        said = str(error)
    for step in range(2):
        w.grad = randn(w.shape, rank, step)
        opt.step()
    return dict(weights=w.detach(), said=[said], state=copy.deepcopy(opt).state_dict()["state"])


def broadcast(rank, world):
    """bf16 weights that rank 0 changes and sends to all between two steps: the largest before and after."""
    params = [torch.ones(5, 4, 4, dtype=BF16).requires_grad_(), torch.ones(7, dtype=BF16).requires_grad_()]
    opt = MuonEq([MATRIX | dict(params=params[:1], lr=1e-4), ADAM | dict(params=params[1:], lr=1e-4)])
    sizes = []
    for _ in range(2):
        for p in params:
            p.grad = torch.ones_like(p)
        opt.step()
        sizes.append([p.detach().abs().max().item() for p in params])
        for p in params:
            if rank == 0:
                p.data.zero_()
            dist.broadcast(p.detach(), src=0)
    return dict(sizes=torch.tensor(sizes))


# --------------------------------------------------------------------------------------------------
# FSDP2


# name: (shape, kind); dimension 0 is divided as torch.chunk does: on 4 ranks w0 has 2, 2, 1 and no rows
SHARDED = {
    "w0": ((5, 6), "matrix"),
    "w1": ((5, 6), "matrix"),
    "w2": ((5, 6), "matrix"),
    "even": ((12, 4), "matrix"),
    "short": ((2, 7), "matrix"),
    "row": ((1, 4), "matrix"),
    "bank": ((7, 6, 4), "matrix"),
    "small_bank": ((3, 6, 4), "matrix"),
    "of_bank": ((6, 4), "matrix"),
    "frozen": ((5, 6), "matrix"),
    "bias": ((5,), "adam"),
    "embed": ((9, 3), "adam"),
    "gain": ((2,), "adam"),
}
SHARDED_STEPS, SHARDED_SAVED_AT = 20, 10


class Linear(torch.nn.Module):
    """Parameters whose gradients are given: the loss is the sum of their products."""

    def __init__(self, dtype):
        super().__init__()
        for index, (name, (shape, _)) in enumerate(SHARDED.items()):
            p = torch.nn.Parameter(randn(shape, 78, index).to(dtype), requires_grad=name != "frozen")
            self.register_parameter(name, p)

    def forward(self, gradients):
        return sum((getattr(self, name) * g).sum() for name, g in gradients.items())


def given_gradients(step, rank, world, dtype):
    """Those whose mean over ranks does not depend on their number. Some are missing, or zero."""
    found = {}
    for index, (name, (shape, _)) in enumerate(SHARDED.items()):
        rows = range(rank, ROWS, world)
        total = sum(randn(shape, step, row, index).mul(2).round().clamp(-8, 8) for row in rows)
        found[name] = total * world / 64
    # w1 has no gradient in some steps and w2 a zero one; an expert of the bank has none before step 4
    if step % 5 == 1:
        del found["w1"], found["embed"]
    found["w2"] = found["w2"] * (step % 4 != 0)
    if step < 4:
        found["bank"][3] = 0
    return {name: g.to(dtype) for name, g in found.items() if name != "frozen"}


def sharded_optimizer(model, **fields):
    named = dict(model.named_parameters())
    matrices, others = [
        [(name, named[name]) for name in SHARDED if SHARDED[name][1] == kind] for kind in ("matrix", "adam")
    ]
    factors = tuple(1 + k / 20 for k in range(18))
    matrix = fancy(MATRIX) | dict(params=matrices, lr_mul=factors) | fields
    return MuonEq([matrix, ADAM | dict(params=others)])


def train_sharded(model, opt, first, last, rank, world):
    """What the all-to-alls of a step sent to others, in bytes, and how many other collectives there were."""
    sent, others = [0] * SHARDED_STEPS, []
    real = dist.all_to_all_single

    def count(out, given, arriving, counts, group=None, async_op=False):
        away = sum(counts) - counts[dist.get_rank(group)]
        sent[step] += away * given[0].numel() * given.itemsize if len(given) else 0
        return real(out, given, arriving, counts, group=group, async_op=async_op)

    dist.all_to_all_single = count
    try:
        for step in range(first, last):
            dtype = next(model.parameters()).dtype
            model(given_gradients(step, rank, world, dtype)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 8.0)
            opt.param_groups[0]["lr"] = 0.02 * (1 - step / 40)
            calls = opt.comm.calls
            opt.step()
            others.append(opt.comm.calls - calls)
            opt.zero_grad(set_to_none=step % 2 == 0)
    finally:
        dist.all_to_all_single = real
    return sent, others


def whole(named):
    """Copies, of DTensors of the whole tensor; numbers as they are."""
    found = {}
    for name, x in named:
        found[name] = getattr(x, "full_tensor", x.clone)().detach() if torch.is_tensor(x) else x
    return found


def fsdp(rank, world, dtype=FP32, mesh_shape=None, **fields):
    """A model of fully_shard, saved half way by torch's functions.

    With a mesh of two dimensions also its mixed precision, which is exact for these gradients.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    how = {}
    if mesh_shape:
        how["mesh"] = init_device_mesh("cpu", mesh_shape, mesh_dim_names=("copies", "shards"))
        how["mp_policy"] = MixedPrecisionPolicy(param_dtype=BF16, reduce_dtype=FP32)
    model = fully_shard(Linear(dtype), **how)
    opt = sharded_optimizer(model, **fields)
    sent, others = train_sharded(model, opt, 0, SHARDED_SAVED_AT, rank, world)
    full = StateDictOptions(full_state_dict=True)
    saved = dict(
        weights=whole(model.named_parameters()), state=get_optimizer_state_dict(model, opt, options=full)
    )
    more = train_sharded(model, opt, SHARDED_SAVED_AT, SHARDED_STEPS, rank, world)
    sent, others = [a + b for a, b in zip(sent, more[0])], others + more[1]
    return dict(
        weights=whole(model.named_parameters()),
        sent=sent,
        others=others,
        saved=saved,
        state=get_optimizer_state_dict(model, opt, options=full)["state"],
        owned=sum(unit.chunk * unit.tail.numel() for unit in opt.units if unit.matrix),
    )


def fsdp_resumed(rank, world, folder):
    """The second half again, in a new model, from what two ranks saved half way."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict
    from torch.distributed.fsdp import fully_shard

    saved = torch.load(folder / f"fsdp_{SAVED_AT}_0.pt", weights_only=True)["saved"]
    model = fully_shard(Linear(FP32))
    opt = sharded_optimizer(model)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(dtensor(saved["weights"][name], *p.placements, mesh=p.device_mesh))
    set_optimizer_state_dict(model, opt, saved["state"], options=StateDictOptions(full_state_dict=True))
    train_sharded(model, opt, SHARDED_SAVED_AT, SHARDED_STEPS, rank, world)
    # shards into another optimizer, and back
    other = sharded_optimizer(model)
    other.load_state_dict(opt.state_dict())
    states = [{name: whole(x.items()) for name, x in o.state_dict()["state"].items()} for o in (opt, other)]
    return dict(weights=whole(model.named_parameters()), states=states)


def dtensor(value, *placements, mesh=None):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    mesh = mesh or init_device_mesh("cpu", (dist.get_world_size(),))
    return distribute_tensor(value, mesh, placements, src_data_rank=None)


def on_one_rank(rank, world):
    """Only the last rank has gradients, of the rows that it holds; nothing else is there to decay."""
    from torch.distributed.tensor import Shard

    params = [dtensor(randn((8, 3), i), Shard(0)).requires_grad_() for i in range(4)]
    opt = MuonEq([MATRIX | dict(params=params)])
    for step in range(3):
        for i in (0, 1) if rank == world - 1 else ():
            grad = randn((8, 3), i, step)
            params[i].grad = dtensor(grad, Shard(0), mesh=params[i].device_mesh)
        opt.step()
    return dict(weights=whole(enumerate(params)))


def placed(rank, world):
    """What is said to parameters and gradients by their placements, and the numbers of Adam in columns."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    grid = init_device_mesh("cpu", (1, world))
    partial = DTensor.from_local(torch.ones(4, 6), grid, [Replicate(), Partial()], run_check=False)
    shards = {
        "columns": dtensor(torch.ones(4, 6), Shard(1)),
        "twice": dtensor(torch.ones(4, 6), Shard(0), Shard(1), mesh=grid),
        "partial": partial.detach(),
        "rows": dtensor(torch.ones(4, 6), Shard(0)),
    }
    said = {}
    for name, p in shards.items():
        for kind, grads in (("matrix", "mean"), ("adam", "mean"), ("adam", "token_sum")):
            try:
                MuonEq([dict(kind=kind, params=[(name, p)], lr=0.1)], grads=grads)
            except ValueError as error:
                said[f"{name} {kind} {grads}"] = str(error)
    # the copies of a matrix along a dimension of the mesh, and columns for Adam
    params = [dtensor(randn((4, 6), i), x).requires_grad_() for i, x in enumerate((Replicate(), Shard(1)))]
    opt = MuonEq([MATRIX | dict(params=params[:1]), ADAM | dict(params=params[1:])])
    for step in range(3):
        for i, p in enumerate(params):
            p.grad = dtensor(randn((4, 6), i, step), *p.placements, mesh=p.device_mesh)
        opt.step()
    params[1].grad = params[1].grad.redistribute(placements=[Replicate()])
    try:
        opt.step()
    except ValueError as error:
        said["gradient"] = str(error)
    return dict(said=said, weights=whole(enumerate(params)))


# --------------------------------------------------------------------------------------------------
# Processes


@contextlib.contextmanager
def process_group(folder, name, rank, world):
    timeout = datetime.timedelta(seconds=TIMEOUT)
    init = f"file://{folder}/rendezvous_{name}_{world}"
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=world, timeout=timeout)
    try:
        yield
    finally:
        dist.destroy_process_group()


def worker(rank, world, folder):
    """Runs every case and saves the result, or the traceback as a string."""
    torch.set_num_threads(1)
    jobs = {name: functools.partial(run, case) for name, case in CASES.items()}
    plain = (large_and_small, sent, different_ranks, apart, broadcast, fsdp, on_one_rank, placed)
    jobs |= {job.__name__: job for job in plain}
    jobs["fsdp_resumed"] = functools.partial(fsdp_resumed, folder=folder)
    if world == max(WORLDS):
        jobs["fsdp_bf16"] = functools.partial(fsdp, dtype=BF16)
        jobs["fsdp_copies"] = functools.partial(fsdp, mesh_shape=(2, 2))
    for name, case in RESUME.items():
        if world == SAVED_AT:
            jobs[name] = functools.partial(run, case, last=SAVED_STEPS)
        else:
            jobs[name] = functools.partial(resume, name, case, folder)
    for name, job in jobs.items():
        try:
            with process_group(folder, name, rank, world):
                result = job(rank=rank, world=world)
        except Exception:
            result = traceback.format_exc()
        torch.save(result, folder / f"{name}_{world}_{rank}.pt")


def resume(name, case, folder, rank, world):
    checkpoint = torch.load(folder / f"{name}_{SAVED_AT}_0.pt", weights_only=True)
    return run(case, rank, world, SAVED_STEPS, ALL_STEPS, checkpoint)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """results(name, world): what each rank returned; the world size that saves the checkpoints runs first."""
    folder = tmp_path_factory.mktemp("distributed")
    context = multiprocessing.get_context("forkserver")
    # what the first step imports
    fsdp = ["torch.distributed.fsdp", "torch.distributed.tensor", "torch.distributed.checkpoint.state_dict"]
    context.set_forkserver_preload(["torch._dynamo", "torch.distributed", "pytest", *fsdp])
    for world in sorted(WORLDS, key=lambda w: w != SAVED_AT):
        processes = [
            context.Process(target=worker, args=(r, world, folder), daemon=True) for r in range(world)
        ]
        for process in processes:
            process.start()
        deadline = time.monotonic() + DEADLINE
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()

    @functools.cache
    def get(name, world):
        loaded = []
        for rank in range(world):
            path = folder / f"{name}_{world}_{rank}.pt"
            assert path.exists(), f"rank {rank} of {world} never finished {name}"
            loaded.append(torch.load(path, weights_only=True))
        errors = [value for value in loaded if isinstance(value, str)]
        assert not errors, "\n".join(errors)
        return loaded

    return get


@functools.cache
def alone(name, steps=None):
    """The same case without torch.distributed."""
    return run(CASES[name] if name in CASES else RESUME[name], last=steps)


def absent_reference(case, world):
    """One process that adds up what the ranks have."""
    params, opt = build(case)
    history = []
    for step in range(case.steps):
        for index, p in enumerate(params):
            have = [local_gradient(case, p, index, step, rank, world) for rank in range(world)]
            have = [g for g in have if g is not None]
            if have:
                total = sum(have).to(p.grad_dtype)
                p.grad = total if p.grad is None else p.grad + total
        opt.step(tokens=tokens_of(step))
        opt.zero_grad()
        history.append([p.detach().clone() for p in params])
    return dict(history=history, weights=history[-1], state=opt.state_dict())


def check_close(actual, expected, tolerance, what):
    error = (actual.double() - expected.double()).norm().item()
    assert error <= tolerance * expected.double().norm().item() + 1e-12, f"{what}: differs by {error:.2e}"


def check_run(actual, expected, tolerance=1e-6):
    for step, (a, e) in enumerate(zip(actual["history"], expected["history"], strict=True)):
        for index, (x, y) in enumerate(zip(a, e, strict=True)):
            assert x.dtype == y.dtype
            # a weight may fall on the other side of a rounding border; the masters are compared
            if x.dtype == BF16:
                torch.testing.assert_close(x, y, rtol=2.0**-7, atol=1e-6)
            else:
                check_close(x, y, tolerance, f"step {step}, parameter {index}")
    check_state(actual["state"], expected["state"], 10 * tolerance)


def check_state(actual, expected, tolerance):
    assert actual["step"] == expected["step"] and actual["state"].keys() == expected["state"].keys()
    for name, entry in expected["state"].items():
        assert entry.keys() == actual["state"][name].keys()
        for key, value in entry.items():
            other = actual["state"][name][key]
            if torch.is_tensor(value):
                assert value.dtype == other.dtype == FP32 and value.shape == other.shape
                check_close(other, value, tolerance, f"{name}.{key}")
            else:
                assert value == other, (name, key)


# --------------------------------------------------------------------------------------------------
# Tests


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize(
    "name", [name for name in CASES if not name.startswith("absent_") and name != "absent"]
)
def test_same_weights_and_state_at_any_world_size(results, name, world):
    check_run(results(name, world)[0], alone(name), LOOSE.get(name, 1e-6))


@pytest.mark.parametrize("world", (1, 2))
def test_a_resting_parameter_is_neither_sent_nor_changed(results, world):
    """Of two units one rests for three steps: a sum and a gather less in each of them."""
    for found in results("resting", world):
        start, history = randn((16387,), 77, 5), [weights[5] for weights in found["history"]]
        assert all(torch.equal(weights, start) for weights in history[:3])
        assert not torch.equal(history[3], start)
        assert found["calls"] == [2, 4, 6, 10, 14] and found["state"]["state"]["p5"]["updates"] == 2


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("absent")])
def test_a_gradient_is_missing_where_no_rank_has_one(results, name, world):
    case = CASES[name]
    expected = alone(name) if case.grads == "mean" else absent_reference(case, world)
    check_run(results(name, world)[0], expected)


@pytest.mark.parametrize("world", WORLDS[1:])
@pytest.mark.parametrize("name", [*CASES, *RESUME])
def test_ranks_agree_bit_for_bit(results, name, world):
    first, *others = results(name, world)
    for other in others:
        for a, b in zip(first["history"], other["history"], strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
        check_state(other["state"], first["state"], 0.0)


@pytest.mark.parametrize("name", ["bf16", "bf16_and_fp32", "bf16_mean", "even_bf16"])
@pytest.mark.parametrize("world", WORLDS)
def test_bf16_weights_are_the_rounded_master(results, name, world):
    run = results(name, world)[0]
    for index, weight in enumerate(run["weights"]):
        entry = run["state"]["state"][f"p{index}" if CASES[name].named else str(index)]
        assert ("master" in entry) == (weight.dtype == BF16)
        assert "master" not in entry or torch.equal(weight, entry["master"].to(BF16))


@pytest.mark.parametrize("world", WORLDS[1:])
def test_only_rows_with_a_gradient_are_sent(results, world):
    """Of 600 rows a step reads 2 on each rank, one of them on all, and the first rank owns them."""
    for rank, result in enumerate(results("sent", world)):
        owned = 1 + world if rank == 0 else 0
        assert result["sent"] == [(2, 4), (world * owned, 4)]
        assert result["moved"] == [5, *range(7, 7 + world)]


@pytest.mark.parametrize("world", WORLDS)
def test_gradients_are_reduced_in_fp32(results, world):
    state = results("large_and_small", world)[0]
    matrix, adam = state["0"], state["1"]
    mean = (256 + world - 1) / 10
    torch.testing.assert_close(matrix["momentum"], torch.full((2, 4, 4), 0.1 * mean), rtol=1e-5, atol=0)
    torch.testing.assert_close(adam["exp_avg"], torch.full((7,), 0.1 * mean), rtol=1e-5, atol=0)
    torch.testing.assert_close(adam["exp_avg_sq"], torch.full((7,), 0.05 * mean**2), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", RESUME)
def test_checkpoint_of_two_ranks_equals_that_of_one(results, name):
    check_run(results(name, SAVED_AT)[0], alone(name, SAVED_STEPS))


@pytest.mark.parametrize("world", [w for w in WORLDS if w != SAVED_AT])
@pytest.mark.parametrize("name", RESUME)
def test_checkpoint_continues_at_another_world_size(results, name, world):
    straight = alone(name, ALL_STEPS)
    resumed = results(name, world)[0]
    check_run(resumed, straight | dict(history=straight["history"][SAVED_STEPS:]))
    assert resumed["state"]["step"] == ALL_STEPS


@pytest.mark.parametrize("world", WORLDS[1:])
def test_ranks_with_other_parameters_are_refused_in_one_sentence(results, world):
    last = world - 1
    for result in results("different_ranks", world):
        for i, (there, here) in enumerate((b, a) for (a, b) in DIFFERENCES.values()):
            for said in result["said"][2 * i : 2 * i + 2]:
                expected = [f"matrix parameter {n!r} {s} {d}" for n, s, d in (there, here)]
                assert said.startswith(f"rank {last} has {expected[0]} where rank 0 has {expected[1]}: ")
                assert "\n" not in said


@pytest.mark.parametrize("world", WORLDS[1:])
def test_a_process_group_of_ones_own(results, world):
    for rank, result in enumerate(results("apart", world)):
        w = randn((3, 4, 6), rank).requires_grad_()
        opt = MuonEq([MATRIX | dict(params=[w])])
        for step in range(2):
            w.grad = randn(w.shape, rank, step)
            opt.step()
        assert torch.equal(result["weights"], w)
        assert torch.equal(result["state"]["0"]["momentum"], opt.state_dict()["state"]["0"]["momentum"])
        assert result["said"] == ["this process is not in the process_group of the optimizer"]


@pytest.mark.parametrize("world", WORLDS)
def test_weights_that_are_broadcast_are_taken_over(results, world):
    for result in results("broadcast", world):
        before, after = result["sizes"]
        assert (before > 0.9).all() and (after < 1e-3).all() and (after > 0).all()


@functools.cache
def fsdp_alone(dtype=FP32):
    """Parameters and state after each half, in one process and without DTensors."""
    model = Linear(dtype)
    opt = sharded_optimizer(model)
    halves = []
    for last in (SHARDED_SAVED_AT, SHARDED_STEPS):
        train_sharded(model, opt, last - SHARDED_SAVED_AT, last, 0, 1)
        halves.append((whole(model.named_parameters()), opt.state_dict()["state"]))
    return halves


def check_sharded(found, expected, tolerance=1e-6):
    for name, x in expected.items():
        difference = (found[name].float() - x.float()).abs().max().item()
        assert difference <= tolerance * x.abs().max().item(), f"{name} differs by {difference:.2e}"


FSDP = [("fsdp", world) for world in WORLDS] + [("fsdp_copies", max(WORLDS))]


@pytest.mark.parametrize("name, world", FSDP)
def test_fsdp2_gives_the_update_of_the_whole_matrix(results, name, world):
    """Rows that are divided unevenly, ranks without any, banks; also along one dimension of a mesh."""
    (_, _), (expected, state) = fsdp_alone()
    for result in results(name, world):
        check_sharded(result["weights"], expected)
        assert result["state"].keys() == state.keys()
        for parameter, entry in state.items():
            found = result["state"][parameter]
            assert found.keys() == entry.keys() and found["updates"] == entry["updates"], parameter
            moments = {key: value for key, value in entry.items() if key != "updates"}
            check_sharded(found, moments, 1e-5)
    start = Linear(FP32)
    for parameter, x in expected.items():
        assert torch.equal(x, getattr(start, parameter)) == (parameter == "frozen")


def test_bf16_parameters_of_fsdp2_keep_a_master_copy(results):
    expected, state = fsdp_alone(BF16)[1]
    for result in results("fsdp_bf16", max(WORLDS)):
        check_sharded(result["weights"], expected, 2.0**-6)
        for name, entry in result["state"].items():
            assert entry["master"].dtype == FP32 and entry["master"].shape == state[name]["master"].shape
            assert torch.equal(entry["master"].to(BF16), result["weights"][name])


@pytest.mark.parametrize("world", WORLDS)
def test_a_matrix_goes_to_its_owner_and_back_and_nothing_else_is_sent(results, world):
    ranks = results("fsdp", world)
    shapes = [shape for shape, kind in SHARDED.values() if kind == "matrix"]
    largest = 2 * 4 * sum(math.prod(shape) for shape in shapes if len(shape) == 2) * (world - 1) / world
    for sent in zip(*(result["sent"] for result in ranks), strict=True):
        assert sum(sent) <= 1.05 * largest and (sum(sent) > 0) == (world > 1)
    assert all(not any(result["others"]) for result in ranks)
    # each has about as much to do as the others; the last of four ranks holds too little to own much
    owned = [result["owned"] for result in ranks]
    assert sum(owned) == sum(map(math.prod, shapes)) and max(owned) <= 2 * sum(owned) / world


@pytest.mark.parametrize("world", WORLDS)
def test_fsdp2_goes_on_from_what_two_ranks_saved(results, world):
    """By torch's functions, at another number of ranks; at the same one to the bit."""
    for result in results("fsdp_resumed", world):
        check_sharded(result["weights"], fsdp_alone()[1][0])
        if world == SAVED_AT:
            check_sharded(result["weights"], results("fsdp", world)[0]["weights"], 0.0)
        before, after = result["states"]
        for name, entry in before.items():
            assert all(
                torch.equal(torch.as_tensor(x), torch.as_tensor(after[name][k])) for k, x in entry.items()
            )


def test_one_process_goes_on_from_what_fsdp2_saved(results):
    saved = results("fsdp", SAVED_AT)[0]["saved"]
    model = Linear(FP32)
    model.load_state_dict(saved["weights"])
    opt = sharded_optimizer(model)
    opt.load_state_dict(saved["state"])
    train_sharded(model, opt, SHARDED_SAVED_AT, SHARDED_STEPS, 0, 1)
    check_sharded(whole(model.named_parameters()), fsdp_alone()[1][0])


@pytest.mark.parametrize("world", WORLDS)
def test_rows_without_gradient_count_as_zero_where_another_rank_has_one(results, world):
    params = [randn((8, 3), i).requires_grad_() for i in range(4)]
    opt = MuonEq([MATRIX | dict(params=params)])
    for step in range(3):
        for i in (0, 1):
            params[i].grad = randn((8, 3), i, step)
            params[i].grad[: -(-8 // world) * (world - 1)] = 0
        opt.step()
    for result in results("on_one_rank", world):
        check_sharded(result["weights"], dict(enumerate(p.detach() for p in params)))


@pytest.mark.parametrize("world", WORLDS)
def test_dtensors_that_cannot_work_are_refused_by_their_placements(results, world):
    params = [randn((4, 6), i).requires_grad_() for i in range(2)]
    opt = MuonEq([MATRIX | dict(params=params[:1]), ADAM | dict(params=params[1:])])
    for step in range(3):
        for i, p in enumerate(params):
            p.grad = randn((4, 6), i, step)
        opt.step()
    for result in results("placed", world):
        check_sharded(result["weights"], dict(enumerate(p.detach() for p in params)))
        said = result["said"]
        for name in ("columns", "twice", "partial"):
            placements = {
                "columns": "Shard(dim=1),",
                "twice": "Shard(dim=0), Shard(dim=1)",
                "partial": "Partial(",
            }
            sentence = said.pop(f"{name} matrix mean")
            assert sentence.startswith(f"matrix parameter {name!r} is a DTensor with placements (")
            assert placements[name] in sentence and "fully_shard (FSDP2)" in sentence and "\n" not in sentence
        assert "neither takes Partial" in said.pop("partial adam mean")
        assert said.pop("gradient").startswith("the gradient of parameter '1' has placements (Replicate(),)")
        for name in ("columns", "twice", "partial", "rows"):
            assert said.pop(f"{name} adam token_sum").endswith('grads="mean"')
        assert not said


def foreign_parameters():
    """Marked by torch itself, and as Megatron and DeepSpeed do."""
    from torch.distributed.fsdp._common_utils import _set_fsdp_flattened

    flat, megatron, deepspeed = (torch.nn.Parameter(torch.ones(4, 6)) for _ in range(3))
    _set_fsdp_flattened(flat)
    megatron.tensor_model_parallel = True
    deepspeed.ds_id = 0
    return {"FSDP1": flat, "Megatron": megatron, "ZeRO 3": deepspeed}


@pytest.mark.parametrize("kind", ["matrix", "adam"])
def test_pieces_of_parameters_are_refused_by_name(kind):
    for who, p in foreign_parameters().items():
        with pytest.raises(ValueError, match=f"^parameter 'w' (belongs|is) .*{who}.*; [^\n]*$"):
            MuonEq([dict(kind=kind, params=[("w", p)], lr=0.1)])
    whole = torch.nn.Parameter(torch.ones(4, 6))
    whole.tensor_model_parallel = False  # Megatron's mark of what is not divided
    MuonEq([dict(kind=kind, params=[whole], lr=0.1)])


def test_a_zero_redundancy_optimizer_is_refused_by_name(tmp_path):
    from torch.distributed.optim import ZeroRedundancyOptimizer

    groups = [dict(kind="matrix", params=[torch.nn.Parameter(torch.ones(4, 6))], lr=0.1)]
    with process_group(tmp_path, "zero", 0, 1):
        with pytest.raises(
            ValueError, match="^ZeroRedundancyOptimizer divides parameters .* make it without"
        ):
            ZeroRedundancyOptimizer(groups, MuonEq)
        with pytest.raises(ValueError, match="^ZeroRedundancyOptimizer divides"):
            ZeroRedundancyOptimizer(groups[0]["params"], MuonEq, lr=0.1)
