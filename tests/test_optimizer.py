"""MuonEq in one process, against the published formulas written independently in float64.

The matrix reference never forms a Gram matrix: it applies the scalar polynomial to the singular values
of an SVD. Every test passes the fields it depends on, so a changed default breaks only the test of the
documented defaults.
"""

import io
import itertools
import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt
from train_gpt import MuonEq

SHAPES = {"tall": (12, 5), "wide": (5, 12), "square": (8, 8)}
EQUILIBRATE = ("none", "row", "col", "rowcol", "both")

MATRIX = dict(
    lr=0.1,
    weight_decay=0.0,
    cautious=False,
    momentum=0.9,
    nesterov=True,
    equilibrate="none",
    equilibrate_exponent=-0.5,
    phase=None,
    orthogonalize="polar_express",
    steps=5,
    norm_bound="frobenius",
    normuon=False,
    normuon_axis="auto",
    beta2=0.95,
    scale="spectral",
    lr_mul=1.0,
    work_dtype=torch.float32,
    every=1,
)
ADAM = dict(lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, cautious=False, every=1)

JORDAN = (3.4445, -4.7750, 2.0315)
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


# --------------------------------------------------------------------------------------------------
# References


def triples(method, steps):
    """Coefficients of every iteration: Jordan's quintic (Muon) or Polar Express (arXiv 2505.16932),
    five-step list."""
    if method == "newton_schulz":
        return [JORDAN] * steps
    return [*POLAR_EXPRESS[max(0, 5 - steps) :], *[(1.875, -1.25, 0.375)] * max(0, steps - 5)]


def orthogonalized(x, method, steps, bound):
    """U f(s / b) V^T with f the composed odd quintic; b bounds s[0]: the Frobenius norm, or (MuonEq's
    spc) the Schatten-8 norm ||(X X^T)^2||_F^(1/4), times Polar Express's margin."""
    u, s, vt = torch.linalg.svd(x, full_matrices=False)
    power = {"frobenius": 2, "spc": 8}[bound]
    s = s / s.pow(power).sum() ** (1 / power) / (1.02 if method == "polar_express" else 1.0)
    for a, b, c in triples(method, steps):
        s = a * s + b * s**3 + c * s**5
    return u * s @ vt


def equilibrated(u, mode, exponent):
    """MuonEq: diag(r)^e U diag(c)^e, r and c sums of squares of the same U, with a relative floor of 1e-8."""
    floor = lambda r: (r + 1e-8 * r.mean() + 1e-30) ** exponent  # noqa: E731
    out = u
    if mode in ("row", "rowcol"):
        out = out * floor(u.square().sum(1, keepdim=True))
    if mode in ("col", "rowcol"):
        out = out * floor(u.square().sum(0, keepdim=True))
    return out


def two_sided(u, energies, t):
    """IsoMuon with the energy of the momentum: B^-1/2 and A^-1/2, B and A = (energy / geometric mean)^0.25
    within [1/2, 2]. `energies` are means of decay 0.95 of the sums of squares of rows and columns, updated
    here, from which t updates are corrected for the zero that they began at; what is zero does not count.
    """
    roots = []
    for energy, dim in zip(energies, (1, 0)):
        energy.mul_(0.95).add_(0.05 * u.square().sum(dim, keepdim=True))
        mean = energy / (1 - 0.95**t)
        ratio = mean / mean[mean > 0].log().mean().exp()
        roots.append(1 / ratio.pow(0.25).clamp(0.5, 2).sqrt())
    return roots


def shape_factor(rule, m, n):
    """Muon's sqrt(max(1, m/n)), or Moonlight's 0.2 sqrt(max(m, n)) (arXiv 2502.16982)."""
    return math.sqrt(max(1, m / n)) if rule == "spectral" else 0.2 * math.sqrt(max(m, n))


def matrix_reference(p, grads, **fields):
    """Float64 trajectory of one matrix: Muon (EMA momentum), MuonEq, NorMuon (arXiv 2510.05491),
    cautious decay (arXiv 2510.12402). Returns the weights after each gradient."""
    f = MATRIX | fields
    p, (m, n) = p.double(), p.shape
    buf, second, out = torch.zeros_like(p), 0.0, []
    energies = [torch.zeros(m, 1).double(), torch.zeros(1, n).double()]
    per_row = f["normuon_axis"] == "row" or (f["normuon_axis"] == "auto" and m >= n)
    for t, g in enumerate(grads, start=1):
        g = g.double()
        buf = f["momentum"] * buf + (1 - f["momentum"]) * g
        u = f["momentum"] * buf + (1 - f["momentum"]) * g if f["nesterov"] else buf
        switched = f["phase"] is not None and t >= f["phase"] and f["equilibrate"] == "rowcol"
        x = equilibrated(u, "row" if switched else f["equilibrate"], f["equilibrate_exponent"])
        if f["equilibrate"] == "both":
            left, right = two_sided(u, energies, t)
            x = left * u * right
        o = orthogonalized(x, f["orthogonalize"], f["steps"], f["norm_bound"])
        if f["equilibrate"] == "both":
            o = (left * o * right) * (o.norm() / (left * o * right).norm())
        if f["normuon"]:
            second = f["beta2"] * second + (1 - f["beta2"]) * o.square().mean(
                1 if per_row else 0, keepdim=True
            )
            normalized = o / second.clamp(min=1e-10).sqrt()
            o = normalized * o.norm() / normalized.norm()
        decay = f["lr"] * f["weight_decay"] * (p * (o * p >= 0) if f["cautious"] else p)
        p = p - f["lr"] * shape_factor(f["scale"], m, n) * f["lr_mul"] * o - decay
        out.append(p)
    return out


def adam_reference(p, grads, **fields):
    """Float64 AdamW trajectory (arXiv 1711.05101, epsilon after bias correction), decay only where
    update * p > 0 if cautious."""
    f = ADAM | fields
    p, (b1, b2) = p.double(), f["betas"]
    exp_avg, exp_avg_sq, out = torch.zeros_like(p), torch.zeros_like(p), []
    for t, g in enumerate(grads, start=1):
        exp_avg = b1 * exp_avg + (1 - b1) * g.double()
        exp_avg_sq = b2 * exp_avg_sq + (1 - b2) * g.double().square()
        update = exp_avg / (1 - b1**t) / ((exp_avg_sq / (1 - b2**t)).sqrt() + f["eps"])
        decayed = p * (update * p > 0) if f["cautious"] else p
        p = p - f["lr"] * update - f["lr"] * f["weight_decay"] * decayed
        out.append(p)
    return out


# --------------------------------------------------------------------------------------------------
# Helpers


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def gradients(shape, count, seed=100):
    return [randn(*shape, seed=seed + i) for i in range(count)]


def leaf(t):
    return t.clone().requires_grad_()


def optimizer(kind, params, grads="mean", **fields):
    return MuonEq(
        [dict(kind=kind, params=params, **(MATRIX if kind == "matrix" else ADAM) | fields)], grads=grads
    )


def take(opt, params, grads, **kwargs):
    """One step with these gradients (None: missing)."""
    for p, g in zip(params, grads, strict=True):
        p.grad = None if g is None else g.to(p.dtype).clone()
    return opt.step(**kwargs)


def trajectory(kind, p, grads, **fields):
    """Weights after each gradient, of one parameter alone."""
    w, out = leaf(p), []
    opt = optimizer(kind, [w], **fields)
    for g in grads:
        take(opt, [w], [g])
        out.append(w.detach().clone())
    return out


def close(actual, expected, atol=4e-6):
    for step, (a, e) in enumerate(zip(actual, expected, strict=True), start=1):
        error = (a.double() - e.double()).abs().max().item()
        assert error <= atol, f"update {step}: differs by {error:.2e}"


def first_update(g, **fields):
    """The orthogonalized update O of the first step, read off zero weights at lr = 1 (scale and
    lr_mul divided out)."""
    w = leaf(torch.zeros(g.shape))
    take(optimizer("matrix", [w], **{"lr": 1.0} | fields), [w], [g])
    return -w.detach() / shape_factor(fields.get("scale", "spectral"), *g.shape[-2:])


def same_state(a, b):
    """Bitwise equality of two state dicts, dtypes included."""
    assert a["step"] == b["step"] and a["state"].keys() == b["state"].keys()
    for name, entry in a["state"].items():
        assert entry.keys() == b["state"][name].keys()
        for key, value in entry.items():
            other = b["state"][name][key]
            if torch.is_tensor(value):
                assert value.dtype == other.dtype == torch.float32 and torch.equal(value, other), (name, key)
            else:
                assert value == other, (name, key)


# --------------------------------------------------------------------------------------------------
# The references themselves


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("method", ["polar_express", "newton_schulz"])
def test_reference_equals_gram_form(method, shape):
    x = randn(*shape).double()
    for bound in ("frobenius", "spc"):
        gram = x @ x.T
        y = x / (x.norm() if bound == "frobenius" else (gram @ gram).norm() ** 0.25)
        y = y / 1.02 if method == "polar_express" else y
        for a, b, c in triples(method, 4):
            gram = y @ y.T
            y = a * y + (b * gram + c * gram @ gram) @ y
        torch.testing.assert_close(y, orthogonalized(x, method, 4, bound))


