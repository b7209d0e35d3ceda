"""Both forms of `attend` against dense softmax attention in float64, written from the definition of who
sees whom.

The fused form calls torch's `varlen_attn`, which has no CPU kernel. The fixture `flash_on_cpu` registers
one, so that the same call, with its offsets, bounds and window, is tested here; the real kernel is
tested where there is a GPU.
"""

from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from train_gpt import (
    GPT,
    TRACKS,
    attend,
    blocked_layout,
    choose_attention,
    fused_layout,
    supports,
    window_size,
)

H, D = 2, 8
ROWS = {  # name: (T, document lengths of each row)
    "one": (1, [[1]]),
    "even": (24, [[24], [1, 5, 18], [1, 1, 1, 7, 1, 13], [8, 8, 8], [1] * 24]),
    "odd": (23, [[11, 12], [23], [22, 1], [1, 22]]),
}
WINDOWS = (1, 3, 8, 22, 23, 24, 25, 1000)  # smaller than T, T - 1, T, T + 1, larger; most do not divide T
CASES = [(name, window) for name in ROWS for window in WINDOWS]


def offsets_of(rows, T, tails=2):
    """(B, M + 1): 0, ends of the documents, then T repeated; at least `tails` documents of length
    zero per row."""
    M = max(map(len, rows)) + tails
    return torch.tensor([[sum(row[:i]) for i in range(M + 1)] for row in rows], dtype=torch.int32)


def layout_of(offsets, T, window, longest, fused):
    return (
        fused_layout(offsets, T, window_size(window), longest)
        if fused
        else blocked_layout(offsets, T, window)
    )


def visible(rows, T, window):
    """(B, T, T) bool: key j for query i when in the same document and 0 <= i - j <= window."""
    documents = [[i for i, length in enumerate(row) for _ in range(length)] for row in rows]
    near = [[0 <= i - j <= window for j in range(T)] for i in range(T)]
    return torch.tensor(
        [[[near[i][j] and d[i] == d[j] for j in range(T)] for i in range(T)] for d in documents]
    )


def dense(q, k, v, mask):
    """(B, T, H, d) by the definition, all T x T scores."""
    scores = torch.einsum("bihd,bjhd->bhij", q, k).masked_fill(~mask[:, None], -torch.inf)
    return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v)


def value_and_gradients(function, tensors, outer):
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, outer.to(y.dtype))]


def compare(
    rows, T, window, fused, dtype=torch.float32, tolerance=5e-6, device="cpu", heads=H, width=D, size=1.0
):
    generator = torch.Generator().manual_seed(T + window)
    draws = [torch.randn(len(rows), T, heads, width, generator=generator).to(device, dtype) for _ in range(4)]
    *qkv, outer = draws[0] * size, draws[1] * size, draws[2], draws[3]
    layout = layout_of(offsets_of(rows, T).to(device), T, window, T, fused)
    found = value_and_gradients(lambda *x: attend(*x, layout), qkv, outer)
    mask = visible(rows, T, window).to(device)
    expected = value_and_gradients(lambda *x: dense(*x, mask), [x.double() for x in qkv], outer.double())
    for name, a, b in zip(("y", "dq", "dk", "dv"), found, expected):
        assert a.dtype == dtype and a.shape == b.shape
        assert torch.isfinite(a).all(), name
        error = float((a.double() - b).abs().max() / b.abs().max().clamp_min(1))
        assert error < tolerance, f"{name}: {error}"


@pytest.fixture(scope="module")
def flash_on_cpu():
    """CPU kernels of the two operators behind varlen_attn: a loop over documents, queries past
    max_q left undone."""

    def documents(q, cu_q, cu_k, max_q, max_k, scale, left, right, **ignored):
        assert cu_q.dtype == torch.int32 and torch.equal(cu_q, cu_k) and max_q == max_k
        assert right == 0 and left >= 0
        assert cu_q[0] == 0 and cu_q[-1] == len(q) and (cu_q.diff() >= 0).all()
        for a, b in zip(cu_q.tolist(), cu_q.tolist()[1:]):
            at = torch.arange(min(b - a, max_q))
            distance = at[:, None] - at
            yield slice(a, a + len(at)), ((distance >= 0) & (distance <= left))[None]

    def weights(q, k, mask, scale):  # (n, H, d) -> (H, n, n)
        return torch.einsum("ihd,jhd->hij", q, k).mul(scale).masked_fill(~mask, -torch.inf).softmax(-1)

    def forward(q, k, v, cu_q, cu_k, max_q, max_k, dropout, causal, debug, *, scale=None,
                window_size_left=None, window_size_right=None, **ignored):  # fmt: skip
        assert not causal and dropout == 0
        y = torch.full_like(q, torch.nan)
        for part, mask in documents(q, cu_q, cu_k, max_q, max_k, scale, window_size_left, window_size_right):
            y[part] = torch.einsum("hij,jhd->ihd", weights(q[part], k[part], mask, scale), v[part])
        return y, q.new_empty(q.size(1), len(q)), q.new_empty(2), q.new_empty(0), q.new_empty(0)

    def backward(grad, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, dropout, causal, state, unused, *,
                 scale=None, window_size_left=None, window_size_right=None, **ignored):  # fmt: skip
        dq, dk, dv = (torch.full_like(q, torch.nan) for _ in range(3))
        for part, mask in documents(q, cu_q, cu_k, max_q, max_k, scale, window_size_left, window_size_right):
            p = weights(q[part], k[part], mask, scale)
            dv[part] = torch.einsum("hij,ihd->jhd", p, grad[part])
            dp = torch.einsum("ihd,jhd->hij", grad[part], v[part])
            ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
            dq[part], dk[part] = (
                torch.einsum("hij,jhd->ihd", ds, k[part]),
                torch.einsum("hij,ihd->jhd", ds, q[part]),
            )
        return dq, dk, dv

    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", forward, "CPU")
    library.impl("_flash_attention_backward", backward, "CPU")
    yield
    library._destroy()


