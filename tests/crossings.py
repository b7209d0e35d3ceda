"""MuonEq in other people's training loops, and other people's Muon beside it. Outside the test suite.

    python tests/crossings.py              makes a virtual environment, runs everything, writes the tables
    python tests/crossings.py timm keras   only what needs these packages; prints, writes nothing

The first run installs the pinned packages below, about 2 GB on disk, in `crossings-venv` of CACHE_DIR
(default `.cache`). Each crossing trains a net of two layers with a matrix group and an Adam group: straight
through, and again with everything saved, made anew and loaded half way. The weights must then be the same
bits. Peers are compared over the first steps of one matrix (`tests/crossings_peers.py`). A crossing that
fails is a line of the table, not the end of the command. The tables go between the markers of
tools/SWITCHING.md.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.abc
import importlib.machinery
import json
import os
import re
import subprocess
import sys
import tempfile
import types
import venv
import warnings
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "tools" / "SWITCHING.md"
PACKAGES = {
    "torch": "2.13.0",
    "numpy": "2.4.6",
    "accelerate": "1.15.0",
    "lightning": "2.6.6",
    "transformers": "5.24.0",
    "schedulefree": "1.4.1",
    "pytorch_optimizer": "4.1.0",
    "pillow": "13.0.0",
    "timm": "1.0.31",
    "skorch": "1.4.0",
    "pytorch-ignite": "0.5.5",
    "muon-optimizer": "0.1.0",
    "heavyball": "3.2.1",
    "optax": "0.2.8",
    "jax": "0.10.2",
    "keras": "3.15.1",
}
WITHOUT_REQUIREMENTS = ("timm",)  # it asks for torchvision, which nothing here uses
INSIDE = "MUONEQ_CROSSINGS_INSIDE"  # set in the environment's own processes

if os.environ.get(INSIDE):
    import torch
    from torch import Tensor, nn

    sys.path.insert(0, str(ROOT))
    from train_gpt import MuonEq

ROWS = 8  # of a batch
EPOCH = 2  # batches of an epoch
STEPS = 8  # of a straight run; it is interrupted after half of them
CROSSINGS: list[Crossing] = []


@dataclasses.dataclass
class Crossing:
    """One way to use MuonEq, and what is expected of it."""

    package: str
    title: str
    run: Callable  # (first step, last step, folder for what is saved) -> the parameters afterwards
    plain: bool  # whether it must end with the weights of the bare loop
    refused: str  # or a pattern of the sentence that must refuse it


def crossing(package: str, title: str, plain: bool = False, refused: str = "") -> Callable:
    def add(run: Callable) -> Callable:
        CROSSINGS.append(Crossing(package, title, run, plain, refused))
        return run

    return add


# --------------------------------------------------------------------------------------------------
# The net, its data, and the loop that everybody writes


def net(dtype=None) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def data() -> tuple[Tensor, Tensor]:
    """Rows of an epoch, (EPOCH * ROWS, 6) and (EPOCH * ROWS, 3)."""
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(EPOCH * ROWS, width, generator=generator) for width in (6, 3))


def batch(step: int) -> tuple[Tensor, Tensor]:
    return tuple(x.split(ROWS)[step % EPOCH] for x in data())


def loader() -> torch.utils.data.DataLoader:
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data()), batch_size=ROWS)


def optimizer(model: nn.Module, **fields) -> MuonEq:
    named = list(model.named_parameters())
    matrices = [pair for pair in named if pair[1].ndim == 2]
    others = [pair for pair in named if pair[1].ndim != 2]
    matrix = dict(kind="matrix", params=matrices, lr=0.02, weight_decay=0.1, normuon=True)
    return MuonEq([{**matrix, **fields}, dict(kind="adam", params=others, lr=0.01)])


def backward(model: nn.Module, step: int) -> Tensor:
    x, y = batch(step)
    loss = nn.functional.mse_loss(model(x), y)
    loss.backward()
    return loss


def save(path: Path, **parts) -> None:
    torch.save({name: part.state_dict() for name, part in parts.items()}, path / "saved.pt")


def load(path: Path, **parts) -> None:
    saved = torch.load(path / "saved.pt", weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(saved[name])


def half(step: int) -> float:
    """A learning rate that falls, for LambdaLR."""
    return 1 / (1 + step)


def loop(first: int, last: int, folder: Path, wrap=None, schedule=None, **fields) -> list[Tensor]:
    """The bare loop, with a wrapper around the optimizer or a scheduler where they are given."""
    model = net()
    opt = optimizer(model, **fields)
    opt = wrap(opt) if wrap else opt
    parts = {"model": model, "opt": opt}
    if schedule:
        parts["scheduler"] = schedule(opt)
    if first:
        load(folder, **parts)
    for step in range(first, last):
        opt.zero_grad()
        loss = backward(model, step)
        opt.step()
        if isinstance(parts.get("scheduler"), torch.optim.lr_scheduler.ReduceLROnPlateau):
            parts["scheduler"].step(loss.detach())
        elif schedule:
            parts["scheduler"].step()
    save(folder, **parts)
    return list(model.parameters())


# --------------------------------------------------------------------------------------------------
# torch


@crossing("torch", "bare loop, torch.save and torch.load(weights_only=True)", plain=True)
def torch_bare(first, last, folder):
    return loop(first, last, folder)


def torch_schedulers() -> dict[str, Callable]:
    lr = torch.optim.lr_scheduler

    def sequential(opt):
        return lr.SequentialLR(opt, [lr.LinearLR(opt, total_iters=3), lr.CosineAnnealingLR(opt, 6)], [3])

    def chained(opt):
        return lr.ChainedScheduler([lr.ExponentialLR(opt, 0.9), lr.ConstantLR(opt, total_iters=3)])

    return {
        "LambdaLR": lambda opt: lr.LambdaLR(opt, half),
        "CosineAnnealingLR": lambda opt: lr.CosineAnnealingLR(opt, STEPS),
        "CosineAnnealingWarmRestarts": lambda opt: lr.CosineAnnealingWarmRestarts(opt, 3),
        "OneCycleLR": lambda opt: lr.OneCycleLR(opt, 0.1, total_steps=STEPS + 1),
        "CyclicLR": lambda opt: lr.CyclicLR(opt, 0.01, 0.1, step_size_up=2),
        "ReduceLROnPlateau": lambda opt: lr.ReduceLROnPlateau(opt, patience=0, threshold=0.5),
        "SequentialLR": sequential,
        "ChainedScheduler": chained,
        "SWALR": lambda opt: torch.optim.swa_utils.SWALR(opt, 0.001, anneal_epochs=4),
    }


for name in ("LambdaLR", "CosineAnnealingLR", "CosineAnnealingWarmRestarts", "OneCycleLR", "CyclicLR",
             "ReduceLROnPlateau", "SequentialLR", "ChainedScheduler", "SWALR"):  # fmt: skip

    @crossing("torch", f"{name}, its state_dict saved")
    def torch_scheduler(first, last, folder, name=name):
        return loop(first, last, folder, schedule=torch_schedulers()[name])


for name in ("LambdaLR", "CosineAnnealingLR", "OneCycleLR"):

    @crossing("torch", f"{name}, made anew with last_epoch")
    def torch_last_epoch(first, last, folder, name=name):
        lr = torch.optim.lr_scheduler
        model = net()
        opt = optimizer(model)
        if first:
            load(folder, model=model, opt=opt)
        scheduler = {
            "LambdaLR": lambda: lr.LambdaLR(opt, half, last_epoch=first - 1),
            "CosineAnnealingLR": lambda: lr.CosineAnnealingLR(opt, STEPS, last_epoch=first - 1),
            "OneCycleLR": lambda: lr.OneCycleLR(opt, 0.1, total_steps=STEPS + 1, last_epoch=first - 1),
        }[name]()
        for step in range(first, last):
            opt.zero_grad()
            backward(model, step)
            opt.step()
            scheduler.step()
        save(folder, model=model, opt=opt)
        return list(model.parameters())


@crossing("torch", "step(closure)", plain=True)
def torch_closure(first, last, folder):
    model = net()
    opt = optimizer(model)
    if first:
        load(folder, model=model, opt=opt)
    for step in range(first, last):

        def closure(step=step):
            opt.zero_grad(set_to_none=True)
            return backward(model, step)

        opt.step(closure)
    save(folder, model=model, opt=opt)
    return list(model.parameters())


@crossing("torch", "copy.deepcopy and torch.save of model and optimizer themselves", plain=True)
def torch_copies(first, last, folder):
    model = net()
    opt = optimizer(model)
    if first:
        model, opt = torch.load(folder / "whole.pt", weights_only=False)
    model, opt = copy.deepcopy((model, opt))
    for step in range(first, last):
        opt.zero_grad()
        backward(model, step)
        opt.step()
    torch.save((model, opt), folder / "whole.pt")
    return list(model.parameters())


@crossing("torch", "autocast, GradScaler, clip_grad_norm_")
def torch_scaler(first, last, folder):
    model = net()
    opt, scaler = optimizer(model), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    if first:
        load(folder, model=model, opt=opt, scaler=scaler)
    for step in range(first, last):
        opt.zero_grad()
        x, y = batch(step)
        with torch.autocast("cpu", torch.bfloat16):
            loss = nn.functional.mse_loss(model(x), y)
        scaler.scale(loss).backward()
        scaler.unscale_(opt)
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        scaler.step(opt)
        scaler.update()
    save(folder, model=model, opt=opt, scaler=scaler)
    return list(model.parameters())


@crossing("torch", "AveragedModel (EMA)")
def torch_average(first, last, folder):
    swa = torch.optim.swa_utils
    model = net()
    opt, average = optimizer(model), swa.AveragedModel(model, multi_avg_fn=swa.get_ema_multi_avg_fn(0.9))
    if first:
        load(folder, model=model, opt=opt, average=average)
    for step in range(first, last):
        opt.zero_grad()
        backward(model, step)
        opt.step()
        average.update_parameters(model)
    save(folder, model=model, opt=opt, average=average)
    return [*model.parameters(), *average.module.parameters()]


@crossing("torch", "torch.compile of the whole step (backend aot_eager)")
def torch_compile(first, last, folder):
    model = net()
    opt = optimizer(model)
    if first:
        load(folder, model=model, opt=opt)
    step_of = torch.compile(lambda: opt.step(), backend="aot_eager")
    for step in range(first, last):
        opt.zero_grad()
        backward(model, step)
        step_of()
    save(folder, model=model, opt=opt)
    return list(model.parameters())


@crossing("torch", "the step of each layer during backward")
def torch_in_backward(first, last, folder):
    model = net()
    opts = {str(i): optimizer(model[i]) for i in (0, 2)}
    if first:
        load(folder, model=model, **opts)
    for opt, i in zip(opts.values(), (0, 2)):
        missing = []

        def ready(p, opt=opt, layer=model[i], missing=missing):
            missing.append(p)
            if len(missing) == len(list(layer.parameters())):
                opt.step()
                opt.zero_grad()
                missing.clear()

        for p in model[i].parameters():
            p.register_post_accumulate_grad_hook(ready)
    for step in range(first, last):
        backward(model, step)
    save(folder, model=model, **opts)
    return list(model.parameters())


# --------------------------------------------------------------------------------------------------
# torch.distributed, one process


def process_group() -> None:
    if not torch.distributed.is_initialized():
        store = tempfile.mkdtemp() + "/store"
        torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)


@crossing("torch", "DistributedDataParallel, one process", plain=True)
def torch_ddp(first, last, folder):
    process_group()
    model = nn.parallel.DistributedDataParallel(net())
    opt = optimizer(model)
    if first:
        load(folder, model=model, opt=opt)
    for step in range(first, last):
        opt.zero_grad()
        backward(model, step)
        opt.step()
    save(folder, model=model, opt=opt)
    return list(model.parameters())


def sharded_loop(first: int, last: int, folder: Path) -> list[Tensor]:
    """The bare loop with a model of fully_shard, on any number of processes with the same data."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
    from torch.distributed.fsdp import fully_shard

    model = fully_shard(net())
    opt = optimizer(model)

    def parts() -> dict:
        return dict(zip(("model", "opt"), get_state_dict(model, opt)))

    if first:
        state = parts()
        dcp.load(state, checkpoint_id=folder / "dcp")
        set_state_dict(model, opt, model_state_dict=state["model"], optim_state_dict=state["opt"])
    for step in range(first, last):
        opt.zero_grad()
        backward(model, step)
        opt.step()
    dcp.save(parts(), checkpoint_id=folder / "dcp")
    return [p.full_tensor().detach() for p in model.parameters()]