def test_reference_adam_equals_torch():
    p, grads = randn(7, 3), gradients((7, 3), 4)
    w = leaf(p.double())
    opt = torch.optim.AdamW([w], lr=0.01, betas=(0.8, 0.95), eps=1e-2, weight_decay=0.3)
    for g, expected in zip(
        grads, adam_reference(p, grads, betas=(0.8, 0.95), eps=1e-2, weight_decay=0.3), strict=True
    ):
        w.grad = g.double()
        opt.step()
        torch.testing.assert_close(w.detach(), expected)


# --------------------------------------------------------------------------------------------------
# Muon


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("steps", [1, 3, 5, 7])
@pytest.mark.parametrize("method", ["polar_express", "newton_schulz"])
def test_muon_follows_the_published_formulas(method, steps, nesterov, shape):
    p, grads = randn(*shape), gradients(shape, 4)
    fields = dict(orthogonalize=method, steps=steps, nesterov=nesterov)
    close(trajectory("matrix", p, grads, **fields), matrix_reference(p, grads, **fields))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_many_steps_reach_the_polar_factor(shape):
    g = randn(*shape, seed=3)
    u, _, vt = torch.linalg.svd(g.double(), full_matrices=False)
    close([first_update(g, steps=12)], [u @ vt], atol=1e-5)


def as_graphs_do(monkeypatch):
    """Chunks on the CPU are updated by the functions that a GPU compiles, as they are."""
    monkeypatch.setattr(train_gpt, "graph_of", lambda function: function)
    fits = lambda unit, stored: unit.matrix or len(stored) % train_gpt.ROW == 0  # noqa: E731
    monkeypatch.setattr(train_gpt.Unit, "fits_graph", fits)
    monkeypatch.setattr(train_gpt.RowUnit, "fits_graph", lambda unit, grad: True)


def four_steps(compiled, dtype):
    """Matrices and numbers, settings that change, weights that others change, gradients that are infinite."""
    shapes = [(4, 12, 8), (3, 8, 16), (64, 32), (32, 64), (7,)]
    params = [leaf(randn(*shape, seed=i).to(dtype)) for i, shape in enumerate(shapes)]
    fields = [
        MATRIX | dict(kind="matrix", normuon=True, cautious=True, lr_mul=(1.0, 2.0)),
        MATRIX | dict(kind="matrix", equilibrate="row", nesterov=False, norm_bound="spc"),
        ADAM | dict(kind="adam", cautious=True), ADAM | dict(kind="adam"), ADAM | dict(kind="adam"),
    ]  # fmt: skip
    opt = MuonEq([{**x, "params": [p]} for x, p in zip(fields, params)], grads="token_sum")
    opt.compiled = compiled
    for step in range(4):
        for number, (group, p) in enumerate(zip(opt.param_groups, params)):
            group |= {"lr": 0.1 / (1 + step), "weight_decay": 0.1 + 0.1 * step, "momentum": 0.9 - 0.1 * step}
            p.grad = 100 * randn(*p.shape, seed=10 * step + number)
            if step == 2:
                p.data[0] *= 3
        params[2].grad.view(-1)[5] = math.inf if step == 3 else 0.0
        opt.step(tokens=90 + step)
    return opt, params


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_gpu_compiles_updates_as_the_plain_path(dtype, monkeypatch):
    as_graphs_do(monkeypatch)
    (plain, expected), (graphs, found) = (four_steps(compiled, dtype) for compiled in (False, True))
    for p, q in zip(expected, found):
        assert plain.state[p].keys() == graphs.state[q].keys()
        for key, value in plain.state[p].items():
            scale = value.abs().max().clamp(1.0, 1e9)
            close([graphs.state[q][key] / scale], [value / scale])
        if dtype == torch.bfloat16:
            assert torch.equal(q, graphs.state[q]["master"].to(dtype))
        else:
            close([q], [p])
    for opt, params in ((plain, expected), (graphs, found)):
        params[1].grad[1, 2, 3] = math.nan
        opt.step(tokens=1)
    assert graphs.bad_since().tolist() == plain.bad_since().tolist()
    assert sorted(graphs.bad_since().tolist()) == [4, 5, math.inf, math.inf, math.inf]


def test_slices_of_a_cpu_give_the_same_update(monkeypatch):
    """A bank and an Adam parameter in slices of one matrix and of seven elements: each is updated once."""
    results = []
    for sizes in ({"matrix": 10**9, "adam": 10**9}, {"matrix": 1, "adam": 7}):
        monkeypatch.setattr(train_gpt.Unit, "SLICE", sizes)
        generator = torch.Generator().manual_seed(0)
        params = [
            torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((5, 6, 4), (10, 5))
        ]
        groups = [dict(MATRIX, normuon=True, lr_mul=[1.0, 2.0, 0.5, 1.0, 3.0]), ADAM]
        kinds = zip(("matrix", "adam"), params, groups)
        optimizer = MuonEq([dict(group, kind=kind, params=[p]) for kind, p, group in kinds])
        for _ in range(3):
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()
        results.append(params)
    for whole, sliced in zip(*results):
        torch.testing.assert_close(sliced, whole, rtol=1e-5, atol=1e-6)


