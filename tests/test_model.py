"""The model against record #42 written out again, per row, with dense masks, in float64; what flows where; its start."""

import math
from dataclasses import replace

import pytest
import torch

from train_gpt import GPT, TRACKS, FP8Linear, Model, build_optimizer, rotary_frequencies, supports

SHORT = TRACKS["short"]
SMALL = replace(SHORT.model, padded_vocab=64, width=48)  # 11 blocks, 6 heads of 8, the layer map of the track
MODELS = {
    "short": SMALL,
    "tiny": replace(TRACKS["tiny"].model, padded_vocab=64, width=32, heads=4, ngrams=((2, 97), (3, 64), (5, 128))),
    "bare": Model(padded_vocab=64, width=32, heads=2, layers=3, mlp_ratio=2, softcap=(20.0, 5.0)),
}
LONG = SHORT.schedule.windows[0][1]


def build(config, seed=0, spread=0.0, windows=(LONG,), max_tokens=64, dtype=torch.float32):
    """A model at its start, or with `spread` added to every parameter so that nothing is zero."""
    model = GPT(config, max_tokens, dtype)
    model.init_weights(seed)
    model.set_rotary(windows)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator), alpha=spread)
    return model


def batch_of(rows, seed=0, vocab=64, tails=2, masked=0.2):
    """Random tokens for rows given by document lengths; a fifth of the targets is not counted."""
    generator = torch.Generator().manual_seed(seed)
    B, T, M = len(rows), sum(rows[0]), max(map(len, rows)) + tails
    inputs = torch.randint(vocab, (B, T), generator=generator, dtype=torch.int32)
    targets = torch.randint(vocab, (B, T), generator=generator)
    targets[torch.rand(B, T, generator=generator) < masked] = -1
    return inputs, targets, torch.tensor([[sum(row[:i]) for i in range(M + 1)] for row in rows], dtype=torch.int32)


def gradients(model):
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


ROWS = [[1, 5, 4, 9, 1, 1], [21], [10, 11]]


# ---------------------------------------------------------------------------------------------------------------
# The forward pass
# ---------------------------------------------------------------------------------------------------------------