@crossing("torch", "FSDP2 fully_shard, distributed.checkpoint, one process", plain=True)
def torch_fsdp2(first, last, folder):
    process_group()
    return sharded_loop(first, last, folder)


def one_of_two(rank: int, first: int, last: int, folder: Path) -> None:
    store = f"file://{folder}/store-{first}-{last}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    params = sharded_loop(first, last, folder)
    if rank == 0:
        torch.save(params, folder / "params.pt")
    torch.distributed.destroy_process_group()


@crossing("torch", "FSDP2 fully_shard, distributed.checkpoint, two processes")
def torch_fsdp2_twice(first, last, folder):
    torch.multiprocessing.spawn(one_of_two, (first, last, folder), nprocs=2)
    return torch.load(folder / "params.pt")


@crossing("torch", "PostLocalSGDOptimizer, one process", plain=True)
def torch_post_local(first, last, folder):
    from torch.distributed.algorithms.model_averaging import averagers
    from torch.distributed.optim import PostLocalSGDOptimizer

    process_group()

    def wrap(opt):
        return PostLocalSGDOptimizer(opt, averagers.PeriodicModelAverager(period=2, warmup_steps=0))

    return loop(first, last, folder, wrap)


@crossing("torch", "ZeroRedundancyOptimizer", refused="ZeroRedundancyOptimizer divides")
def torch_zero(first, last, folder):
    from torch.distributed.optim import ZeroRedundancyOptimizer

    process_group()
    ZeroRedundancyOptimizer(net().parameters(), MuonEq, lr=0.02)