@pytest.mark.parametrize("name,window", CASES)
def test_blocked_form_is_the_definition(name, window):
    T, rows = ROWS[name]
    compare(rows, T, window, fused=False)


@pytest.mark.parametrize("name,window", CASES)
def test_fused_form_is_the_definition(flash_on_cpu, name, window):
    T, rows = ROWS[name]
    compare(rows, T, window, fused=True)


@pytest.mark.parametrize("name,window", [("even", 7), ("odd", 30)])
def test_blocked_form_in_bfloat16(name, window):
    T, rows = ROWS[name]
    compare(rows, T, window, fused=False, dtype=torch.bfloat16, tolerance=0.03)


@pytest.mark.parametrize("window", (3, 24))
def test_blocked_form_gradcheck(window):
    """Numerical derivatives; scores are rounded to fp32 inside, hence the wide step and tolerances."""
    T, rows = 7, [[1, 4, 2], [7]]
    layout = layout_of(offsets_of(rows, T), T, window, T, False)
    generator = torch.Generator().manual_seed(0)
    qkv = [
        torch.randn(2, T, 1, 4, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(3)
    ]
    assert torch.autograd.gradcheck(
        lambda *x: attend(*x, layout), qkv, eps=1e-2, atol=2e-3, rtol=1e-3, fast_mode=False
    )


@pytest.mark.parametrize("sign", (1, -1))
def test_blocked_form_at_the_bound_of_the_scores(sign):
    """Scores from -60 to 60 (the docstring's bound) need no running maximum in fp32."""
    T, window = 12, 5
    q = torch.zeros(1, T, 1, 4)
    k = q.clone()
    q[..., 0], k[..., 0] = 60.0, sign * torch.linspace(-1, 1, T)[None, :, None]
    v, outer = torch.randn(2, 1, T, 1, 4, generator=torch.Generator().manual_seed(1))
    layout = layout_of(offsets_of([[T]], T), T, window, T, False)
    found = value_and_gradients(lambda *x: attend(*x, layout), (q, k, v), outer)
    mask = visible([[T]], T, window)
    expected = value_and_gradients(
        lambda *x: dense(*x, mask), (q.double(), k.double(), v.double()), outer.double()
    )
    for a, b in zip(found, expected):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fused", (False, True))
@pytest.mark.parametrize("window", (4, 24))
def test_zero_length_tail_documents_change_nothing(flash_on_cpu, fused, window):
    T, rows = 24, [[5, 19], [1, 23]]
    q, k, v, outer = torch.randn(4, 2, T, H, D, generator=torch.Generator().manual_seed(2))
    layouts = [layout_of(offsets_of(rows, T, tails), T, window, T, fused) for tails in (0, 9)]
    plain, padded = (
        value_and_gradients(lambda *x, to=to: attend(*x, to), (q, k, v), outer) for to in layouts
    )
    for a, b in zip(plain, padded):
        assert torch.equal(a, b) and torch.isfinite(a).all()


@pytest.mark.parametrize("window", (5, 24))
def test_bound_of_the_document_length_reaches_the_kernel(flash_on_cpu, window):
    """The kernel leaves queries past the bound undone: rows within it are right, a longer document
    shows as NaN."""
    T, rows = 24, [[8, 8, 8], [6, 8, 7, 3]]
    q, k, v = torch.randn(3, 2, T, H, D, generator=torch.Generator().manual_seed(3))
    offsets, mask = offsets_of(rows, T), visible(rows, T, window)
    y = attend(q, k, v, layout_of(offsets, T, window, 8, True))
    torch.testing.assert_close(
        y.double(), dense(q.double(), k.double(), v.double(), mask), rtol=1e-5, atol=1e-5
    )
    assert attend(q, k, v, layout_of(offsets, T, window, 7, True)).isnan().any()
    assert layout_of(offsets, T, window, 4096, True).longest == T  # a row bounds it as well


@pytest.mark.parametrize("windows", [(3, 7), (64, 64)])
def test_both_forms_train_the_model_alike(flash_on_cpu, windows):
    """Several rows in one pass through the layers of the track `short`: the same loss and gradients."""
    config = replace(TRACKS["short"].model, padded_vocab=64, width=48, ngrams=((2, 97),))
    rows, generator = [[1, 5, 4, 9, 1, 1], [21], [10, 11]], torch.Generator().manual_seed(4)
    inputs, targets = torch.randint(64, (2, 3, 21), generator=generator)
    results = []
    for fused in (False, True):
        model = GPT(config, 21, torch.float32)
        model.init_weights(0)
        model.set_rotary([384])
        model.fused, noise = fused, torch.Generator().manual_seed(5)
        for p in model.parameters():
            p.data += 0.15 * torch.randn(p.shape, generator=noise)
        loss = model(inputs.int(), targets, offsets_of(rows, 21), windows, 4096)
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters() if p.numel())])
    for a, b in zip(*results):
        assert (a - b).norm() <= 1e-4 * a.norm()


