"""Other libraries' Muon and the groups of MuonEq that do the same, for tests/crossings.py and its page.

One matrix takes a few steps under both with the same gradients. What counts is the Frobenius norm of the
difference of their updates over that of theirs, the largest over steps and shapes. Where both multiply in
bfloat16 it is that type's rounding, which the iterations of newton_schulz enlarge.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable

if os.environ.get("MUONEQ_CROSSINGS_INSIDE"):
    import torch
    from torch import Tensor

    import train_gpt
    from crossings import import_timm

SHAPES = (256, 1024), (1024, 256)
LR, DECAY = 0.02, 0.1
# Five steps that go by the name "quintic" in timm and emerging-optimizers; heavyball takes them too.
QUINTIC = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)


@dataclasses.dataclass
class Peer:
    """Another Muon and what reproduces it."""

    package: str
    name: str
    theirs: Callable  # (weight, gradients, lr or None, decay) -> the weight after each step
    ours: dict  # fields of a matrix group; "float32" stands for the type
    said: str  # what else must be known
    tolerance: float
    steps: int = 3
    prepare: Callable | None = None  # what is done to the gradients of ours before each step


def of_torch(make: Callable) -> Callable:
    """theirs, from a function (parameter, lr, decay) -> optimizer."""

    def run(weight: Tensor, gradients: list[Tensor], lr: float, decay: float) -> list[Tensor]:
        p = torch.nn.Parameter(weight.clone())
        opt = make(p, lr, decay)
        weights = []
        for grad in gradients:
            p.grad = grad.clone()
            opt.step()
            weights.append(p.detach().clone())
        return weights

    return run


def muon_of_torch(**settings) -> Callable:
    return of_torch(lambda p, lr, decay: torch.optim.Muon([p], lr=lr, weight_decay=decay, **settings))


def muon_optimizer(p, lr, decay):
    import muon

    return muon.SingleDeviceMuon([p], lr=lr, weight_decay=decay)


def muon_of_pytorch_optimizer(p, lr, decay):
    import pytorch_optimizer

    group = dict(params=[p], use_muon=True)
    return pytorch_optimizer.Muon([group], lr=lr, weight_decay=decay)


def muon_of_timm(p, lr, decay):
    return import_timm().optim.Muon([p], lr=lr, weight_decay=decay)


def muon_of_heavyball(p, lr, decay):
    import heavyball

    heavyball.utils.compile_mode = None  # the same numbers without a compiler
    return heavyball.Muon([p], lr=lr, weight_decay=decay)


def muon_of_keras(weight, gradients, lr, decay):
    import keras

    variable = keras.Variable(weight.numpy())
    opt = keras.optimizers.Muon(learning_rate=lr, weight_decay=decay)
    weights = []
    for grad in gradients:
        opt.apply([keras.ops.convert_to_tensor(grad.numpy())], [variable])
        weights.append(torch.as_tensor(keras.ops.convert_to_numpy(variable)).clone())
    return weights


def muon_of_optax(nesterov: bool) -> Callable:
    def run(weight, gradients, lr, decay):
        """A kernel of JAX is (in, out), the transpose of ours."""
        import jax.numpy as jnp
        import numpy as np
        import optax

        opt = optax.contrib.muon(lr, weight_decay=decay, nesterov=nesterov)
        kernel = jnp.asarray(weight.T.numpy())
        state, weights = opt.init(kernel), []
        for grad in gradients:
            update, state = opt.update(jnp.asarray(grad.T.numpy()), state, kernel)
            kernel = optax.apply_updates(kernel, update)
            weights.append(torch.from_numpy(np.array(kernel)).T.contiguous())
        return weights

    return run


def plus_mean(gradients: list[Tensor], beta: float = 0.9) -> list[Tensor]:
    """g + EMA of g: what heavyball orthogonalises."""
    mean, changed = torch.zeros_like(gradients[0]), []
    for grad in gradients:
        mean = beta * mean + (1 - beta) * grad
        changed.append(grad + mean)
    return changed


ROUNDING = 3e-2  # bfloat16 on both sides, or on theirs
EXACT = 1e-3  # float32 on both sides
PLAIN = dict(equilibrate="none", orthogonalize="newton_schulz")
QUINTIC_GROUP = dict(equilibrate="none", orthogonalize="quintic", nesterov=False)
MATCH = dict(scale="match_rms_adamw")
FLOAT32 = dict(work_dtype="float32")

PEER_LIST = [
    Peer("torch", "torch.optim.Muon", muon_of_torch(), PLAIN, "its decay is 0.1 by default", ROUNDING),
    Peer(
        "torch", 'torch.optim.Muon, adjust_lr_fn="match_rms_adamw"',
        muon_of_torch(adjust_lr_fn="match_rms_adamw"), PLAIN | MATCH, "the same", ROUNDING,
    ),
    Peer("muon-optimizer", "muon.SingleDeviceMuon", of_torch(muon_optimizer), PLAIN, "", ROUNDING),
    Peer(
        "optax", "optax.contrib.muon, nesterov=False", muon_of_optax(False),
        PLAIN | FLOAT32 | dict(nesterov=False), "of the transposed weight", EXACT,
    ),
    Peer(
        "optax", "optax.contrib.muon", muon_of_optax(True), PLAIN | FLOAT32,
        "of the transposed weight; its bias correction weighs old gradients less at first", 0.1,
    ),
    Peer(
        "keras", "keras.optimizers.Muon", muon_of_keras, PLAIN | MATCH | FLOAT32,
        "its decay is 0.004 by default", EXACT,
    ),
    Peer("timm", "timm.optim.Muon", of_torch(muon_of_timm), QUINTIC_GROUP | MATCH, "", ROUNDING),
    Peer(
        "pytorch_optimizer", "pytorch_optimizer.Muon", of_torch(muon_of_pytorch_optimizer), PLAIN,
        "", ROUNDING,
    ),
    Peer(
        "heavyball", "heavyball.Muon", of_torch(muon_of_heavyball), QUINTIC_GROUP | dict(momentum=0.0),
        "with a running mean of the gradients (0.9) added to them before each step", ROUNDING,
        prepare=plus_mean,
    ),
]  # fmt: skip
PEERS = dict.fromkeys(peer.package for peer in PEER_LIST)


def ours(peer: Peer, weight: Tensor, gradients: list[Tensor], lr: float, decay: float) -> list[Tensor]:
    train_gpt.ORTHOGONALIZERS["quintic"] = (1.0, QUINTIC, QUINTIC[-1])
    fields = peer.ours | ({"work_dtype": torch.float32} if "work_dtype" in peer.ours else {})
    gradients = peer.prepare(gradients) if peer.prepare else gradients

    def make(p, lr, decay):
        return train_gpt.MuonEq([dict(kind="matrix", params=[p], lr=lr, weight_decay=decay, **fields)])

    return of_torch(make)(weight, gradients, lr, decay)


def updates(weight: Tensor, weights: list[Tensor]) -> list[Tensor]:
    return [after - before for before, after in zip([weight, *weights], weights)]


def described(peer: Peer) -> dict:
    """A peer and its group, as it is written."""
    fields = ", ".join(f"{key}={value!r}" for key, value in peer.ours.items())
    written = fields.replace("'float32'", "torch.float32").replace("'", '"')
    return {"package": peer.package, "name": peer.name, "group": f"`{written}`", "said": peer.said}


def measure(peer: Peer) -> dict:
    line = described(peer) | {"tolerance": peer.tolerance}
    worst, rms = 0.0, []
    for m, n in SHAPES:
        generator = torch.Generator().manual_seed(0)
        weight = 0.02 * torch.randn(m, n, generator=generator)
        gradients = [torch.randn(m, n, generator=generator) for _ in range(peer.steps)]
        theirs = updates(weight, peer.theirs(weight, gradients, LR, DECAY))
        mine = updates(weight, ours(peer, weight, gradients, LR, DECAY))
        worst = max(worst, *[((a - b).norm() / a.norm()).item() for a, b in zip(theirs, mine)])
        # as the library stores it, where ours is transposed: the same shape of its own
        stored = weight.T.contiguous() if "optax" in peer.name else weight
        grad = gradients[0].T.contiguous() if "optax" in peer.name else gradients[0]
        first = peer.theirs(stored, [grad], 1.0, 0.0)[0] - stored
        rms.append(first.square().mean().sqrt().item())
    return line | {"worst": worst, "rms": rms}


def run(package: str) -> list[dict]:
    torch.set_num_threads(1)
    lines = []
    for peer in PEER_LIST:
        if peer.package == package:
            try:
                lines.append(measure(peer))
            except Exception as error:
                why = f"{type(error).__name__}: {error}".splitlines()[0][:150]
                lines.append(described(peer) | {"why": why})
    return lines


def peers_table(lines: list[dict]) -> str:
    from crossings import PACKAGES

    rows = ["| Muon of | a matrix group that does the same | remark | differs by | tolerance |"]
    rows += ["| --- | --- | --- | --- | --- |"]
    for line in lines:
        name = line.get("name", line["package"])
        found, bound = line.get("why", ""), ""
        if not found:
            good = line["worst"] <= line["tolerance"]
            found = f"{line['worst']:.1e}" if good else f"**{line['worst']:.1e}: too much**"
            bound = f"{line['tolerance']:g}"
        peer = f"{name}, {line['package']} {PACKAGES[line['package']]}"
        rows.append(f"| {peer} | {line.get('group', '')} | {line.get('said', '')} | {found} | {bound} |")
    return "\n".join(rows).replace("|  |", "| |")


def steps_table(lines: list[dict]) -> str:
    from crossings import PACKAGES

    (a, b), (c, d) = SHAPES
    rows = [f"| Muon of | version | RMS, {a} x {b} | RMS, {c} x {d} |", "| --- | --- | --- | --- |"]
    for line in lines:
        if "rms" in line and "nesterov=False" not in line["name"]:
            wide, tall = line["rms"]
            rows.append(f"| {line['name']} | {PACKAGES[line['package']]} | {wide:.4f} | {tall:.4f} |")
    return "\n".join(rows)