# --------------------------------------------------------------------------------------------------
# torch.distributed.checkpoint


def checkpointed(first, last, folder, take: Callable, give: Callable) -> list[Tensor]:
    """The bare loop with dcp.save and dcp.load of what `take` returns."""
    import torch.distributed.checkpoint as dcp

    model = net()
    opt = optimizer(model)
    if first:
        content = take(model, opt)
        dcp.load(content, checkpoint_id=folder / "dcp")
        give(model, opt, content)
    for step in range(first, last):
        opt.zero_grad()
        backward(model, step)
        opt.step()
    dcp.save(take(model, opt), checkpoint_id=folder / "dcp")
    return list(model.parameters())


for flatten in (False, True):
    word = ", flattened" * flatten

    @crossing("torch", f"distributed.checkpoint, get_ and set_optimizer_state_dict{word}", plain=True)
    def dcp_functions(first, last, folder, flatten=flatten):
        from torch.distributed.checkpoint import state_dict as functions

        options = functions.StateDictOptions(flatten_optimizer_state_dict=flatten)

        def take(model, opt):
            state = functions.get_optimizer_state_dict(model, opt, options=options)
            return {"model": model.state_dict(), "opt": state}

        def give(model, opt, content):
            model.load_state_dict(content["model"])
            functions.set_optimizer_state_dict(model, opt, content["opt"], options=options)

        return checkpointed(first, last, folder, take, give)