def test_momentum_is_an_ema_read_at_every_step():
    """With a changing momentum the EMA form differs from the heavy-ball form."""
    w, buf = leaf(randn(6, 4)), torch.zeros(6, 4, dtype=torch.float64)
    opt = optimizer("matrix", [w])
    for momentum, g in zip((0.5, 0.9, 0.7, 0.95), gradients((6, 4), 4), strict=True):
        opt.param_groups[0]["momentum"] = momentum
        take(opt, [w], [g])
        buf = momentum * buf + (1 - momentum) * g.double()
        close([opt.state_dict()["state"]["0"]["momentum"]], [buf], atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_callable_orthogonalizer(shape):
    seen = []

    def polar(x):
        seen.append((x.shape, x.dtype))
        u, _, vt = torch.linalg.svd(x, full_matrices=False)
        return u @ vt

    params, grads = [leaf(randn(*shape, seed=i)) for i in range(2)], gradients(shape, 2)
    starts = [p.detach().clone() for p in params]
    take(optimizer("matrix", params, orthogonalize=polar, scale="match_rms_adamw"), params, grads)
    assert seen == [((2, *shape), torch.float32)]
    for p, start, g in zip(params, starts, grads, strict=True):
        u, _, vt = torch.linalg.svd(g.double(), full_matrices=False)
        close([p.detach()], [start.double() - 0.1 * shape_factor("match_rms_adamw", *shape) * u @ vt])


def test_a_method_of_ones_own_is_an_entry_of_a_table(monkeypatch):
    """A function and a list of triples under names of their own, chosen as the command line chooses them."""
    cubic = (1.0, ((1.5, -0.5, 0.0),), (1.5, -0.5, 0.0))
    monkeypatch.setitem(train_gpt.ORTHOGONALIZERS, "sign", torch.sign)
    monkeypatch.setitem(train_gpt.ORTHOGONALIZERS, "cubic", cubic)
    track, run = train_gpt.parse_command_line(["--track", "tiny", "--matrix.orthogonalize", "sign"])
    train_gpt.check_settings(track, run)
    g = randn(4, 6)
    torch.testing.assert_close(
        train_gpt.orthogonalize(g[None], "sign", work_dtype=torch.float32)[0], g.sign()
    )
    expected = first_update(g, equilibrate="none", orthogonalize=torch.sign)
    assert torch.equal(first_update(g, equilibrate="none", orthogonalize="sign"), expected) and expected.any()
    x = g.double() / g.double().norm()
    for _ in range(3):
        x = 1.5 * x - 0.5 * x @ x.mT @ x
    (found,) = train_gpt.orthogonalize(g[None], "cubic", 3, work_dtype=torch.float32)
    torch.testing.assert_close(found.double(), x, rtol=1e-5, atol=1e-6)
    with pytest.raises(
        ValueError, match="orthogonalize is one of polar_express, newton_schulz, sign, cubic, not 'svd'"
    ):
        optimizer("matrix", [leaf(g)], orthogonalize="svd")
    with pytest.raises(ValueError, match="one of polar_express, newton_schulz, sign, cubic"):
        train_gpt.check_settings(
            *train_gpt.parse_command_line(["--track", "tiny", "--gate.orthogonalize", "svd"])
        )


@pytest.mark.parametrize("rule", ["spectral", "match_rms_adamw"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shape_scale(shape, rule):
    p, grads = randn(*shape), gradients(shape, 2)
    fields = dict(scale=rule, lr_mul=0.5)
    close(trajectory("matrix", p, grads, **fields), matrix_reference(p, grads, **fields))


@pytest.mark.parametrize("adjust, rule", [("original", "spectral"), ("match_rms_adamw", "match_rms_adamw")])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_equals_torch_muon(shape, adjust, rule, monkeypatch):
    """torch.optim.Muon iterates in bfloat16; with that cast replaced by a cast to float32 the two
    agree to rounding. Up to torch 2.14 it casts by `grad.bfloat16()`, in 2.15 by `grad.to`.
    """

    def to_float32(x: torch.Tensor, *args, cast=torch.Tensor.to, **kwargs) -> torch.Tensor:
        exact = {torch.bfloat16: torch.float32}
        args = [exact.get(arg, arg) if isinstance(arg, torch.dtype) else arg for arg in args]
        kwargs = {name: exact.get(arg, arg) if name == "dtype" else arg for name, arg in kwargs.items()}
        return cast(x, *args, **kwargs)

    for exact in (True, False):
        ours, theirs = leaf(randn(*shape)), leaf(randn(*shape))
        work = torch.float32 if exact else torch.bfloat16
        fields = dict(orthogonalize="newton_schulz", scale=rule, weight_decay=0.3, work_dtype=work)
        a = optimizer("matrix", [ours], **fields)
        b = torch.optim.Muon([theirs], lr=0.1, momentum=0.9, weight_decay=0.3, adjust_lr_fn=adjust)
        for g in gradients(shape, 3):
            take(a, [ours], [g])
            with monkeypatch.context() as patch:
                if exact:
                    patch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)
                    patch.setattr(torch.Tensor, "to", to_float32)
                take(b, [theirs], [g])
        close([ours.detach()], [theirs.detach()], atol=4e-6 if exact else 0.02)


@settings(deadline=None, max_examples=25, derandomize=True)
@given(
    st.integers(2, 24),
    st.integers(2, 24),
    st.integers(1, 24),
    st.sampled_from(EQUILIBRATE[:1] * 2 + ("row",)),
)
def test_singular_values(m, n, rank, mode):
    """All non-zero singular values land in [0.85, 1.15], the zero ones stay zero."""
    rank = min(m, n, rank)
    left, right = (torch.linalg.qr(randn(k, rank, seed=k))[0] for k in (m, n))
    g = left * torch.logspace(0, -1.5, rank) @ right.T
    s = torch.linalg.svdvals(first_update(g, equilibrate=mode).double())
    assert 0.85 <= s[:rank].min() and s[:rank].max() <= 1.15
    assert s[rank:].numel() == 0 or s[rank:].max() < 2e-3


@pytest.mark.parametrize("shape", [(48, 16), (16, 48), (16, 17)], ids=str)
@pytest.mark.parametrize("bound", ["frobenius", "spc"])
def test_singular_values_in_bfloat16(shape, bound):
    s = torch.linalg.svdvals(first_update(randn(*shape), norm_bound=bound, work_dtype=torch.bfloat16))
    assert 0.84 <= s.min() and s.max() <= 1.16


@pytest.mark.parametrize("method", ["polar_express", "newton_schulz"])
def test_iterates_in_the_work_dtype(method):
    """At lr 1 from zero weights the update itself shows: on the bfloat16 grid or not."""
    low, full = (
        first_update(randn(8, 8), work_dtype=w, orthogonalize=method) for w in (torch.bfloat16, torch.float32)
    )
    assert torch.equal(low, low.bfloat16().float()) and not torch.equal(full, full.bfloat16().float())


@pytest.mark.parametrize("bound", ["frobenius", "spc"])
def test_orthogonal_input_does_not_diverge(bound):
    """Rank one and orthogonal matrices meet the bounds with equality."""
    for g in (torch.linalg.qr(randn(16, 16))[0], torch.outer(randn(16), randn(16, seed=1))):
        for work in (torch.float32, torch.bfloat16):
            s = torch.linalg.svdvals(first_update(g, norm_bound=bound, work_dtype=work))
            assert 0.84 <= s[0] <= 1.16


# --------------------------------------------------------------------------------------------------
# MuonEq


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("bound", ["frobenius", "spc"])
@pytest.mark.parametrize("exponent", [-0.5, -0.25])
@pytest.mark.parametrize("mode", EQUILIBRATE)
def test_muoneq_follows_the_published_formulas(mode, exponent, bound, shape):
    scales = torch.logspace(-1, 1, shape[0])[:, None] * torch.logspace(0.7, -0.7, shape[1])
    p, grads = randn(*shape), [g * scales for g in gradients(shape, 3)]
    fields = dict(equilibrate=mode, equilibrate_exponent=exponent, norm_bound=bound)
    close(trajectory("matrix", p, grads, **fields), matrix_reference(p, grads, **fields), atol=2e-5)


def test_spc_with_newton_schulz_has_no_margin():
    p, grads = randn(5, 12), gradients((5, 12), 2)
    fields = dict(norm_bound="spc", orthogonalize="newton_schulz", steps=4)
    close(trajectory("matrix", p, grads, **fields), matrix_reference(p, grads, **fields))


@pytest.mark.parametrize("mode", ["row", "col", "rowcol"])
def test_equilibrate_floor_is_relative(mode):
    """A row and a column 1e-4 as long as the others lie at the floor of 1e-8 times the mean square."""
    p, g = randn(6, 8), randn(6, 8, seed=1)
    g[2] *= 1e-4
    g[:, 5] *= 1e-4
    for size in (1.0, 1e-6, 1e6):
        fields = dict(equilibrate=mode, momentum=0.0)
        close(trajectory("matrix", p, [g * size], **fields), matrix_reference(p, [g], **fields), atol=2e-5)


@pytest.mark.parametrize("mode, dim", [("row", -1), ("col", -2)])
def test_equilibrated_lines_have_equal_length(mode, dim):
    """Seen by a callable that returns its input: "row" is dim -2 of the stored tensor."""
    g = randn(3, 6, 9) * torch.logspace(-1, 1, 6)[:, None] * torch.logspace(1, -1, 9)
    lengths = first_update(g, equilibrate=mode, orthogonalize=lambda x: x).norm(dim=dim)
    torch.testing.assert_close(
        lengths / lengths.mean(-1, keepdim=True), torch.ones_like(lengths), rtol=1e-3, atol=0
    )


@pytest.mark.parametrize("mode", EQUILIBRATE)
@pytest.mark.parametrize("every", [1, 2])
def test_phase_switch(mode, every):
    """Updates t >= phase use "row" instead of "rowcol"; updates are counted, not calls; other modes
    ignore it."""
    p, grads = randn(6, 9), [g * torch.logspace(-1, 1, 9) for g in gradients((6, 9), 5)]
    expected = matrix_reference(p, grads, equilibrate=mode, phase=3)
    w = leaf(p)
    opt = optimizer("matrix", [w], equilibrate=mode, phase=3, every=every)
    for t, g in enumerate(grads):
        for _ in range(every):
            take(opt, [w], [g])
        close([w.detach()], [expected[t]], atol=1e-5)
    if mode == "rowcol":
        for t, phase in ((1, 2), (2, 4)):  # a switch one update early or late is not within the tolerance
            assert (
                matrix_reference(p, grads, equilibrate=mode, phase=phase)[t] - expected[t]
            ).abs().max() > 1e-3


@pytest.mark.parametrize("factor", [1e-6, 1e6])
@pytest.mark.parametrize("bound", ["frobenius", "spc"])
@pytest.mark.parametrize("normuon", [False, True])
@pytest.mark.parametrize("mode", EQUILIBRATE)
def test_scale_invariance(mode, normuon, bound, factor):
    p, grads = randn(5, 12), gradients((5, 12), 3)
    for exponent in (-0.5, -0.25):
        fields = dict(equilibrate=mode, equilibrate_exponent=exponent, norm_bound=bound, normuon=normuon)
        scaled = trajectory("matrix", p, [g * factor for g in grads], **fields)
        close(scaled, trajectory("matrix", p, grads, **fields), atol=1e-5)


# --------------------------------------------------------------------------------------------------
# NorMuon


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("axis", ["auto", "row", "col"])
def test_normuon_follows_the_published_formulas(axis, shape):
    p, grads = randn(*shape), gradients(shape, 4)
    fields = dict(normuon=True, normuon_axis=axis, beta2=0.8)
    close(trajectory("matrix", p, grads, **fields), matrix_reference(p, grads, **fields), atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("normuon, growth", [(False, 2.0), (True, 2.0), (False, 2.0**15), (False, 2.0**-12)])
def test_the_two_sided_balance_remembers_and_is_clipped(normuon, growth, shape):
    """Energies that move over eight steps by more than the bounds, also where squares would not fit; rows
    that are zero at first or always."""
    grads = gradients(shape, 8)
    for t, grad in enumerate(grads):
        rows, columns = torch.logspace(-1.5, 1.5, shape[0]), torch.logspace(1 - t / 2, -1, shape[1])
        grad *= growth**t * rows[:, None] * columns
        grad[1 : 3 if t < 4 else 2] = 0
    fields = dict(equilibrate="both", momentum=0.5, normuon=normuon)
    expected = matrix_reference(randn(*shape), grads, **fields)
    close(trajectory("matrix", randn(*shape), grads, **fields), expected)


def test_the_two_sided_balance_has_published_numbers():
    """Energies 1, 16 and 2^20 of rows, equal columns: B is 2^-2, clipped to 2^-1, ... by hand."""
    seen = []
    look = lambda x: seen.append(x) or torch.ones_like(x)  # noqa: E731
    p = leaf(torch.zeros(3, 3))
    opt = optimizer("matrix", [p], lr=1.0, equilibrate="both", nesterov=False, momentum=0, orthogonalize=look)
    rows = torch.tensor([1.0, 4.0, 1024.0])[:, None] / 3**0.5
    take(opt, [p], [rows.expand(3, 3)])
    # the geometric mean of the energies is 2^8: ratios 2^-8, 2^-4 and 2^12, B = 1/4, 1/2 and 8
    root = torch.tensor([0.5, 0.5, 2.0]).rsqrt()[:, None]
    close([seen[0][0]], [rows * root])
    balanced = root.expand(3, 3)
    close([-p.detach()], [balanced * 3 / balanced.norm()])


@pytest.mark.parametrize("shape, axis, expected", [
    ((12, 5), "auto", (1, 12, 1)),
    ((8, 8), "auto", (1, 8, 1)),
    ((5, 12), "auto", (1, 1, 12)),
    ((5, 12), "row", (1, 5, 1)),
    ((12, 5), "col", (1, 1, 5)),
    ((3, 12, 5), "auto", (3, 12, 1)),
    ((3, 5, 12), "auto", (3, 1, 12)),
])  # fmt: skip
def test_normuon_state(shape, axis, expected):
    w = leaf(randn(*shape))
    opt = optimizer("matrix", [w], normuon=True, normuon_axis=axis)
    take(opt, [w], [randn(*shape, seed=1)])
    state = opt.state_dict()["state"]["0"]
    assert state["second_moment"].shape[-2:] == expected[-2:] and state["momentum"].shape == shape
    assert state["second_moment"].numel() == math.prod(expected) and state["updates"] == 1


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("work", [torch.float32, torch.bfloat16], ids=str)
def test_normuon_keeps_the_frobenius_norm(work, shape):
    grads = gradients(shape, 3)
    for axis in ("row", "col"):
        zero = torch.zeros(shape)
        plain = trajectory("matrix", zero, grads, work_dtype=work)
        normed = trajectory("matrix", zero, grads, work_dtype=work, normuon=True, normuon_axis=axis)
        previous = (zero, zero)
        for pair in zip(plain, normed, strict=True):
            a, b = (new - old for new, old in zip(pair, previous, strict=True))
            assert b.norm() / a.norm() == pytest.approx(1, abs=1e-5 if work == torch.float32 else 1e-3)
            previous = pair


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_everything_composed(shape):
    p, grads = randn(*shape), gradients(shape, 6)
    fields = dict(
        equilibrate="rowcol",
        phase=4,
        norm_bound="spc",
        normuon=True,
        beta2=0.9,
        weight_decay=0.5,
        cautious=True,
        scale="match_rms_adamw",
        lr_mul=0.7,
        lr=0.03,
    )
    close(trajectory("matrix", p, grads, **fields), matrix_reference(p, grads, **fields), atol=1e-5)


# --------------------------------------------------------------------------------------------------
# Stacks and banks


@pytest.mark.parametrize("layout", ["bank", "list"])
def test_lr_mul_per_matrix(layout):
    starts, grads = [randn(5, 12, seed=i) for i in range(3)], gradients((5, 12), 3)
    multipliers = (0.5, 1.0, 4.0)
    params = [leaf(torch.stack(starts))] if layout == "bank" else [leaf(s) for s in starts]
    opt = optimizer("matrix", params, lr_mul=multipliers, weight_decay=0.4)
    for _ in range(2):
        take(opt, params, [torch.stack(grads)] if layout == "bank" else grads)
    result = params[0].detach() if layout == "bank" else [p.detach() for p in params]
    for w, start, g, mul in zip(result, starts, grads, multipliers, strict=True):
        close([w], matrix_reference(start, [g, g], lr_mul=mul, weight_decay=0.4)[1:])


def test_lr_mul_follows_parameter_order_when_shapes_interleave():
    shapes, multipliers = [(4, 6), (6, 4), (2, 4, 6), (6, 4), (4, 6)], (1.0, 2.0, 3.0, 4.0, 5.0, 6.0)
    params = [leaf(randn(*s, seed=i)) for i, s in enumerate(shapes)]
    starts = [p.detach().clone() for p in params]
    grads = [randn(*s, seed=10 + i) for i, s in enumerate(shapes)]
    take(optimizer("matrix", params, lr_mul=multipliers), params, grads)
    flat = [[m for t in ts for m in t.detach().reshape(-1, *t.shape[-2:])] for ts in (params, starts, grads)]
    for w, start, g, mul in zip(*flat, multipliers, strict=True):
        close([w], matrix_reference(start, [g], lr_mul=mul), atol=2e-5)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("work", [torch.float32, torch.bfloat16], ids=str)
def test_stack_equals_one_by_one(work, shape):
    starts = [randn(*shape, seed=i) for i in range(3)]
    grads = [[g * 10.0**i for i, g in enumerate(gradients(shape, 3, seed=s))] for s in (50, 60, 70)]
    fields = dict(
        equilibrate="row", normuon=True, cautious=True, weight_decay=0.2, norm_bound="spc", work_dtype=work
    )
    alone = [trajectory("matrix", s, [g[i] for g in grads], **fields)[-1] for i, s in enumerate(starts)]
    bank, rows = leaf(torch.stack(starts)), [leaf(s) for s in starts]
    a, b = optimizer("matrix", [bank], **fields), optimizer("matrix", rows, **fields)
    for g in grads:
        take(a, [bank], [torch.stack(g)])
        take(b, rows, g)
    atol = 2e-6 if work == torch.float32 else 4e-3
    close(bank.detach(), alone, atol=atol)
    close([r.detach() for r in rows], alone, atol=atol)


@pytest.mark.parametrize("kind", ["matrix", "adam"])
def test_memory_layout_does_not_matter(kind):
    """A transposed parameter or gradient view gives what a contiguous one gives, and is updated in place."""
    p, grads = randn(5, 12), gradients((5, 12), 2)
    expected = trajectory(kind, p, grads)[-1]
    transposed = lambda t: t.T.contiguous().T  # noqa: E731
    for weight_layout, gradient_layout in (
        (transposed, torch.clone),
        (torch.clone, transposed),
        (transposed, transposed),
    ):
        w = weight_layout(p).requires_grad_()
        pointer, opt = w.data_ptr(), optimizer(kind, [w])
        for g in grads:
            w.grad = gradient_layout(g)
            opt.step()
        close([w.detach()], [expected], atol=1e-6)
        assert w.data_ptr() == pointer


# --------------------------------------------------------------------------------------------------
# Decay


@pytest.mark.parametrize("cautious", [False, True])
@pytest.mark.parametrize("rule", ["spectral", "match_rms_adamw"])
def test_matrix_decay(rule, cautious):
    """Decay is lr * weight_decay, whatever the shape factor and lr_mul are."""
    p, grads = randn(12, 5), gradients((12, 5), 4)
    fields = dict(weight_decay=0.8, cautious=cautious, scale=rule, lr_mul=3.0)
    close(trajectory("matrix", p, grads, **fields), matrix_reference(p, grads, **fields), atol=1e-5)


@pytest.mark.parametrize("cautious", [False, True])
@pytest.mark.parametrize("kind", ["matrix", "adam"])
def test_decay_truth_table(kind, cautious):
    """All sign pairs of update and weight.

    A matrix update of zero decays (>=), an Adam update of zero does not (>).
    """
    p = torch.tensor([-2.0, 0.0, 2.0]).repeat(3, 1)
    update = torch.tensor([-1.0, 0.0, 1.0])[:, None].repeat(1, 3)
    opposite = update * p < 0 if kind == "matrix" else update * p <= 0
    decayed = torch.where(opposite, 0.0, p) if cautious else p
    fields = dict(lr=0.125, weight_decay=0.5, cautious=cautious)
    if kind == "matrix":  # the callable decides the update
        fields["orthogonalize"] = lambda x: update.expand_as(x).clone()
    else:  # the first Adam update is the sign of the gradient
        fields["eps"] = 1e-12
    (w,) = trajectory(kind, p, [update + (kind == "matrix")], **fields)
    torch.testing.assert_close(w, p - 0.125 * update - 0.0625 * decayed, rtol=0, atol=1e-6)


def test_hyperparameters_are_read_at_every_step():
    p, grads = randn(6, 4), gradients((6, 4), 2)
    for kind in ("matrix", "adam"):
        fields = MATRIX if kind == "matrix" else ADAM
        w = leaf(p)
        opt = optimizer(kind, [w], weight_decay=0.5)
        take(opt, [w], [grads[0]])
        before = w.detach().clone()
        opt.param_groups[0].update(lr=0.0)
        take(opt, [w], [grads[1]])
        assert torch.equal(w, before)
        opt.param_groups[0].update(lr=fields["lr"], weight_decay=0.0)
        half = leaf(before)
        twin = optimizer(kind, [half], lr=fields["lr"] / 2)
        twin.load_state_dict(opt.state_dict())
        twin.param_groups[0].update(lr=fields["lr"] / 2, weight_decay=0.0)
        take(opt, [w], [grads[0]])
        take(twin, [half], [grads[0]])
        torch.testing.assert_close(w - before, 2 * (half - before), rtol=0, atol=1e-6)


# --------------------------------------------------------------------------------------------------
# Adam


@pytest.mark.parametrize("eps", [1e-8, 0.1])
@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
@pytest.mark.parametrize("shape", [(), (7,), (5, 6), (2, 3, 4)], ids=str)
def test_adam_equals_torch_adamw(shape, weight_decay, eps):
    p, grads = randn(*shape), gradients(shape, 6)
    w = leaf(p)
    opt = torch.optim.AdamW([w], lr=0.02, betas=(0.8, 0.95), eps=eps, weight_decay=weight_decay)
    expected = []
    for g in grads:
        take(opt, [w], [g])
        expected.append(w.detach().clone())
    fields = dict(lr=0.02, betas=(0.8, 0.95), eps=eps, weight_decay=weight_decay)
    close(trajectory("adam", p, grads, **fields), expected, atol=1e-6)


def test_cautious_adam():
    p, grads = randn(9, 5), gradients((9, 5), 6)
    fields = dict(weight_decay=0.9, cautious=True, lr=0.05)
    close(trajectory("adam", p, grads, **fields), adam_reference(p, grads, **fields), atol=1e-6)


def test_adam_with_tiny_gradients():
    """Mean gradients of 1e-12 with an epsilon restated in their units: nothing underflows in fp32."""
    p, grads = randn(9, 5), [g * 1e-12 for g in gradients((9, 5), 3)]
    fields = dict(eps=1e-15)
    close(trajectory("adam", p, grads, **fields), adam_reference(p, grads, **fields), atol=1e-6)


# --------------------------------------------------------------------------------------------------
# Row-wise Adam


def rowwise_reference(p, grads, **fields):
    """Float64 trajectory of a table (R, D), each row of which is updated whether it has a gradient or not.

    Adam without a first moment; a row's second moment is that of the mean square of its gradient.
    """
    f = ADAM | dict(betas=(0.0, 0.9)) | fields
    p, beta2, out = p.double(), f["betas"][1], []
    second = torch.zeros(len(p), 1, dtype=torch.float64)
    for t, g in enumerate(grads, start=1):
        second = beta2 * second + (1 - beta2) * g.double().square().mean(1, keepdim=True)
        update = g.double() / ((second / (1 - beta2**t)).sqrt() + f["eps"])
        decayed = p * (update * p > 0) if f["cautious"] else p
        p = p - f["lr"] * update - f["lr"] * f["weight_decay"] * decayed
        out.append(p)
    return out, second


def table_gradients(count, share, rows=40, width=6):
    """Gradients of a table in which so large a share of the rows are not zero, others each time."""
    grads = []
    for i in range(count):
        read = torch.rand(rows, 1, generator=torch.Generator().manual_seed(i)) < share
        grads.append(randn(rows, width, seed=50 + i) * read)
    return grads


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("share", [0.2, 0.8])
@pytest.mark.parametrize("decay", [dict(), dict(weight_decay=0.9), dict(weight_decay=0.9, cautious=True)])
def test_rowwise_adam_equals_the_update_of_every_row(decay, share, told, compiled, monkeypatch):
    """Few rows are updated alone, many with all; rows that were read once are often left alone for long."""
    as_graphs_do(monkeypatch)
    p, grads = randn(40, 6), table_gradients(12, share)
    fields = dict(betas=(0.0, 0.9), rowwise=True, lr=0.05, **decay)
    w = leaf(p)
    opt, found = optimizer("adam", [w], **fields), []
    opt.compiled = compiled
    for g in grads:
        w.grad = g.clone()
        if told:
            w.grad.rows_read = g.ne(0).any(1)
        opt.step()
        opt.zero_grad()
        assert w.grad is None if not told else not w.grad.any() and not w.grad.rows_read.any()
        found.append(w.detach().clone())
    expected, second = rowwise_reference(p, grads, **fields)
    close(found, expected, atol=1e-6)
    close([opt.state[w]["exp_avg_sq"]], [second], atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_without_a_gradient_keep_their_bits(dtype):
    w = leaf(randn(40, 6).to(dtype))
    opt = optimizer("adam", [w], betas=(0.0, 0.9), rowwise=True, weight_decay=0.9, cautious=True)
    before = w.detach().clone()
    for g in table_gradients(2, 0.2):
        take(opt, [w], [g.to(dtype)])
    untouched = ~sum(g.ne(0).any(1) for g in table_gradients(2, 0.2)).bool()
    assert untouched.any() and torch.equal(w[untouched], before[untouched])
    assert (w != before).any(1).sum() == (~untouched).sum()


@pytest.mark.parametrize("compiled", [False, True])
def test_rowwise_bf16_tables_follow_an_fp32_master(compiled, monkeypatch):
    """As fp32 weights do, those that others changed included."""
    as_graphs_do(monkeypatch)
    low, high = leaf(randn(40, 6).bfloat16()), leaf(randn(40, 6).bfloat16().float())
    fields = dict(betas=(0.0, 0.9), rowwise=True, lr=2.0**-10)
    a, b = optimizer("adam", [low], **fields), optimizer("adam", [high], **fields)
    a.compiled = b.compiled = compiled
    for i, g in enumerate(table_gradients(20, 0.3)):
        g = g.bfloat16()
        for w, opt in ((low, a), (high, b)):
            w.grad = g.clone() if w is low else g.float()
            w.grad.rows_read = g.ne(0).any(1)
            opt.step()
            w.grad = None
        if i == 9:
            with torch.no_grad():
                low[:7], high[:7] = 0.5, 0.5
    read = table_gradients(20, 0.3)[19].ne(0).any(1)
    master = a.state_dict()["state"]["0"]["master"]
    assert torch.equal(master[read], high[read]) and torch.equal(low, high.bfloat16())


def test_state_of_element_wise_adam_is_taken_over():
    """As a checkpoint from before a track had row-wise tables has it: the mean of a row is as good."""
    p, grads = randn(40, 6), table_gradients(3, 0.5)
    a, b = leaf(p), leaf(p)
    dense = optimizer("adam", [a], betas=(0.9, 0.95))
    for g in grads:
        take(dense, [a], [g])
    rowwise = optimizer("adam", [b], betas=(0.0, 0.95), rowwise=True)
    saved = dense.state_dict()
    rowwise.load_state_dict({key: saved[key] for key in ("step", "state")})
    found = rowwise.state_dict()["state"]["0"]
    assert found.keys() == {"updates", "exp_avg_sq"} and found["updates"] == 3
    close([found["exp_avg_sq"]], [saved["state"]["0"]["exp_avg_sq"].mean(1, keepdim=True)], atol=0)
    with pytest.raises(ValueError, match="exp_avg"):
        dense.load_state_dict(rowwise.state_dict())


@pytest.mark.parametrize("size", [1e-15, 1e19, 1e25, 1e30])
def test_rows_with_gradients_of_any_size_move(size):
    p, g = randn(7, 6), randn(7, 6, seed=1).sign()
    w = leaf(p)
    opt = optimizer("adam", [w], betas=(0.0, 0.9), rowwise=True, eps=1e-20)
    for expected in rowwise_reference(p, [g] * 3)[0]:
        take(opt, [w], [g * size])
        close([w], [expected], atol=1e-6)
    assert opt.bad_since().isinf().all()


# --------------------------------------------------------------------------------------------------
# Gradients of any size


@pytest.mark.parametrize("exponent", [-126, -100, -75, -40, 40, 64, 99])
@pytest.mark.parametrize("mode", EQUILIBRATE)
def test_gradients_of_any_size_give_the_update_of_the_formulas(mode, exponent):
    """From the smallest normal number to 2^99 (6e29): squares would not fit into fp32."""
    p, grads = randn(5, 12), [g * 2.0**exponent for g in gradients((5, 12), 3)]
    for bound, normuon, nesterov in itertools.product(("frobenius", "spc"), (False, True), (False, True)):
        fields = dict(equilibrate=mode, norm_bound=bound, normuon=normuon, nesterov=nesterov)
        # below the smallest normal number fewer digits are left
        atol = 2e-5 if exponent > -120 else 2e-3
        expected = matrix_reference(p, [g.double() / 2.0**exponent for g in grads], **fields)
        close(trajectory("matrix", p, grads, **fields), expected, atol=atol)


@pytest.mark.parametrize("exponent", [-40, 20, 40])
def test_a_power_of_two_changes_no_bit(exponent):
    p, grads = randn(5, 12), gradients((5, 12), 3)
    for mode, normuon in itertools.product(EQUILIBRATE, (False, True)):
        fields = dict(equilibrate=mode, normuon=normuon, work_dtype=torch.bfloat16)
        scaled = trajectory("matrix", p, [g * 2.0**exponent for g in grads], **fields)
        assert all(map(torch.equal, scaled, trajectory("matrix", p, grads, **fields)))


def test_a_matrix_among_larger_ones_keeps_its_digits():
    """Sizes from 1e-38 to 1e30 in one bank: each matrix has a scale of its own."""
    sizes = [1e-37, 1e-30, 1e-22, 1e-10, 1.0, 1e10, 1e19, 1e30]
    grads = [randn(6, 4, seed=i) for i in range(len(sizes))]
    bank = leaf(torch.zeros(len(sizes), 6, 4))
    take(optimizer("matrix", [bank]), [bank], [torch.stack([g * size for g, size in zip(grads, sizes)])])
    for w, g in zip(bank.detach(), grads):
        close([w], matrix_reference(torch.zeros(6, 4), [g]))


@pytest.mark.parametrize("size", [1e19, 1e25, 1e30])
def test_large_gradients_move_what_adam_updates(size):
    """As gradients of 1e18 would: in fp32 the square of a larger one is infinite."""
    p, g = randn(7), randn(7, seed=1).sign()
    close(trajectory("adam", p, [g * size] * 3), adam_reference(p, [g] * 3), atol=1e-6)
    assert optimizer("adam", [leaf(p)]).bad_since().isinf().all()


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_one_number_that_is_not_finite_spoils_its_matrix_alone(bad):
    w = leaf(randn(3, 4, 6))
    opt, g = optimizer("matrix", [w], equilibrate="row"), randn(3, 4, 6, seed=1)
    g[1, 2, 3] = bad
    take(opt, [w], [g])
    assert w[1].isnan().all() and w[0].isfinite().all() and w[2].isfinite().all()
    assert opt.bad_since().tolist() == [1]


# --------------------------------------------------------------------------------------------------
# Gradients that are zero or missing


@pytest.mark.parametrize("method", ["polar_express", "newton_schulz"])
@pytest.mark.parametrize("work", [torch.float32, torch.bfloat16], ids=str)
def test_zero_matrix_gives_exactly_zero(work, method):
    for mode, exponent, bound, normuon, cautious in itertools.product(
        EQUILIBRATE, (-0.5, -0.25), ("frobenius", "spc"), (False, True), (False, True)
    ):
        params = [leaf(randn(2, 4, 6)), leaf(randn(6, 4))]
        before = [p.detach().clone() for p in params]
        grads = [torch.zeros(2, 4, 6), torch.zeros(6, 4)]
        grads[0][1] = randn(4, 6, seed=5)  # a neighbour in the stack is not zero
        case = dict(equilibrate=mode, equilibrate_exponent=exponent, norm_bound=bound, normuon=normuon)
        opt = optimizer("matrix", params, **case, work_dtype=work, orthogonalize=method, cautious=cautious)
        for _ in range(2):
            take(opt, params, grads)
        assert torch.equal(params[0][0], before[0][0]) and torch.equal(params[1], before[1]), case
        assert params[0].isfinite().all() and not torch.equal(params[0][1], before[0][1]), case
        for entry in opt.state_dict()["state"].values():
            assert all(v.isfinite().all() for v in entry.values() if torch.is_tensor(v)), case


@pytest.mark.parametrize("mode", EQUILIBRATE)
def test_zero_rows_and_columns_stay_zero(mode):
    g = randn(6, 9)
    g[1], g[:, 4] = 0, 0
    for bound, normuon, axis in itertools.product(("frobenius", "spc"), (False, True), ("row", "col")):
        o = first_update(g, equilibrate=mode, norm_bound=bound, normuon=normuon, normuon_axis=axis)
        assert o.isfinite().all() and not o[1].any() and not o[:, 4].any()
        assert o.norm() > 1.5


@pytest.mark.parametrize("grads", ["mean", "token_sum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["matrix", "adam"])
def test_a_parameter_without_a_gradient_is_skipped(kind, dtype, grads):
    """Missing or frozen, some or all of a stack, for some steps: as if these steps had not been.

    The other steps, one parameter at a time, are the reference.
    """
    fields = dict(weight_decay=0.5, cautious=kind == "matrix")
    fields |= dict(normuon=True, equilibrate="rowcol", phase=3) if kind == "matrix" else {}
    present = [(1, 1, 0), (1, 0, 1), (1, 0, 0), (0, 0, 0), (1, 1, 0), (1, 1, 1)]  # of each step
    given = [[randn(5, 12, seed=10 * step + i, dtype=dtype) for i in range(3)] for step in range(6)]
    tokens = {"tokens": 3} if grads == "token_sum" else {}
    for frozen in (False, True):
        params = [leaf(randn(5, 12, seed=i, dtype=dtype)) for i in range(3)]
        opt = optimizer(kind, params, grads, **fields)
        for step, there in enumerate(present):
            before = [p.detach().clone() for p in params]
            for p, g, has in zip(params, given[step], there):
                p.requires_grad_(bool(has) or not frozen)
                p.grad = g.to(p.grad_dtype or dtype) if has or frozen else None
            opt.step(**tokens)
            assert all(has or torch.equal(p, b) for p, b, has in zip(params, before, there))
        for i, p in enumerate(params):
            alone = leaf(randn(5, 12, seed=i, dtype=dtype))
            reference = optimizer(kind, [alone], grads, **fields)
            for step, there in enumerate(present):
                if there[i]:
                    alone.grad = given[step][i].to(alone.grad_dtype or dtype)
                    reference.step(**tokens)
            state, expected = (o.state_dict()["state"][n] for o, n in ((opt, str(i)), (reference, "0")))
            assert state["updates"] == expected["updates"] == sum(there[i] for there in present)
            torch.testing.assert_close(p, alone, rtol=1e-5 if dtype == torch.float32 else 2**-7, atol=1e-6)
            for key, value in expected.items():
                assert key == "updates" or torch.allclose(state[key], value, rtol=1e-5, atol=1e-6), key


@pytest.mark.parametrize("mode", EQUILIBRATE)
def test_an_expert_without_tokens_stands_still_and_goes_on(mode):
    """A zero matrix of a bank is left alone, decay and state included."""
    fields = dict(equilibrate=mode, normuon=True, weight_decay=0.1, cautious=mode == "row")
    bank = leaf(randn(3, 4, 6))
    alone = leaf(bank.detach()[2:])
    opt, reference = optimizer("matrix", [bank], **fields), optimizer("matrix", [alone], **fields)
    for step in range(12):
        g = randn(3, 4, 6, seed=50 + step) * 1e-3
        if 3 <= step < 9:
            g[2] = 0
            before = bank[2].detach().clone()
        take(opt, [bank], [g])
        if g[2].any():
            take(reference, [alone], [g[2:]])
        else:
            assert torch.equal(bank[2], before)
    torch.testing.assert_close(bank[2:], alone, rtol=1e-5, atol=1e-6)
    state, expected = (o.state_dict()["state"]["0"] for o in (opt, reference))
    for key in ("momentum", "second_moment"):
        torch.testing.assert_close(state[key][2:], expected[key], rtol=1e-5, atol=0)


# --------------------------------------------------------------------------------------------------
# The step: gradients, periods, tokens, schedulers


@pytest.mark.parametrize(
    "shapes", [[(2, 4, 6)], [(4, 6)], [(2, 4, 6), (4, 6)]], ids=["bank", "matrix", "list"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("grads", ["mean", "token_sum"])
def test_step_leaves_gradients_alone(grads, dtype, shapes):
    cases = [("adam", {})] + [
        ("matrix", dict(nesterov=nesterov, work_dtype=work, equilibrate=mode))
        for nesterov, work, mode in itertools.product(
            (True, False), (torch.float32, torch.bfloat16), EQUILIBRATE
        )
    ]
    for kind, fields in cases:
        params = [leaf(randn(*s, dtype=dtype)) for s in shapes]
        opt = optimizer(kind, params, grads=grads, **fields)
        for p in params:
            p.grad = randn(*p.shape, seed=3, dtype=dtype if grads == "mean" else torch.float32)
        before = [(p.grad, p.grad.clone()) for p in params]
        for _ in range(2):
            opt.step(tokens=7 if grads == "token_sum" else None)
        assert all(
            p.grad is g and torch.equal(g, copy) for p, (g, copy) in zip(params, before, strict=True)
        ), fields


@pytest.mark.parametrize("mode", EQUILIBRATE)
@pytest.mark.parametrize("work", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_momentum_survives_without_nesterov(dtype, work, mode):
    """torch.optim.Muon normalizes its momentum buffer in place when the cast to the work dtype is a no-op."""
    for bound in ("frobenius", "spc"):
        w, buf = leaf(randn(6, 4, dtype=dtype)), torch.zeros(6, 4, dtype=torch.float64)
        opt = optimizer("matrix", [w], nesterov=False, work_dtype=work, equilibrate=mode, norm_bound=bound)
        for g in gradients((6, 4), 3):
            take(opt, [w], [g * 30])
            buf = 0.9 * buf + 0.1 * (g * 30).to(dtype).double()
            close([opt.state_dict()["state"]["0"]["momentum"]], [buf], atol=2e-5)


@pytest.mark.parametrize("kind", ["matrix", "adam"])
@pytest.mark.parametrize("every", [2, 3])
def test_a_group_waits_for_every_kth_step_and_keeps_its_gradients(every, kind):
    """Updated at calls k, 2k, ...; in between weights and gradients stay, also through the class's
    zero_grad."""
    slow, fast = leaf(randn(5, 6)), leaf(randn(4))
    fields = dict(MATRIX if kind == "matrix" else ADAM, every=every)
    groups = [dict(kind=kind, params=[slow], **fields), dict(kind="adam", params=[fast], **ADAM)]
    opt = MuonEq(groups)
    grads, sums, total = gradients((5, 6), 3 * every), [], torch.zeros(5, 6)
    reference = matrix_reference if kind == "matrix" else adam_reference
    start, seen = slow.detach().clone(), []
    for step, g in enumerate(grads):
        before = slow.detach().clone()
        (slow * g).sum().backward()
        fast.grad = torch.ones(4)
        total = total + g
        opt.step()
        assert torch.allclose(slow.grad, total)
        opt.zero_grad()
        assert fast.grad is None
        if (step + 1) % every == 0:
            assert slow.grad is None
            sums.append(total)
            total = torch.zeros(5, 6)
            seen.append(slow.detach().clone())
        else:
            assert torch.equal(slow, before) and torch.allclose(slow.grad, total)
    state = opt.state_dict()
    assert state["step"] == 3 * every
    assert (state["state"]["0"]["updates"], state["state"]["1"]["updates"]) == (3, 3 * every)
    close(seen, reference(start, sums))  # sum or average: both updates ignore a constant factor


@pytest.mark.parametrize("kind", ["matrix", "adam"])
@pytest.mark.parametrize("every", [1, 2])
def test_token_sum_divides_by_the_tokens_of_all_its_steps(every, kind):
    """The gradient that reaches the moments is the accumulated sum over the accumulated tokens, not
    a mean of means."""
    w, grads, tokens = leaf(randn(5, 6)), gradients((5, 6), 4), (10, 30, 7, 13)
    opt = optimizer(kind, [w], grads="token_sum", every=every)
    moment = torch.zeros(5, 6, dtype=torch.float64)
    decay = 0.9
    key = "momentum" if kind == "matrix" else "exp_avg"
    for i in range(0, 4, every):
        for j in range(i, i + every):
            w.grad = grads[j].clone() if w.grad is None else w.grad + grads[j]
            opt.step(tokens=tokens[j])
            opt.zero_grad()
        mean = sum(grads[i : i + every]).double() / sum(tokens[i : i + every])
        moment = decay * moment + (1 - decay) * mean
        torch.testing.assert_close(opt.state_dict()["state"]["0"][key].double(), moment, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("kind", ["matrix", "adam"])
@pytest.mark.parametrize("every", [1, 2])
def test_token_sums_accumulate_in_fp32(every, kind):
    """Two backward passes give 256 + 1, which bfloat16 cannot hold; again after zero_grad."""
    w = leaf(torch.ones(4, 4, dtype=torch.bfloat16))
    opt, moment = optimizer(kind, [w], grads="token_sum", every=every), 0.0
    for _ in range(2):
        for first, second in ((256.0, 1.0), (512.0, 3.0))[:every]:
            (w * first).sum().backward()
            (w * second).sum().backward()
            opt.step(tokens=10)
            opt.zero_grad()
        moment = 0.9 * moment + 0.1 * (257 if every == 1 else 257 + 515) / (10 * every)
        actual = opt.state_dict()["state"]["0"]["momentum" if kind == "matrix" else "exp_avg"]
        torch.testing.assert_close(actual, torch.full((4, 4), moment), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_later_optimizer_takes_over_the_parameters(dtype):
    """As when a run is resumed inside one process."""
    w = leaf(torch.ones(4, 4, dtype=dtype))
    for value in (2.0, 3.0):
        opt = optimizer("matrix", [w], grads="token_sum")
        for _ in range(2):
            (w * value).sum().backward()
        opt.step(tokens=10)
        opt.zero_grad()
        moment = opt.state_dict()["state"]["0"]["momentum"]
        torch.testing.assert_close(moment, torch.full((4, 4), 0.1 * 2 * value / 10))


def test_token_sum_equals_mean():
    for kind in ("matrix", "adam"):
        p, grads = randn(5, 6), gradients((5, 6), 3)
        w = leaf(p)
        opt = optimizer(kind, [w], grads="token_sum")
        for g in grads:
            take(opt, [w], [g * 64], tokens=64)  # a power of two: exact
        assert torch.equal(w, trajectory(kind, p, grads)[-1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copied_state_goes_on_as_the_source_would(dtype):
    """A parameter goes on as another one would: moments, count of updates and weights (its fp32
    copy included)."""
    source, target = leaf(randn(5, 6)), leaf(randn(5, 6).to(dtype))
    opt = MuonEq(
        [
            dict(kind="adam", params=[(name, p)], **ADAM)
            for name, p in (("source", source), ("target", target))
        ]
    )
    for g in gradients((5, 6), 3):
        take(opt, [source, target], [g, -g.to(dtype)])
    with torch.no_grad():
        source.copy_(source.to(dtype))
        target.copy_(source)
    opt.copy_state("source", "target")
    take(opt, [source, target], [torch.ones(5, 6), torch.ones(5, 6, dtype=dtype)])
    assert torch.equal(target, source.to(dtype))


def test_torch_lr_scheduler():
    w, b = leaf(torch.zeros(6, 6)), leaf(torch.zeros(6))
    groups = [dict(kind="matrix", params=[w], **MATRIX), dict(kind="adam", params=[b], **ADAM)]
    opt = MuonEq(groups)
    assert isinstance(opt, torch.optim.Optimizer)
    factors = (1.0, 0.5, 0.0, 2.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: factors[step])
        for i, factor in enumerate(factors):
            assert [g["lr"] for g in opt.param_groups] == [0.1 * factor, 0.01 * factor]
            before = (w.detach().clone(), b.detach().clone())
            take(opt, [w, b], [torch.eye(6), torch.ones(6)])  # the same gradient every time: the same update
            moved = [(x - y).detach() for x, y in zip((w, b), before, strict=True)]
            if i == 0:
                unit = moved
            close(moved, [u * factor for u in unit], atol=1e-6)
            if i + 1 < len(factors):
                scheduler.step()


# --------------------------------------------------------------------------------------------------
# Low-precision parameters


@pytest.mark.parametrize("kind", ["matrix", "adam"])
def test_bf16_parameters_follow_an_fp32_master(kind):
    """200 updates of 2^-12, each below the resolution of bfloat16 at 1: the master walks like an
    fp32 weight."""
    start = randn(6, 6).sign()
    low, high = leaf(start.bfloat16()), leaf(start)
    fields = dict(lr=2.0**-12, weight_decay=0.1, cautious=True)
    if kind == "matrix":
        fields |= dict(scale="match_rms_adamw", equilibrate="row", normuon=True)
    a, b = optimizer(kind, [low], **fields), optimizer(kind, [high], **fields)
    g = randn(6, 6, seed=1).bfloat16()
    for _ in range(200):
        take(a, [low], [g])
        take(b, [high], [g])
    master = a.state_dict()["state"]["0"]["master"]
    assert torch.equal(master, high) and master.dtype == torch.float32
    assert torch.equal(low, master.bfloat16()) and not torch.equal(low, start.bfloat16())
    assert "master" not in b.state_dict()["state"]["0"]


def test_master_is_rounded_to_nearest():
    """Truncation would give 1 for 1 + 0.9 of the spacing 2^-7."""
    low = leaf(torch.ones(4, dtype=torch.bfloat16))
    opt = optimizer("adam", [low], lr=0.9 * 2.0**-7, eps=1e-12)
    take(opt, [low], [torch.tensor([-1.0, -1.0, 1.0, 1.0])])
    assert low.tolist() == [1 + 2.0**-7] * 2 + [1 - 2.0**-7] * 2


def test_mixed_dtypes_in_one_group():
    for kind in ("matrix", "adam"):
        starts = [randn(4, 6, seed=i).bfloat16() for i in range(4)]
        params = [leaf(s if i % 2 else s.float()) for i, s in enumerate(starts)]
        opt, grads = optimizer(kind, params), [randn(4, 6, seed=9 + i).bfloat16() for i in range(4)]
        take(opt, params, grads)
        state = opt.state_dict()["state"]
        assert [p.dtype for p in params] == [torch.float32, torch.bfloat16] * 2
        for i, p in enumerate(params):
            expected = trajectory(kind, starts[i].float(), [grads[i].float()])[-1]
            assert ("master" in state[str(i)]) == (i % 2 == 1)
            close([state[str(i)]["master"] if i % 2 else p.detach()], [expected], atol=1e-6)


# --------------------------------------------------------------------------------------------------
# State


def mixed_groups(params):
    matrix = MATRIX | dict(
        equilibrate="rowcol", phase=4, normuon=True, weight_decay=0.3, cautious=True, lr=0.02
    )
    return [
        dict(kind="matrix", params=params[:4], **matrix),
        dict(kind="adam", params=params[4:6], **ADAM),
        dict(kind="adam", params=params[6:], **ADAM | dict(every=2, weight_decay=0.3, cautious=True)),
    ]


def mixed_params():
    shapes = [(4, 6), (4, 6), (3, 6, 4), (6, 4), (7, 3), (), (11,), (5, 2)]
    low = {1, 2, 4, 7}
    dtypes = [torch.bfloat16 if i in low else torch.float32 for i in range(len(shapes))]
    params = [leaf(randn(*s, seed=i, dtype=d)) for i, (s, d) in enumerate(zip(shapes, dtypes, strict=True))]
    return [(f"layer.{i}", p) for i, p in enumerate(params)]


def mixed_steps(opt, named, first, last):
    for step in range(first, last):
        for i, (_, p) in enumerate(named):
            g = randn(*p.shape, seed=1000 * step + i, dtype=p.dtype)
            p.grad = g if p.grad is None else p.grad + g
        opt.step()
        opt.zero_grad()


def test_resumed_equals_uninterrupted():
    """Through torch.save and weights_only=True; rowcol becomes row and bias correction goes on
    after the resume."""
    straight = mixed_params()
    opt = MuonEq(mixed_groups(straight))
    mixed_steps(opt, straight, 0, 6)
    saved = mixed_params()
    first = MuonEq(mixed_groups(saved))
    mixed_steps(first, saved, 0, 2)
    buffer = io.BytesIO()
    torch.save(dict(weights=[p.detach() for _, p in saved], optimizer=first.state_dict()), buffer)
    buffer.seek(0)
    checkpoint = torch.load(buffer, weights_only=True)
    resumed = [(name, leaf(w)) for (name, _), w in zip(saved, checkpoint["weights"], strict=True)]
    second = MuonEq(mixed_groups(resumed))
    second.load_state_dict(checkpoint["optimizer"])
    same_state(second.state_dict(), first.state_dict())
    mixed_steps(second, resumed, 2, 6)
    for (name, a), (_, b) in zip(straight, resumed, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b), name
    same_state(second.state_dict(), opt.state_dict())


def test_state_dict_contents():
    named = mixed_params()
    opt = MuonEq(mixed_groups(named))
    mixed_steps(opt, named, 0, 4)
    state = opt.state_dict()
    assert state["step"] == 4 and isinstance(state["step"], int)
    assert state["state"].keys() == {name for name, _ in named}
    for i, (name, p) in enumerate(named):
        entry = dict(state["state"][name])
        updates = entry.pop("updates")
        assert updates == (2 if i >= 6 else 4) and isinstance(updates, int)
        keys = {"momentum", "second_moment"} if i < 4 else {"exp_avg", "exp_avg_sq"}
        assert entry.keys() == keys | ({"master"} if p.dtype == torch.bfloat16 else set())
        for key, value in entry.items():
            assert value.dtype == torch.float32 and value.isfinite().all()
            assert key == "second_moment" or value.shape == p.shape
        if "master" in entry:
            assert torch.equal(entry["master"].bfloat16(), p)


def test_state_dict_is_a_snapshot():
    """Later steps change neither a dict that was taken nor one that was loaded."""
    named = mixed_params()
    opt = MuonEq(mixed_groups(named))
    mixed_steps(opt, named, 0, 2)
    taken = opt.state_dict()
    entries = {
        n: {k: v.clone() if torch.is_tensor(v) else v for k, v in e.items()}
        for n, e in taken["state"].items()
    }
    frozen = dict(step=taken["step"], state=entries)
    opt.load_state_dict(taken)
    mixed_steps(opt, named, 2, 4)
    same_state(taken, frozen)


def test_load_refuses_foreign_state():
    opt = optimizer("matrix", [("a", leaf(randn(4, 6)))], normuon=True)
    state = opt.state_dict()
    for foreign in ([("b", (4, 6))], [("a", (6, 4))], [("a", (4, 6)), ("b", (4, 6))]):
        other = optimizer("matrix", [(name, leaf(randn(*shape))) for name, shape in foreign], normuon=True)
        with pytest.raises(ValueError):
            other.load_state_dict(state)
    with pytest.raises(ValueError):
        optimizer("adam", [("a", leaf(randn(4, 6)))]).load_state_dict(state)


def test_names_and_indices():
    named = MuonEq([
        dict(kind="matrix", params=((n, p) for n, p in [("w", leaf(randn(4, 6))), ("v", leaf(randn(6, 4)))]),
             **MATRIX),
        dict(kind="adam", params=[("b", leaf(randn(3)))], **ADAM),
    ])  # fmt: skip
    assert named.state_dict()["state"].keys() == {"w", "v", "b"}
    unnamed = MuonEq([
        dict(kind="adam", params=(leaf(randn(3)) for _ in range(2)), **ADAM),
        dict(kind="matrix", params=[leaf(randn(4, 6))], **MATRIX),
    ])  # fmt: skip
    state = unnamed.state_dict()["state"]
    assert {name: "momentum" in entry for name, entry in state.items()} == {"0": False, "1": False, "2": True}


# --------------------------------------------------------------------------------------------------
# Construction


def test_a_group_that_says_only_its_rate_gets_the_documented_defaults():
    opt = MuonEq([
        dict(kind="matrix", params=[leaf(randn(4, 6))], lr=0.1),
        dict(kind="adam", params=[leaf(randn(3))], lr=0.2),
    ])  # fmt: skip
    matrix = MATRIX | dict(momentum=0.95, equilibrate="row", work_dtype=torch.bfloat16)
    for group, expected in zip(opt.param_groups, (matrix, ADAM | dict(lr=0.2)), strict=True):
        assert {key: group[key] for key in expected} == expected


W, B = (4, 6), (3,)


@pytest.mark.parametrize("groups, message", [
    ([dict(kind="matrix", shapes=[W], lr=0.1, learning_rate=1)], "learning_rate"),
    ([dict(kind="matrix", shapes=[W], lr=0.1, betas=(0.9, 0.95))], "betas"),
    ([dict(kind="adam", shapes=[B], lr=0.1, momentum=0.9)], "momentum"),
    ([dict(kind="matrix", shapes=[W])], "lr"),
    ([dict(kind="adam", shapes=[B])], "lr"),
    ([dict(kind="muon", shapes=[W], lr=0.1)], "muon"),
    ([dict(shapes=[W], lr=0.1)], "kind"),
    ([dict(kind="matrix", shapes=[W], lr=0.1, equilibrate="rows")], "rows"),
    ([dict(kind="matrix", shapes=[W], lr=0.1, orthogonalize="svd")], "svd"),
    ([dict(kind="matrix", shapes=[W], lr=0.1, norm_bound="inf")], "inf"),
    ([dict(kind="matrix", shapes=[W], lr=0.1, normuon_axis="short")], "short"),
    ([dict(kind="matrix", shapes=[W], lr=0.1, scale="none")], "scale"),
    ([dict(kind="matrix", shapes=[W], lr=0.1, lr_mul=(1.0, 2.0))], "lr_mul"),
    ([dict(kind="matrix", shapes=[W], lr=0.1, every=0)], "every"),
    ([dict(kind="matrix", shapes=[B], lr=0.1)], "1|shape|dim"),
    ([dict(kind="matrix", shapes=[(2, 2, 4, 6)], lr=0.1)], "4|shape|dim"),
    ([dict(kind="adam", shapes=[W], lr=0.1, rowwise=True)], "betas are"),
    ([dict(kind="adam", shapes=[B], lr=0.1, betas=(0, 0.9), rowwise=True)], "rows"),
    ([dict(kind="adam", shapes=[B, B], lr=0.1, names=("same", "same"))], "same"),
    ([dict(kind=k, shapes=[W], lr=0.1, names=("same",)) for k in ("matrix", "adam")], "same"),
])  # fmt: skip
def test_impossible_groups_are_refused_in_one_sentence(groups, message):
    built = []
    for group in groups:
        group = dict(group)
        tensors, names = [leaf(randn(*s)) for s in group.pop("shapes")], group.pop("names", None)
        built.append(dict(group, params=list(zip(names, tensors, strict=True)) if names else tensors))
    with pytest.raises(ValueError, match=message) as caught:
        MuonEq(built)
    assert len(str(caught.value)) > 15 and "\n" not in str(caught.value)


def test_refuses_a_parameter_given_twice():
    w = leaf(randn(4, 6))
    with warnings.catch_warnings():  # torch only warns about a parameter twice in one group
        warnings.simplefilter("ignore")
        for params in ([w, w], [("a", w), ("b", w)]):
            with pytest.raises(ValueError):
                optimizer("matrix", params)
    with pytest.raises(ValueError):
        MuonEq([dict(kind="matrix", params=[w], **MATRIX), dict(kind="adam", params=[w], **ADAM)])


@pytest.mark.parametrize("grads", ["mean", "token_sum"])
def test_a_later_group_is_one_of_the_first(grads):
    """Groups added one by one, a parameter without elements among them, against all at construction."""
    results = []
    for later in (False, True):
        shapes = ((3, 4, 6), (0, 4, 6), (4, 6)), ((5,), (7, 3))
        params = [
            [leaf(randn(*shape, seed=len(shape), dtype=torch.bfloat16)) for shape in group]
            for group in shapes
        ]
        groups = [
            dict(MATRIX, kind="matrix", params=params[0], lr_mul=(1.0, 2.0)),
            dict(ADAM, kind="adam", params=params[1]),
        ]
        opt = MuonEq(groups[: 1 if later else 2], grads=grads)
        if later:
            opt.add_param_group(groups[1])
        for step in range(3):
            for p in params[0] + params[1]:
                p.grad = randn(*p.shape, seed=step, dtype=p.grad_dtype or p.dtype)
            opt.step(tokens=7 if grads == "token_sum" else None)
        results.append((opt.state_dict(), [unit.names for unit in opt.units]))
    same_state(results[0][0], results[1][0])
    assert results[0][1] == results[1][1] == [["3", "4"], ["0", "2"]]


def test_refuses_wrong_gradient_convention():
    w = leaf(randn(4, 6))
    with pytest.raises(ValueError, match="sum_of"):
        optimizer("matrix", [w], grads="sum_of")
    with pytest.raises(ValueError, match="tokens"):
        take(optimizer("matrix", [w], grads="token_sum"), [w], [randn(4, 6)])


def test_refuses_what_it_would_silently_ignore():
    w = leaf(randn(4, 6))
    opt = optimizer("matrix", [w], grads="token_sum")
    for params in ([w], [("0", leaf(randn(4, 6)))]):
        with pytest.raises(ValueError, match="appears twice"):
            opt.add_param_group(dict(kind="matrix", params=params, **MATRIX))
    assert len(opt.param_groups) == len(opt.units) == 1
    for tokens in (0, -3, math.nan):  # a negative count would turn the update around
        with pytest.raises(ValueError, match="tokens"):
            opt.step(tokens=tokens)
    with pytest.raises(ValueError, match="lr is at least 0"):
        optimizer("matrix", [w], lr=-0.1)
    saved = opt.state_dict()
    saved["state"]["0"]["second_moment"] = torch.zeros(4, 1)  # of another setting
    with pytest.raises(ValueError, match="optimizer state of 0"):
        opt.load_state_dict(saved)


@pytest.mark.parametrize("change, state", [
    (dict(equilibrate="both"), "row_norm and col_norm"),
    (dict(normuon=True), "second_moment"),
])  # fmt: skip
def test_a_setting_that_needs_a_state_is_chosen_with_the_optimizer(change, state):
    p = leaf(randn(5, 12))
    opt = optimizer("matrix", [p])
    take(opt, [p], [randn(5, 12)])
    opt.param_groups[0].update(change)
    before = p.detach().clone()
    with pytest.raises(ValueError, match=f"changed to what needs the state {state}; that is made"):
        take(opt, [p], [randn(5, 12)])
    assert torch.equal(p, before)