@torch._dynamo.config.patch(recompile_limit=64)
@pytest.mark.parametrize("mode,count", [("parts", 10), ("whole", 1)])
def test_one_graph_serves_all_windows_and_lengths_of_documents(flash_on_cpu, mode, count):
    """Windows of the schedule are no reason to compile; the results are those of the uncompiled model."""
    torch._dynamo.reset()
    config = replace(TRACKS["short"].model, padded_vocab=64, width=48, ngrams=((2, 97),))
    model, inputs = GPT(config, 21, torch.float32), torch.randint(64, (2, 21), dtype=torch.int32)
    model.init_weights(0)
    model.fused, counter = True, CompileCounterWithBackend("aot_eager")
    offsets, graphs, plain = offsets_of([[21], [10, 11]], 21), [], []
    windows = [(2, 9), (9, 30), (5, 7), (4, 40)]
    with torch.no_grad():
        plain = [float(model(inputs, inputs.long(), offsets, pair, 4096)) for pair in windows]
    for name in GPT.COMPILED[mode]:
        setattr(
            model, name, torch.compile(getattr(model, name), backend=counter, dynamic=False, fullgraph=True)
        )
    for pair, expected in zip(windows, plain):
        loss = model(inputs, inputs.long(), offsets, pair, 4096)
        loss.backward()
        graphs.append(counter.frame_count)
        assert loss.item() == pytest.approx(expected, rel=1e-5)
    # parts: embedding, skip and backout, loss, and seven kinds of blocks: 0 = 5, 1, 2, 3, 4 = 6 = 8, 7, 9
    assert graphs == [count] * 4


def test_fused_form_needs_a_gpu():
    assert not any(supports(torch.device("cpu"), feature) for feature in ("flash", "fp8"))


def test_another_kernel_is_activated_or_refused_by_name(monkeypatch):
    """Without its package in one sentence that says what there is; nothing is downloaded."""
    from torch.nn.attention import _registry

    cpu, activated = torch.device("cpu"), []
    assert choose_attention("fa2", cpu, torch.bfloat16) == "blocked"
    with pytest.raises(ValueError, match="--attention fa3 cannot be used here .*; fa2 is part of torch"):
        choose_attention("fa3", cpu, torch.bfloat16)
    monkeypatch.setitem(_registry._FLASH_ATTENTION_IMPLS, "FA4", lambda: activated.append("FA4"))
    monkeypatch.setattr("train_gpt.supports", lambda device, feature: feature in ("flash", "fa4"))
    assert choose_attention("fa4", cpu, torch.bfloat16) == "fa4" and activated == ["FA4"]
    assert choose_attention("fa2", cpu, torch.bfloat16) == "fa2" and activated == ["FA4"]
    assert choose_attention("fa2", cpu, torch.float32) == "blocked"
    monkeypatch.setitem(_registry._FLASH_ATTENTION_IMPLS, "FA3", lambda: None)
    with pytest.raises(ValueError, match="--attention fa3 cannot be used here .it is not made for this GPU"):
        choose_attention("fa3", cpu, torch.bfloat16)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("window", (1, 64, 200, 4096))
@pytest.mark.parametrize("fused", (True, False))
def test_both_forms_on_a_gpu(fused, window, dtype):
    device = torch.device("cuda")
    if fused and not supports(device, "flash"):
        pytest.skip("needs capability 8.0")
    rows = [[300], [1, 99, 200], [150, 1, 1, 148]]
    compare(rows, 300, window, fused, dtype, tolerance=0.03, device=device, heads=3, width=64, size=0.5)