@crossing("torch", "distributed.checkpoint of the raw state_dict", plain=True)
def dcp_raw(first, last, folder):
    def give(model, opt, content):
        model.load_state_dict(content["model"])
        opt.load_state_dict(content["opt"])

    def take(model, opt):
        return {"model": model.state_dict(), "opt": opt.state_dict()}

    return checkpointed(first, last, folder, take, give)


@crossing("torch", "distributed.checkpoint of the objects", plain=True)
def dcp_objects(first, last, folder):
    return checkpointed(first, last, folder, lambda model, opt: {"model": model, "opt": opt}, lambda *a: None)


# --------------------------------------------------------------------------------------------------
# Trainers


for accumulate in (1, 2):
    word = "prepare, step, save_state, load_state" if accumulate == 1 else "accumulate, clip, scheduler"

    @crossing("accelerate", word, plain=accumulate == 1)
    def with_accelerate(first, last, folder, accumulate=accumulate):
        import accelerate

        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
        model = net()
        opt = optimizer(model)
        scheduler = torch.optim.lr_scheduler.LambdaLR(opt, half if accumulate > 1 else lambda step: 1.0)
        model, opt, batches, scheduler = accelerator.prepare(model, opt, loader(), scheduler)
        if first:
            accelerator.load_state(str(folder / "state"))
        for _ in range((last - first) // EPOCH):
            for x, y in batches:
                with accelerator.accumulate(model):
                    opt.zero_grad()
                    accelerator.backward(nn.functional.mse_loss(model(x), y))
                    if accumulate > 1 and accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(model.parameters(), 0.1)
                    opt.step()
                    scheduler.step()
        accelerator.save_state(str(folder / "state"))
        return list(model.parameters())


def lightning_module(automatic: bool, schedule: bool):
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net, self.automatic_optimization = net(), automatic

        def training_step(self, rows, index):
            x, y = rows
            loss = nn.functional.mse_loss(self.net(x).float(), y.float())
            if not automatic:
                opt = self.optimizers()
                opt.zero_grad()
                self.manual_backward(loss)
                opt.step()
            return loss

        def configure_optimizers(self):
            opt = optimizer(self.net)
            scheduler = torch.optim.lr_scheduler.LambdaLR(opt, half)
            return ([opt], [scheduler]) if schedule else opt

    return Module()


def fit(first, last, folder, automatic=True, schedule=False, **settings) -> list[Tensor]:
    import lightning

    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer = lightning.Trainer(
        max_epochs=last // EPOCH, accelerator="cpu", enable_model_summary=False, **quiet, **settings
    )
    module = lightning_module(automatic, schedule)
    trainer.fit(module, loader(), ckpt_path=str(folder / "saved.ckpt") if first else None)
    trainer.save_checkpoint(folder / "saved.ckpt")
    return [p.detach() for p in module.parameters()]


@crossing("lightning", "automatic optimization", plain=True)
def lightning_automatic(first, last, folder):
    return fit(first, last, folder)


@crossing("lightning", "manual optimization", plain=True)
def lightning_manual(first, last, folder):
    return fit(first, last, folder, automatic=False)


@crossing("lightning", "scheduler, clip, accumulate, bf16-mixed")
def lightning_mixed(first, last, folder):
    settings = dict(gradient_clip_val=0.1, accumulate_grad_batches=2, precision="bf16-mixed")
    return fit(first, last, folder, schedule=True, **settings)


@crossing("lightning", "bf16-true")
def lightning_low(first, last, folder):
    return fit(first, last, folder, precision="bf16-true")


@crossing("lightning", "Fabric, save and load", plain=True)
def lightning_fabric(first, last, folder):
    import lightning

    fabric = lightning.Fabric(accelerator="cpu", devices=1)
    model = net()
    model, opt = fabric.setup(model, optimizer(model))
    if first:
        fabric.load(folder / "saved.ckpt", {"model": model, "opt": opt})
    for step in range(first, last):
        x, y = batch(step)
        opt.zero_grad()
        fabric.backward(nn.functional.mse_loss(model(x), y))
        opt.step()
    fabric.save(folder / "saved.ckpt", {"model": model, "opt": opt})
    return list(model.parameters())


def hugging_face_trainer(last: int, folder: Path, schedule: bool, by_class: bool = False, **settings):
    import transformers

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net()

        def forward(self, x, labels):
            return {"loss": nn.functional.mse_loss(self.net(x).float(), labels)}

    class Trainer(transformers.Trainer):
        def _get_train_sampler(self, *a, **k):  # rows in their order, as in the bare loop
            return None

    model = Net()
    rows = [{"x": x, "labels": y} for x, y in zip(*data())]
    arguments = transformers.TrainingArguments(
        str(folder), num_train_epochs=last / EPOCH, per_device_train_batch_size=ROWS, max_grad_norm=0.0,
        save_strategy="epoch", report_to=[], use_cpu=True, disable_tqdm=True, **settings,
    )  # fmt: skip
    if by_class:
        return model, Trainer(model, arguments, train_dataset=rows,
                              optimizer_cls_and_kwargs=(MuonEq, {"grads": "mean"}))  # fmt: skip
    opt = optimizer(model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, half if schedule else lambda step: 1.0)
    return model, Trainer(model, arguments, train_dataset=rows, optimizers=(opt, scheduler))


@crossing("transformers", "Trainer(optimizers=...), resume_from_checkpoint", plain=True)
def hugging_face(first, last, folder):
    model, trainer = hugging_face_trainer(last, folder, schedule=False)
    trainer.train(resume_from_checkpoint=bool(first))
    return list(model.parameters())


@crossing("transformers", "Trainer, bf16, accumulation, clipping, scheduler")
def hugging_face_mixed(first, last, folder):
    settings = dict(bf16=True, gradient_accumulation_steps=2)
    model, trainer = hugging_face_trainer(last, folder, schedule=True, **settings)
    trainer.args.max_grad_norm = 0.1
    trainer.train(resume_from_checkpoint=bool(first))
    return list(model.parameters())


@crossing("transformers", "Trainer(optimizer_cls_and_kwargs=...)", refused="kind is 'matrix' or 'adam'")
def hugging_face_class(first, last, folder):
    hugging_face_trainer(last, folder, schedule=False, by_class=True)[1].train()


@crossing("skorch", "NeuralNetRegressor with a factory, save_params, load_params", plain=True)
def with_skorch(first, last, folder):
    import skorch

    def factory(groups, **settings):
        return optimizer(made[0])

    made = []

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net()
            made[:] = [self]

        def forward(self, x):
            return self.net(x)

    files = {"f_params": folder / "params.pt", "f_optimizer": folder / "optimizer.pt"}
    regressor = skorch.NeuralNetRegressor(
        Net, optimizer=factory, max_epochs=(last - first) // EPOCH, batch_size=ROWS, train_split=None,
        verbose=0, callbacks=None,
    ).initialize()  # fmt: skip
    if first:
        regressor.load_params(**{key: str(path) for key, path in files.items()})
    x, y = data()
    regressor.partial_fit(x, y)
    regressor.save_params(**{key: str(path) for key, path in files.items()})
    return list(regressor.module_.parameters())


@crossing("pytorch-ignite", "create_supervised_trainer, ParamScheduler, Checkpoint")
def with_ignite(first, last, folder):
    from ignite import engine, handlers

    model = net()
    opt = optimizer(model)
    trainer = engine.create_supervised_trainer(model, opt, nn.functional.mse_loss)
    scheduler = handlers.CosineAnnealingScheduler(opt, "lr", 0.02, 0.002, cycle_size=STEPS)
    trainer.add_event_handler(engine.Events.ITERATION_STARTED, scheduler)
    parts = {"model": model, "opt": opt, "trainer": trainer, "scheduler": scheduler}
    if first:
        saved = torch.load(folder / "checkpoint.pt", weights_only=True)
        handlers.Checkpoint.load_objects(to_load=parts, checkpoint=saved)
    keep = handlers.DiskSaver(str(folder), require_empty=False, create_dir=True)
    checkpoint = handlers.Checkpoint(parts, keep, filename_pattern="checkpoint.pt", n_saved=1,
                                     global_step_transform=lambda *a: last)  # fmt: skip
    trainer.add_event_handler(engine.Events.COMPLETED, checkpoint)
    trainer.run(loader(), max_epochs=last // EPOCH)
    return list(model.parameters())


# --------------------------------------------------------------------------------------------------
# Wrappers and schedulers


@crossing("schedulefree", "ScheduleFreeWrapper(momentum=0.9)")
def with_schedulefree(first, last, folder):
    import schedulefree

    model = net()
    opt = schedulefree.ScheduleFreeWrapper(optimizer(model), momentum=0.9)
    if first:
        load(folder, model=model, opt=opt)
    opt.train()
    for step in range(first, last):
        opt.zero_grad()
        backward(model, step)
        opt.step()
    if last < STEPS:  # as its documentation asks before weights are saved
        opt.eval()
    save(folder, model=model, opt=opt)
    return list(model.parameters())


WRAPPERS = {
    "Lookahead": dict(k=3),
    "OrthoGrad": {},
    "TRAC": dict(s_prev=0.5),  # from 1e-8, its default, nothing moves in eight steps
    "ScheduleFreeWrapper": {},
}
for name in WRAPPERS:

    @crossing("pytorch_optimizer", name)
    def with_wrapper(first, last, folder, name=name):
        import pytorch_optimizer

        def wrap(opt):
            wrapped = getattr(pytorch_optimizer, name)(opt, **WRAPPERS[name])
            if name == "ScheduleFreeWrapper":
                wrapped.train()
            return wrapped

        return loop(first, last, folder, wrap)


@crossing("pytorch_optimizer", "PCGrad, two losses")
def with_pcgrad(first, last, folder):
    import pytorch_optimizer

    model = net()
    opt = pytorch_optimizer.PCGrad(optimizer(model))
    if first:
        load(folder, model=model, opt=opt)
    for step in range(first, last):
        opt.zero_grad()
        x, y = batch(step)
        opt.pc_backward([nn.functional.mse_loss(model(x), y), nn.functional.l1_loss(model(x), -y)])
        opt.step()
    save(folder, model=model, opt=opt)
    return list(model.parameters())


@crossing("pytorch_optimizer", "CosineAnnealingWarmupRestarts")
def with_restarts(first, last, folder):
    import pytorch_optimizer

    def schedule(opt):
        return pytorch_optimizer.CosineAnnealingWarmupRestarts(opt, STEPS, max_lr=0.02, warmup_steps=2)

    return loop(first, last, folder, schedule=schedule)


class Anything(type):
    """A class with whatever attribute is asked of it."""

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class Pretended(types.ModuleType):
    """A module with whatever class is asked of it."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything(name, (), {"__init__": lambda self, *a, **k: None})


class PretendedTorchvision(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """timm's models want torchvision, its schedulers and optimizers do not."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torchvision":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        return Pretended(spec.name)

    def exec_module(self, module):
        pass


def import_timm():
    sys.meta_path.append(PretendedTorchvision())
    import timm.optim
    import timm.scheduler  # noqa: F401

    return timm


for name in ("CosineLRScheduler", "StepLRScheduler", "TanhLRScheduler"):

    @crossing("timm", f"{name} with a warm-up")
    def with_timm_scheduler(first, last, folder, name=name):
        timm = import_timm()
        length = {"decay_t": 2} if name == "StepLRScheduler" else {"t_initial": STEPS}
        model = net()
        opt = optimizer(model)
        scheduler = getattr(timm.scheduler, name)(
            opt, **length, warmup_t=2, warmup_lr_init=1e-4, t_in_epochs=False
        )
        if first:
            load(folder, model=model, opt=opt, scheduler=scheduler)
        for step in range(first, last):
            opt.zero_grad()
            backward(model, step)
            opt.step()
            scheduler.step_update(step + 1)
        save(folder, model=model, opt=opt, scheduler=scheduler)
        return list(model.parameters())


@crossing("timm", "optim.Lookahead")
def with_timm_lookahead(first, last, folder):
    timm = import_timm()
    return loop(first, last, folder, lambda opt: timm.optim.Lookahead(opt, k=3))


# --------------------------------------------------------------------------------------------------
# Judging


def sentence(error: BaseException) -> str:
    first = (str(error).strip() or "no message").splitlines()[0]
    return f"{type(error).__name__}: {first}"[:150].replace("|", "/")


def judge(one: Crossing, bare: list[Tensor]) -> dict:
    """The line of one crossing: works, why not, and whether a resumed run ends with the same bits."""
    line = {"package": one.package, "title": one.title, "works": "", "resume": "", "why": ""}
    with tempfile.TemporaryDirectory() as straight, tempfile.TemporaryDirectory() as broken:
        try:
            expected = [p.detach().clone() for p in one.run(0, STEPS, Path(straight))]
        except Exception as error:
            if one.refused and re.search(one.refused, str(error)):
                return line | {"works": "refused, as it should be", "why": sentence(error)}
            return line | {"works": "fails", "why": sentence(error)}
        if one.refused:
            return line | {"works": "fails", "why": "it is not refused"}
        start = [p.to(q.dtype) for p, q in zip(net().parameters(), expected)]
        if any(torch.equal(p, q) for p, q in zip(start, expected)):
            return line | {"works": "fails", "why": "a parameter did not move"}
        if one.plain and not all(map(torch.equal, expected, bare)):
            return line | {"works": "fails", "why": "the weights are not those of the bare loop"}
        line["works"] = "works" if not one.plain else "works, as the bare loop"
        try:
            one.run(0, STEPS // 2, Path(broken))
            found = [p.detach() for p in one.run(STEPS // 2, STEPS, Path(broken))]
        except Exception as error:
            return line | {"resume": "fails", "why": sentence(error)}
        off = max((p - q).abs().max().item() for p, q in zip(expected, found))
        same = all(map(torch.equal, expected, found))
        return line | {"resume": "bit-equal" if same else f"differs by {off:.1e}"}


def run_package(package: str) -> list[dict]:
    """All lines of one package, in this process."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        bare = [p.detach() for p in loop(0, STEPS, Path(folder))]
    lines = []
    for one in CROSSINGS:
        if one.package == package:
            lines.append(judge(one, bare))
            print(*lines[-1].values(), sep=" | ", file=sys.stderr, flush=True)
    return lines


# --------------------------------------------------------------------------------------------------
# The command


def environment() -> Path:
    """The python of the virtual environment, made and filled where it is missing or of other versions."""
    folder = Path(os.environ.get("CACHE_DIR", ROOT / ".cache")) / "crossings-venv"
    python, stamp = folder / "bin" / "python", folder / "packages.json"
    if not stamp.exists() or json.loads(stamp.read_text()) != PACKAGES:
        venv.create(folder, clear=True, with_pip=True)
        pinned = [f"{name}=={version}" for name, version in PACKAGES.items()]
        alone = [pin for pin in pinned if pin.split("==")[0] in WITHOUT_REQUIREMENTS]
        pip = [python, "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, *(pin for pin in pinned if pin not in alone)], check=True)
        subprocess.run([*pip, "--no-deps", *alone], check=True)
        stamp.write_text(json.dumps(PACKAGES))
    return python


def inside(python: Path, what: str, package: str) -> list[dict]:
    """The lines of one package, from a process of its own; one that dies is a line too."""
    settings = {INSIDE: "1", "OMP_NUM_THREADS": "1", "KERAS_BACKEND": "torch", "JAX_PLATFORMS": "cpu",
                "HF_HUB_OFFLINE": "1"}  # fmt: skip
    command = [python, __file__, what, package]
    done = subprocess.run(command, env=os.environ | settings, stdout=subprocess.PIPE, text=True)
    last = (done.stdout.strip() or "-").splitlines()[-1]
    if done.returncode == 0 and last.startswith("["):
        return json.loads(last)
    empty = {"package": package, "title": "", "works": "fails", "resume": ""}
    return [empty | {"why": f"the process ended with status {done.returncode}"}]


def crossings_table(lines: list[dict]) -> str:
    rows = ["| package | crossing | result | resumed run | why |", "| --- | --- | --- | --- | --- |"]
    for line in lines:
        package = f"{line['package']} {PACKAGES[line['package']]}"
        rows.append(f"| {package} | {line['title']} | {line['works']} | {line['resume']} | {line['why']} |")
    return "\n".join(rows).replace("|  |", "| |")


def put(text: str, name: str, table: str) -> str:
    """The page with a table between its markers."""
    begin, end = f"<!-- {name}: generated by tests/crossings.py -->", f"<!-- end of {name} -->"
    before, rest = text.split(begin)
    return f"{before}{begin}\n{table}\n{end}{rest.split(end)[1]}"


def main(arguments: list[str]) -> None:
    if os.environ.get(INSIDE):
        what, package = arguments
        if what == "peer":
            import crossings_peers

            print(json.dumps(crossings_peers.run(package)))
        else:
            print(json.dumps(run_package(package)))
        return
    from crossings_peers import PEERS, peers_table, steps_table

    unknown = set(arguments) - PACKAGES.keys()
    if unknown:
        sys.exit(f"crossings.py: no package {', '.join(sorted(unknown))}; there are {', '.join(PACKAGES)}")
    python = environment()
    wanted = arguments or PACKAGES
    crossed, peers = [], []
    for package in dict.fromkeys(one.package for one in CROSSINGS):
        crossed += inside(python, "crossing", package) if package in wanted else []
    for package in PEERS:
        peers += inside(python, "peer", package) if package in wanted else []
    tables = {
        "crossings": crossings_table(crossed),
        "peers": peers_table(peers),
        "first-steps": steps_table(peers),
    }
    print(*tables.values(), sep="\n\n")
    if not arguments:
        page = PAGE.read_text()
        for name, table in tables.items():
            page = put(page, name, table)
        PAGE.write_text(page)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main(sys.argv[1:])