def rms(x):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def reference(p, c, inputs, targets, lengths, windows, scale, base):
    """Summed loss of one row; p maps names to float64 parameters. Half of each head's pairs rotate by base^(-j / (n - 1))."""
    T, D, d = len(inputs), c.width, c.width // c.heads
    document = [i for i, length in enumerate(lengths) for _ in range(length)]
    rotating = d // 4
    speeds = [base ** (-j / max(1, rotating - 1)) if j < rotating else 0.0 for j in range(d // 2)]
    angle = torch.tensor([[t * w for w in speeds] for t in range(T)], dtype=torch.float64)

    def rotate(x):  # (T, d)
        a, b = x[:, : d // 2], x[:, d // 2 :]
        return torch.cat([a * angle.cos() + b * angle.sin(), b * angle.cos() - a * angle.sin()], 1)

    e = [p["embed"][token] for token in inputs]
    for t in range(T):
        begin = 0
        for n, rows in c.ngrams:
            key = 0
            for k in range(n):  # 0 for what lies before the document
                same = t >= k and document[t - k] == document[t]
                key = (key * 1_000_003 + (int(inputs[t - k]) + 1 if same else 0)) % 2**31
            e[t] = e[t] + p["ngram_embed"][begin + key * 48_271 // 256 % rows]
            begin += rows
    smeared = [e[0]] + [
        e[t] + p["smear"][0] * torch.sigmoid(p["smear_gate"][0] @ e[t][: c.gate_inputs]) * e[t - 1] for t in range(1, T)
    ]
    x = x0 = rms(torch.stack(smeared))
    outputs, attentions = [], 0
    for i in range(c.layers):
        for number, (source, target) in enumerate(c.skips):
            if target == i:
                x = x + torch.sigmoid(p["skip"][number]) * outputs[source]
        x = p["residual"][i, 0] * x + p["residual"][i, 1] * x0
        if i not in c.attention_free:
            wq, wk, wv, wo = p["attn"][4 * attentions : 4 * attentions + 4]
            window, a = windows[1] if i in c.long_blocks else windows[0], rms(x)
            mask = torch.tensor([[document[s] == document[t] and 0 <= t - s <= window for s in range(T)] for t in range(T)])
            v = p["value_mix"][attentions, 0] * (a @ wv.T)
            for block, table in c.value_tables:
                if block == i:
                    rows = torch.stack([p["value_embed"][table * c.padded_vocab + token] for token in inputs])
                    v = v + p["value_mix"][attentions, 1] * rows
            heads = []
            for h in range(c.heads):
                part = slice(h * d, (h + 1) * d)
                q, k = rotate(rms((a @ wq.T)[:, part])), rotate(rms((a @ wk.T)[:, part]))
                weights = (scale * q @ k.T).masked_fill(~mask, -math.inf).softmax(-1)
                gate = torch.sigmoid(a[:, : c.gate_inputs] @ p["gate"][attentions, h])
                heads.append(gate[:, None] * (weights @ v[:, part]))
            x = x + torch.cat(heads, 1) @ wo.T
            attentions += 1
        up, down = p["mlp"][2 * i], p["mlp"][2 * i + 1]  # both (D, hidden)
        x = x + (rms(x) @ up).clamp(min=0).square() @ down.T
        outputs.append(x)
    if c.backout >= 0:
        x = x - p["backout"][0] * outputs[c.backout]
    z = c.softcap[0] * torch.sigmoid(rms(x) @ p["lm_head"].T / c.softcap[1])
    losses = torch.logsumexp(z, 1) - z.gather(1, torch.tensor(targets).clamp(min=0)[:, None])[:, 0]
    assert x.shape == (T, D)
    return sum(loss for loss, target in zip(losses, targets) if target >= 0)


@pytest.mark.parametrize("name,windows", [("short", (3, 7)), ("short", (64, 64)), ("tiny", (2, 5)), ("bare", (4, 9))])
def test_loss_and_gradients_against_the_reference(name, windows):
    c = MODELS[name]
    model, (inputs, targets, offsets) = build(c, spread=0.15), batch_of(ROWS)
    loss = model(inputs, targets, offsets, windows, 21)
    loss.backward()
    assert loss.dtype == torch.float32 and loss.shape == ()
    p = {key: value.detach().double().requires_grad_() for key, value in model.named_parameters()}
    rows = zip(inputs.tolist(), targets.tolist(), ROWS)
    expected = sum(reference(p, c, *row, windows, c.attention_scale, c.rotary_base) for row in rows)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for key, found in gradients(model).items():
        wanted = torch.zeros_like(p[key]) if p[key].grad is None else p[key].grad
        error = (found.double() - wanted).norm() / wanted.norm().clamp_min(1e-9)
        assert error < 1e-4, (key, float(error))


def test_bfloat16_activations_stay_near_fp32():
    batch = batch_of(ROWS)
    wide, narrow = (build(SMALL, spread=0.05, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    losses = [model(*batch, (3, 7), 21) for model in (wide, narrow)]
    losses[1].backward()
    assert losses[1].dtype == torch.float32 and all(p.grad.dtype == p.dtype for p in narrow.parameters() if p.numel())
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=0.01)


# ---------------------------------------------------------------------------------------------------------------
# What flows where
# ---------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def losses_by_position(model, inputs, targets, offsets, windows):
    """The loss of each target of one row alone: all other targets are -1."""
    T = inputs.size(1)
    single = torch.full((T, T), -1).diagonal_scatter(targets[0])
    return [float(model(inputs, row[None], offsets, windows, T)) for row in single]


@pytest.mark.parametrize("smear", (0.0, 0.7))
@pytest.mark.parametrize("name,windows", [("short", (64, 64)), ("tiny", (3, 64))])
def test_no_information_from_the_future_or_another_document(name, windows, smear):
    """Exactly the losses from a token's position to the end of its document depend on it.

    Smear alone reads across a document start: the last n-gram of a document also reaches the document after it.
    """
    lengths = [3, 1, 7, 2]
    longest = max([1, *(n for n, _ in MODELS[name].ngrams)])
    model, (inputs, targets, offsets) = build(MODELS[name], spread=0.15), batch_of([lengths], masked=0.0)
    with torch.no_grad():
        model.smear.fill_(smear)
    document = [i for i, length in enumerate(lengths) for _ in range(length)]
    T, before = len(document), losses_by_position(model, inputs, targets, offsets, windows)
    for s in range(T):
        changed = inputs.clone()
        changed[0, s] = (changed[0, s] + 1) % 64
        after = losses_by_position(model, changed, targets, offsets, windows)
        found = [t for t in range(T) if before[t] != after[t]]
        reached = {document[s]}
        last = max(t for t in range(T) if document[t] == document[s])
        if smear and last + 1 < T and last - s < longest:
            reached.add(document[last + 1])
        assert found == [t for t in range(s, T) if document[t] in reached], s


def test_a_window_limits_how_far_a_token_reaches():
    """Blocks of window 2 and 3 and the smear: a token reaches 2 + 3 + 1 positions ahead and no further."""
    c = Model(padded_vocab=64, width=32, heads=2, layers=2, long_blocks=(1,))
    model, (inputs, targets, offsets) = build(c, spread=0.15), batch_of([[12]], masked=0.0)
    before, changed = losses_by_position(model, inputs, targets, offsets, (2, 3)), inputs.clone()
    changed[0, 1] = (changed[0, 1] + 1) % 64
    after = losses_by_position(model, changed, targets, offsets, (2, 3))
    assert [t for t in range(12) if before[t] != after[t]] == list(range(1, 1 + 2 + 3 + 1 + 1))


@pytest.mark.parametrize("name", MODELS)
def test_nothing_crosses_a_row_border(name):
    model, (inputs, targets, offsets) = build(MODELS[name], spread=0.15), batch_of(ROWS)
    only_middle = targets.clone()
    only_middle[[0, 2]] = -1
    changed = inputs.clone()
    changed[[0, 2]] = (changed[[0, 2]] + 7) % 64
    moved = offsets.clone()
    moved[[0, 2]] = torch.tensor([0, 2, *[21] * (offsets.size(1) - 2)], dtype=torch.int32)
    with torch.no_grad():
        losses = [float(model(x, only_middle, o, (3, 7), 21)) for x, o in [(inputs, offsets), (changed, moved)]]
    assert losses[0] == losses[1] != 0


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("micro_rows", (1, 2, 3))
def test_rows_accumulate_to_the_big_batch(name, micro_rows):
    """Losses and gradients are sums: any division into forward passes gives those of all rows at once."""
    rows = [*ROWS, [2, 19], [20, 1], [7, 7, 7]]
    model, batch = build(MODELS[name], spread=0.15), batch_of(rows)
    whole = model(*batch, (3, 7), 21)
    whole.backward()
    expected = gradients(model)
    model.zero_grad()
    total = 0.0
    for part in zip(*(x.split(micro_rows) for x in batch)):
        loss = model(*part, (3, 7), 21)
        loss.backward()
        total += loss.item()
    assert total == pytest.approx(whole.item(), rel=1e-6)
    for key, found in gradients(model).items():
        assert (found - expected[key]).norm() <= 1e-4 * expected[key].norm(), key


def test_gradients_reach_every_parameter():
    """All but the mix of value embeddings in blocks without one, and table rows of tokens that do not occur."""
    model = build(SMALL, spread=0.15)
    inputs, targets, offsets = batch_of(ROWS, masked=0.0)
    model(inputs, targets, offsets, (3, 7), 21).backward()
    found = gradients(model)
    with_table = [0, 1, 7, 8, 9]  # blocks 0, 1, 8, 9, 10, counted without block 6
    assert found["value_mix"][:, 1].nonzero().flatten().tolist() == with_table
    assert (found["value_mix"][:, 0] != 0).all()
    seen = torch.zeros(64, dtype=torch.bool)
    seen[inputs.flatten()] = True
    assert torch.equal(found["embed"].any(1), seen)
    assert torch.equal(found["value_embed"].any(1), seen.repeat(3))
    for key in ("attn", "mlp", "gate", "smear_gate", "lm_head"):
        assert found[key].flatten(1).any(1).all(), key
    for key in ("residual", "skip", "smear", "backout"):
        assert (found[key] != 0).all(), key


# ---------------------------------------------------------------------------------------------------------------
# Memory and precision
# ---------------------------------------------------------------------------------------------------------------


def saved_bytes(model, batch, windows):
    """Bytes kept for the backward, parameters not counted, and the loss."""
    own, kept = {p.untyped_storage()._cdata for p in model.parameters()}, {}

    def pack(x):
        if (place := x.untyped_storage()._cdata) not in own:
            kept[place] = x.untyped_storage()  # held, so that no two share a place
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = model(*batch, windows, 2048)
    return sum(storage.nbytes() for storage in kept.values()), loss


@pytest.mark.parametrize("name", MODELS)
def test_low_memory_keeps_less_and_changes_nothing(name):
    """Recomputed blocks and logits in pieces; 2 x 4,160 tokens are three pieces, the last one smaller."""
    rows, results = [[4000, 160], [60, 4100]], []
    batch = batch_of(rows)
    for low in (False, True):
        model = build(MODELS[name], spread=0.15, max_tokens=4160)
        model.low_memory, pieces, loss_of = low, [], model.loss
        model.loss = lambda x, targets, pieces=pieces, loss_of=loss_of: pieces.append(len(x)) or loss_of(x, targets)
        kept, loss = saved_bytes(model, batch, (3, 7))
        assert pieces == ([4096, 4096, 128] if low else [8320])
        loss.backward()
        results.append((kept, loss.detach(), gradients(model)))
        with torch.no_grad():
            assert float(model(*batch, (3, 7), 4096)) == pytest.approx(loss.item(), rel=1e-6)
    (kept, loss, whole), (kept_low, loss_low, low) = results
    assert kept_low < kept / 3
    assert float(loss_low) == pytest.approx(float(loss), rel=1e-6)
    for key in whole:
        assert (low[key] - whole[key]).norm() <= 1e-5 * whole[key].norm(), key


def test_memory_of_the_short_track():
    """A row of 32,768 tokens keeps 28 GB for an uncompiled backward, and a gigabyte when blocks are recomputed."""
    kept = []
    for low in (False, True):
        model, T = GPT(SHORT.model, 32_768, torch.bfloat16, "meta"), 32_768
        model.fused, model.low_memory = True, low
        batch = [torch.empty(shape, dtype=kind, device="meta") for shape, kind in (
            ((1, T), torch.int32), ((1, T), torch.int64), ((1, 129), torch.int32))]  # fmt: skip
        kept.append(saved_bytes(model, batch, (640, 1408))[0] / 1e9)
    assert 20 < kept[0] < 30 and kept[1] < 1.1


def test_parameters_in_low_precision_change_no_bit_of_the_first_loss():
    """A bfloat16 parameter is the fp32 one rounded on use; its gradient is the one that is rounded anyway."""
    losses, found = [], []
    for names in ((), SMALL.low_precision):
        model = build(replace(SMALL, low_precision=()), spread=0.05, dtype=torch.bfloat16)
        for name in names:
            setattr(model, name, torch.nn.Parameter(getattr(model, name).detach().bfloat16()))
        loss = model(*batch_of(ROWS), (3, 7), 21)
        loss.backward()
        losses.append(float(loss))
        found.append(gradients(model))
    assert losses[0] == losses[1] and SMALL.low_precision
    for key, expected in found[0].items():
        if key in ("embed", "value_embed"):  # sums over the places of a token, in fp32 or in bfloat16
            assert (found[1][key].float() - expected).norm() <= 2**-7 * expected.norm(), key
        else:
            assert torch.equal(found[1][key].float(), expected), key


FP8 = (48**0.5 / 448, 2**-9, 1 / 448)


@pytest.mark.parametrize("seed", range(3))
def test_fp8_head_against_products_in_float64(seed):
    """Three bits of mantissa forward, two in the gradient: a few percent; what exceeds the range stays finite."""
    generator = torch.Generator().manual_seed(seed)
    x, outer = torch.randn(64, 48, generator=generator), torch.rand(64, 32, generator=generator) - 0.5
    w = torch.randn(32, 48, generator=generator) * 0.2
    x[3, 5] = 1e4  # 448 x the divisor is 48 ** 0.5
    outer[2, 7] = 1000  # 57,344 x the divisor is 128
    leaves = [x.bfloat16().requires_grad_(), w.clone().requires_grad_()]
    y = FP8Linear.apply(*leaves, FP8)
    y.backward(outer.bfloat16())
    clamped = x.double().clamp(-(48**0.5), 48**0.5)
    bounded = outer.double().clamp(-128, 128)
    expected = clamped @ w.double().T, bounded @ w.double(), bounded.T @ clamped
    assert y.dtype == leaves[0].grad.dtype == torch.bfloat16 and leaves[1].grad.dtype == torch.float32
    for found, wanted, tolerance in zip((y, leaves[0].grad, leaves[1].grad), expected, (0.05, 0.08, 0.08)):
        assert 0.002 < (found.double() - wanted).norm() / wanted.norm() < tolerance


def test_fp8_head_compiles():
    """Forward and backward in one graph each, the same bits; nothing falls back to Python."""
    torch._dynamo.reset()
    generator, found = torch.Generator().manual_seed(0), []
    x, w, outer = (torch.randn(shape, generator=generator).bfloat16() for shape in ((64, 48), (32, 48), (64, 32)))
    for apply in (FP8Linear.apply, torch.compile(FP8Linear.apply, backend="aot_eager", fullgraph=True)):
        leaves = [x.clone().requires_grad_(), w.clone().requires_grad_()]
        y = apply(*leaves, FP8)
        y.backward(outer)
        found.append([y.detach(), *(leaf.grad for leaf in leaves)])
    for a, b in zip(*found):
        assert torch.equal(a, b)


def test_fp8_head_trains_and_does_not_validate():
    """With FP8 the loss and the gradients move by percents, the validation not by one bit."""
    config = replace(MODELS["bare"], fp8_head=(32**0.5 / 448, 2**-9, 1 / 448))
    plain, model = (build(c, spread=0.05, dtype=torch.bfloat16) for c in (MODELS["bare"], config))
    batch = batch_of(ROWS)
    assert not model.fp8  # no FP8 products on this processor by itself
    model.fp8 = True
    with torch.no_grad():
        assert float(model(*batch, (3, 7), 21)) == float(plain(*batch, (3, 7), 21))
    losses = [m(*batch, (3, 7), 21) for m in (plain, model)]
    for loss in losses:
        loss.backward()
    assert 0 < abs(float(losses[1] - losses[0])) < 0.01 * float(losses[0])
    for key, expected in gradients(plain).items():
        if expected.numel() > 20:  # single numbers are sums that cancel
            assert 0.001 < (gradients(model)[key] - expected).norm() / expected.norm() < 0.1, key


# ---------------------------------------------------------------------------------------------------------------
# Rotary positions
# ---------------------------------------------------------------------------------------------------------------

GROWTH = [384, 896, 1408, 1664]


@pytest.mark.parametrize(
    "changes,scale,w10,w31",
    [(0, 0.1000, 1024 ** (-10 / 31), 1 / 1024), (1, 0.1170, 0.05671, 4.185e-4), (2, 0.1275, 0.04080, 2.663e-4),
     (3, 0.1318, 0.03617, 2.254e-4)],
)  # fmt: skip
def test_yarn_of_the_short_track(changes, scale, w10, w31):
    frequencies, found = rotary_frequencies(SHORT.model, GROWTH[: changes + 1])
    assert frequencies.shape == (64,) and float(frequencies[0]) == 1 and not frequencies[32:].any()
    assert found == pytest.approx(scale, abs=1e-4)
    assert float(frequencies[10]) == pytest.approx(w10, rel=2e-4)
    assert float(frequencies[31]) == pytest.approx(w31, rel=2e-4)


def test_yarn_interpolates_the_slow_frequencies_only():
    before, after = (rotary_frequencies(SHORT.model, GROWTH[:n])[0][:32] for n in (1, 2))
    ratio = (after / before).tolist()
    assert ratio[19:] == pytest.approx([384 / 896] * 13) and all(r > 384 / 896 + 1e-6 for r in ratio[:19])
    turns = [384 * 1024 ** (-j / 31) / (2 * math.pi) for j in range(32)]  # in the old window
    assert [r == 1 for r in ratio] == [turn >= 32 for turn in turns]


def test_yarn_needs_a_change():
    one = rotary_frequencies(SHORT.model, [384])
    same = rotary_frequencies(SHORT.model, [384, 384, 384])
    assert torch.equal(one[0], same[0]) and one[1] == same[1] == 0.1


def test_rotary_tables_are_set_in_place():
    model = GPT(replace(SMALL, width=96), 40, torch.float32)
    places = [x.data_ptr() for x in (model.cos, model.sin, model.attention_scale)]
    for windows, scale in [([384], 0.1), ([384, 896], 0.1 * (1 + 0.2 * math.log(896 / 384))), ([384], 0.1)]:
        model.set_rotary(windows)
        frequencies = rotary_frequencies(model.config, windows)[0]
        for t in (0, 1, 39):
            torch.testing.assert_close(model.cos[t].double(), (t * frequencies).cos(), rtol=0, atol=1e-6)
            torch.testing.assert_close(model.sin[t].double(), (t * frequencies).sin(), rtol=0, atol=1e-6)
        assert float(model.attention_scale) == pytest.approx(scale)
    assert places == [x.data_ptr() for x in (model.cos, model.sin, model.attention_scale)]


# ---------------------------------------------------------------------------------------------------------------
# The start, and the track `short`
# ---------------------------------------------------------------------------------------------------------------


def test_shapes_and_size_of_the_short_track():
    model = GPT(SHORT.model, 32_768, torch.bfloat16, "meta")
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == {
        "attn": (40, 768, 768), "mlp": (22, 768, 3072), "gate": (10, 6, 12), "smear_gate": (1, 12), "embed": (50304, 768),
        "ngram_embed": (0, 768), "value_embed": (3 * 50304, 768), "lm_head": (50304, 768), "residual": (11, 2),
        "value_mix": (10, 2), "skip": (5,), "smear": (1,), "backout": (1,),
    }  # fmt: skip
    millions = {name: round(p.numel() / 1e6, 1) for name, p in model.named_parameters()}
    table = {"embed": 38.6, "lm_head": 38.6, "value_embed": 115.9, "attn": 23.6, "mlp": 51.9}
    assert table.items() <= millions.items() and sum(millions.values()) == pytest.approx(268.6)
    total = sum(p.numel() for p in model.parameters())
    assert round(total / 1e6, 1) == 268.7
    assert total == 5 * 50304 * 768 + 40 * 768**2 + 22 * 768 * 3072 + 10 * 6 * 12 + 12 + 22 + 20 + 5 + 1 + 1
    low = {name for name, p in model.named_parameters() if p.dtype == torch.bfloat16}
    assert low == {"attn", "mlp", "embed", "value_embed"}
    assert all(p.dtype == torch.float32 for p in GPT(SHORT.model, 32_768, torch.float32, "meta").parameters())
    assert not supports(torch.device("meta"), "flash")


def test_layer_map_of_the_short_track():
    """Section 6.2 of the record's notes counts blocks from 1, here from 0."""
    c = SHORT.model
    assert (c.layers, c.width, c.heads, c.mlp_ratio, c.gate_inputs) == (11, 768, 6, 4, 12)
    assert [i + 1 for i in c.attention_free] == [7] and sorted(i + 1 for i in c.long_blocks) == [4, 11]
    assert sorted((i + 1, table) for i, table in c.value_tables) == [(1, 1), (2, 2), (9, 0), (10, 1), (11, 2)]
    assert sorted((a + 1, b + 1) for a, b in c.skips) == [(1, 10), (2, 9), (3, 8), (4, 7), (5, 6)]
    assert c.backout + 1 == 8 and c.softcap == (30.0, 7.5) and c.rotary_base == 1024 and c.attention_scale == 0.1
    data = SHORT.data
    assert (data.rows * data.row_tokens, data.document_cut, data.document_start) == (262_144, 2048, 50256)
    assert data.predict_start and data.vocab_size == 50257


def test_initial_values():
    """Table 6.2: uniform with std 0.018 = 0.5 / sqrt(768), N(0, 1), zeros and constants; two blocks of full width."""
    c = replace(SHORT.model, padded_vocab=64, layers=2, attention_free=(), long_blocks=(), value_tables=((0, 0), (1, 1)),
                skips=((0, 1),), backout=0)  # fmt: skip
    p = {name: p.detach() for name, p in build(c, seed=3).named_parameters()}
    for bank in (p["attn"][0::4], p["attn"][1::4], p["attn"][2::4], p["mlp"][0::2]):
        assert float(bank.std()) == pytest.approx(0.5 * 768**-0.5, rel=0.01) and abs(float(bank.mean())) < 1e-4
        assert 0.0311 < float(bank.abs().max()) <= 0.03125
    for name in ("embed", "value_embed"):
        assert float(p[name].std()) == pytest.approx(1, rel=0.03) and float(p[name].abs().max()) > 3
    for zero in (p["attn"][3::4], p["mlp"][1::2], p["gate"], p["smear_gate"], p["lm_head"], p["smear"]):
        assert not zero.any()
    assert p["residual"].tolist() == [[1, 0]] * 2 and p["value_mix"].tolist() == [[0.5, 0.5]] * 2
    assert p["skip"].tolist() == [-1.5] and p["backout"].tolist() == [0.5]
    banks = [*p["attn"][[0, 1, 2, 4, 5, 6]], *p["mlp"][[0, 2]], p["embed"], *p["value_embed"].split(64)]
    for i, a in enumerate(banks):  # every matrix has its own draw
        assert all(a.shape != b.shape or not torch.equal(a, b) for b in banks[:i])


def test_initial_values_depend_on_the_seed_alone():
    torch.manual_seed(1)
    first = build(SMALL, seed=5)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    again = GPT(SMALL, 64, torch.bfloat16)
    for p in again.parameters():
        p.data.fill_(torch.nan)
    again.init_weights(5)
    assert torch.equal(torch.get_rng_state(), state)
    other = build(SMALL, seed=6)
    for (name, a), b, c in zip(first.named_parameters(), again.parameters(), other.parameters()):
        assert torch.equal(a.to(b.dtype), b), name
        assert torch.equal(a, c) == (name not in ("attn", "mlp", "embed", "value_embed")), name


def test_loss_at_the_start_is_the_log_of_the_vocabulary():
    model = build(replace(SHORT.model, width=24))
    batch = batch_of(ROWS, vocab=50257)
    with torch.no_grad():
        loss = model(*batch, (3, 7), 21)
    assert float(loss) / int((batch[1] >= 0).sum()) == pytest.approx(10.8258, abs=1e-4)  # ln 50304


GROUPS = {  # name: kind, learning rate at factor 1, updated every
    "attn": ("matrix", 0.03, 1), "gate": ("matrix", 0.03, 1), "smear_gate": ("matrix", 0.03, 1),
    "embed": ("adam", 0.6, 2), "ngram_embed": ("adam", 0.6, 2), "value_embed": ("adam", 0.6, 2), "lm_head": ("adam", 0.008, 2),
    "residual": ("adam", 0.04, 2), "value_mix": ("adam", 0.04, 2), "skip": ("adam", 0.04, 2), "smear": ("adam", 0.04, 2),
    "backout": ("adam", 0.04, 2),
}  # fmt: skip


def groups_of(model):
    groups = build_optimizer(model, replace(SHORT, model=model.config)).param_groups
    return {name: next(g for g in groups if any(p is q for q in g["params"])) for name, p in model.named_parameters()}


def test_optimizer_groups_of_the_short_track():
    groups = groups_of(build(SMALL))
    assert groups.keys() == GROUPS.keys() | {"mlp"}
    for name, (kind, lr, every) in GROUPS.items():
        group = groups[name]
        assert (group["kind"], group["lr"], group["every"], group["weight_decay"]) == (kind, lr, every, 0), name
        if kind == "adam":
            assert (group["betas"], group["eps"]) == ((0.65, 0.95), pytest.approx(1e-8 / 65_536, rel=0.02)), name
        else:
            assert (group["normuon"], group["beta2"], group["equilibrate"], group["nesterov"]) == (True, 0.95, "none", True)
            assert group["lr_mul"] == 1 and group["scale"] == "spectral" and group["orthogonalize"] == "polar_express"
    assert groups["gate"]["normuon_axis"] == groups["smear_gate"]["normuon_axis"] == "row"


def test_learning_rate_of_the_mlp_in_the_short_track():
    """Table 6.2: 0.06 for the up projections, 0.03 for the down projections; both are stored (D, 4 D), shape factor 1."""
    group = groups_of(build(SMALL))["mlp"]
    factors = group["lr_mul"] if isinstance(group["lr_mul"], (list, tuple)) else [group["lr_mul"]] * 22
    assert [group["lr"] * factor for factor in factors] == pytest.approx([0.06, 0.03] * 11)


def test_training_lowers_the_loss_on_one_batch():
    """Zero head: the first update of the Adam groups moves the head alone, two more rounds reach every parameter."""
    model, batch = build(SMALL), batch_of(ROWS)
    optimizer = build_optimizer(model, replace(SHORT, model=SMALL))
    start, count = {name: p.detach().clone() for name, p in model.named_parameters()}, int((batch[1] >= 0).sum())
    losses, moved = [], []
    for _ in range(8):
        loss = model(*batch, (3, 7), 21)
        loss.backward()
        losses.append(loss.item() / count)
        optimizer.step(tokens=count)
        optimizer.zero_grad()
        moved.append({name for name, p in model.named_parameters() if not torch.equal(p, start[name])})
    assert losses[0] == losses[1] == pytest.approx(math.log(64), abs=1e-5)
    assert moved[0] == set() and moved[1] == {"lm_head"} and moved[-1] == start.keys() - {"ngram_embed"}  # which is empty
    assert losses[2] < losses[0] - 0.1 and losses[-1] < losses[2] - 0.1
