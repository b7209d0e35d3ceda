"""The model of records #42 to #89 written out again, per row, with dense masks, in float64; what
flows where; its start."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import train_gpt
from train_gpt import (
    GPT,
    MLP_MATRICES,
    TRACKS,
    FP8Linear,
    Lookup,
    Model,
    Track,
    build_optimizer,
    document_starts,
    fold_bytes,
    match_rows,
    mlp_width,
    ngram_keys,
    rotary_frequencies,
    sample_classes,
    supports,
)

SHORT = TRACKS["short"]
# 10 blocks, 6 heads of 8, the layer map of the track
SMALL = replace(SHORT.model, padded_vocab=64, width=48, ngrams=((2, 97), (3, 50)), ngram_signs=7)
MODELS = {
    "short": SMALL,
    "42": Model(padded_vocab=64, width=48, heads=6, layers=11, attention_free=(6,), long_blocks=(3, 10),
                backout=7, value_tables=((0, 1), (1, 2), (8, 0), (9, 1), (10, 2)),
                skips=((4, 5), (3, 6), (2, 7), (1, 8), (0, 9))),
    "tiny": replace(TRACKS["tiny"].model, padded_vocab=64, width=32, heads=4, matches=(1, 2, 4), ngram_fold=3,
                    ngrams=((2, 97), (3, 64), (5, 128))),
    "medium": replace(TRACKS["medium"].model, padded_vocab=64, width=64, ngrams=((2, 97),), ngram_signs=7,
                      skips=((3, 6), (1, 6))),
    "bare": Model(padded_vocab=64, width=32, heads=2, layers=3, mlp_ratio=2, softcap=(20.0, 1.0, 5.0)),
}  # fmt: skip
LONG = SHORT.schedule.stages[0].windows[1]


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
    return (
        inputs,
        targets,
        torch.tensor([[sum(row[:i]) for i in range(M + 1)] for row in rows], dtype=torch.int32),
    )


def sampled(targets, count, vocab=64):
    """The targets as places among the classes of each row, these, and their log counts."""
    samples = [sample_classes(row, count, vocab, number) for number, row in enumerate(targets.numpy())]
    classes, log_counts = (torch.tensor(np.stack(x)) for x in zip(*samples))
    places = [[some.index(t) if t >= 0 else -1 for t in row]
              for some, row in zip(classes.tolist(), targets.tolist())]  # fmt: skip
    return torch.tensor(places), classes, log_counts


def gradients(model):
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
    }


ROWS = [[1, 5, 4, 9, 1, 1], [21], [10, 11]]


# --------------------------------------------------------------------------------------------------
# Folded bytes, and what followed earlier matches


def test_folded_bytes_are_small_letters_and_spaces():
    folded = fold_bytes(torch.arange(257, dtype=torch.int32)).tolist()
    assert bytes(folded[:256]) == bytes(range(256)).lower().replace(b"\n", b" ") and folded[256] == 256


@pytest.mark.parametrize("length", [1, 2, 3, 7])
def test_followers_of_matches_by_hand(length):
    """Tokens of a small alphabet, so that nearly everything was seen before; documents of all lengths."""
    rows = [[1, 2, 60, 37], [100], [33, 33, 34], [1] * 100]
    inputs, _, offsets = batch_of(rows, vocab=3)
    inputs[1] = 2  # one document of one token, a hundred times
    document = document_starts(offsets, 100).cumsum(1)
    keys = ngram_keys(inputs, document, 7)
    found = match_rows(inputs, [keys[1], keys[length - 1]], document, 64)[1]
    for tokens, number, row in zip(inputs.tolist(), document.tolist(), found.tolist()):
        followers = [follower(tokens, number, t, length) for t in range(100)]
        assert row == [65 + (0 if token is None else 1 + token) for token in followers]
    assert (found > 65).float().mean() > (0.1 if length < 7 else 0)


def test_matches_depend_on_the_document_so_far_alone():
    """Every token of another document, and every later one, is changed: no row of a table changes."""
    inputs, _, offsets = batch_of([[40, 50, 10]], vocab=3)
    document = document_starts(offsets, 100).cumsum(1)

    def rows(tokens):
        return match_rows(tokens, ngram_keys(tokens, document, 3), document, 64)[:, 0, 40:70]

    other = (inputs + torch.randint(1, 3, inputs.shape, generator=torch.Generator().manual_seed(1))) % 3
    other[:, 40:70] = inputs[:, 40:70]
    assert torch.equal(rows(other.int()), rows(inputs))
    other[:, 40] = (inputs[:, 40] + 1) % 3
    assert not torch.equal(rows(other.int()), rows(inputs))


# --------------------------------------------------------------------------------------------------
# The forward pass


def rms(x):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def follower(inputs, document, t, n):
    """The token after the last place before t with the same n last tokens, in its document; None for none."""

    def last(place):  # tokens of other documents count as none
        places = range(place - n + 1, place + 1)
        return [inputs[i] if i >= 0 and document[i] == document[t] else None for i in places]

    places = [s for s in range(t) if document[s] == document[t] and last(s) == last(t)]
    return int(inputs[places[-1] + 1]) if places else None


def reference(p, c, inputs, targets, lengths, windows, scale, base, tied=False):
    """Losses of one row (T, V); p maps names to float64 parameters.

    Half of each head's pairs rotate by base^(-j / (n - 1)).
    """
    T, D, d = len(inputs), c.width, c.width // c.heads
    document = [i for i, length in enumerate(lengths) for _ in range(length)]
    rotating = d // 4
    speeds = [base ** (-j / max(1, rotating - 1)) if j < rotating else 0.0 for j in range(d // 2)]

    def rotate(x, place):  # (d,)
        a, b = x[: d // 2], x[d // 2 :]
        angle = torch.tensor([place * w for w in speeds], dtype=torch.float64)
        return torch.cat([a * angle.cos() + b * angle.sin(), b * angle.cos() - a * angle.sin()])

    e = [p["lm_head" if tied else "embed"][token] for token in inputs]
    for t in range(T):
        begin = 0
        for n, rows in c.ngrams:
            key = 0
            for k in range(n):  # 0 for what lies before the document
                same = t >= k and document[t - k] == document[t]
                token = int(inputs[t - k])
                if 0 < c.ngram_fold <= n:
                    token = ord({"\n": " "}.get(chr(token), chr(token).lower()))
                key = (key * 1_000_003 + (token + 1 if same else 0)) % 2**31
            sign = p["signs"][key * 16_807 // 512 % c.ngram_signs] if c.ngram_signs else 1
            e[t] = e[t] + sign * p["ngram_embed"][begin + key * 48_271 // 256 % rows]
            begin += rows
        for number, n in enumerate(c.matches):
            row = begin + number * (c.padded_vocab + 1)
            if (token := follower(inputs, document, t, n)) is not None:
                row += 1 + token
            e[t] = e[t] + p["ngram_embed"][row]
    smeared = [e[0]]
    for t in range(1, T):
        gate = torch.sigmoid(p["smear_gate"][0] @ e[t][: c.gate_inputs])
        smeared.append(e[t] + (document[t] == document[t - 1]) * p["smear"][0] * e[t - 1] * gate)
    x = x0 = rms(torch.stack(smeared))
    outputs, attentions = [], 0
    for i in range(c.layers):
        for number, (source, target) in enumerate(c.skips):
            if target == i:
                x = x + torch.sigmoid(p["skip"][number]) * outputs[source]
        x = p["residual"][i, 0] * x + p["residual"][i, 1] * x0
        if i not in c.attention_free:
            wq, wk = p["qk"].reshape(-1, c.width, c.width)[2 * attentions : 2 * attentions + 2]
            wv, wo = p["vo"][2 * attentions : 2 * attentions + 2]
            window = windows[1] if i in c.long_blocks else windows[0]
            a = rms(outputs[c.attention_source] if -1 < c.attention_source < i else x)
            v = (p["value_mix"][attentions, 0] * (a @ wv.T)).view(T, c.heads, d)
            for block, table in c.value_tables:
                if block == i:
                    rows = torch.stack([p["value_embed"][table * c.padded_vocab + token] for token in inputs])
                    weight = p["value_mix"][attentions, 1] * torch.ones(T, c.heads, 1, dtype=torch.float64)
                    if n := c.value_gate_inputs:
                        read = torch.cat([a[:, :n], rows[:, :n]], 1)
                        weight = weight * 2 * torch.sigmoid(read @ p["value_gate"][attentions].T)[..., None]
                    v = v + weight * rows.view(T, c.heads, d)
            # Heads that share a sequence, in the order of its positions; a paired one has two
            # positions for each token.
            pairs, half = i in c.paired, c.heads // 2
            groups = [[h, h + half] for h in range(half)] if pairs else [[h] for h in range(c.heads)]
            queries, keys = (rms((a @ w.T).view(T, c.heads, d)) for w in (wq, wk))
            y = torch.zeros(T, c.heads, d, dtype=torch.float64)
            for heads in groups:
                places = [(t, h) for t in range(T) for h in heads]
                q, k = (
                    torch.stack([rotate(z[key], place) for place, key in enumerate(places)])
                    for z in (queries, keys)
                )
                if i in c.key_offset:  # the last half of each half of the channels does not rotate
                    still = torch.tensor([j % (d // 2) >= rotating for j in range(d)])
                    first = [
                        n == 0 or document[t] != document[places[n - 1][0]] for n, (t, _) in enumerate(places)
                    ]
                    k = torch.stack(
                        [row if first[n] else torch.where(still, k[n - 1], row) for n, row in enumerate(k)]
                    )
                mask = torch.tensor([
                    [document[s] == document[t] and 0 <= m - n <= window for n, (s, _) in enumerate(places)]
                    for m, (t, _) in enumerate(places)
                ])  # fmt: skip
                weights = (scale * q @ k.T).masked_fill(~mask, -math.inf).softmax(-1)
                found = weights @ torch.stack([v[key] for key in places])
                y[:, heads] = found.view(T, len(heads), d)
            if i in c.xsa:
                along = (y * v).sum(-1) / v.square().sum(-1)
                y = y - (torch.tanh(p["xsa"][attentions]) * along)[..., None] * v
            gates = torch.sigmoid(a[:, : c.gate_inputs] @ p["gate"][attentions].T)
            x = x + (gates[..., None] * y).reshape(T, -1) @ wo.T
            attentions += 1
        up, down = p["mlp"][2 * i], p["mlp"][2 * i + 1]  # both (D, hidden)
        x = x + (rms(x) @ up).clamp(min=0).square() @ down.T
        outputs.append(x)
    if c.backout >= 0:
        x = x - p["backout"][0] * outputs[c.backout]
    z = c.softcap[0] * torch.sigmoid((rms(x) @ p["lm_head"].T + c.softcap[1]) / c.softcap[2])
    assert x.shape == (T, D)
    further = [[*targets[k:], *[-1] * k] for k in range(3)]  # the targets 1, 2, 3 tokens on
    return torch.stack(
        [sum(z[t].logsumexp(0) - z[t, y] for t, y in enumerate(row) if y >= 0) for row in further]
    )


@pytest.mark.parametrize(
    "name,windows,weights",
    [("short", (3, 7), [1]), ("short", (64, 64), [1, 0.5, 0.1]), ("42", (3, 7), [1]),
     ("tiny", (2, 5), [1, 0.5]), ("bare", (4, 9), [1, 0.4, 0.3]), ("medium", (3, 7), [1])],
)  # fmt: skip
def test_loss_and_gradients_against_the_reference(name, windows, weights):
    c = MODELS[name]
    model, (inputs, targets, offsets) = build(c, spread=0.15), batch_of(ROWS)
    model.tied = name == "bare"
    losses = model(inputs, targets, offsets, windows, 21, len(weights) - 1)
    losses.backward(torch.tensor(weights, dtype=torch.float32))
    assert losses.dtype == torch.float32 and losses.shape == (len(weights),)
    p = {key: value.detach().double().requires_grad_() for key, value in model.named_parameters()}
    p["signs"] = model.signs.double()
    rows = zip(inputs.tolist(), targets.tolist(), ROWS)
    expected = sum(
        reference(p, c, *row, windows, c.attention_scale, c.rotary_base, model.tied) for row in rows
    )[: len(weights)]
    expected.backward(torch.tensor(weights, dtype=torch.float64))
    assert losses.tolist() == pytest.approx(expected.tolist(), rel=1e-6)
    for key, found in gradients(model).items():
        wanted = torch.zeros_like(p[key]) if p[key].grad is None else p[key].grad
        error = (found.double() - wanted).norm() / wanted.norm().clamp_min(1e-9)
        assert error < 1e-4, (key, float(error))


@pytest.mark.parametrize("tied", (False, True))
def test_a_softmax_over_all_classes_as_a_sample_is_the_full_one(tied):
    """Losses and gradients to the bit, but for the sum over rows that the head's gradient is."""
    full, some = build(SMALL, spread=0.05), build(SMALL, spread=0.05)
    full.tied = some.tied = tied
    inputs, targets, offsets = batch_of(ROWS)
    places, *sample = sampled(targets, 64)
    assert places.equal(targets)
    losses = [
        full(inputs, targets, offsets, (3, 7), 21, 1),
        some(inputs, places, offsets, (3, 7), 21, 1, *sample),
    ]
    for loss in losses:
        loss.backward(torch.tensor([1.0, 0.5]))
    assert losses[1].tolist() == pytest.approx(losses[0].tolist(), rel=1e-7)
    wanted = gradients(full)
    for key, found in gradients(some).items():
        assert (found - wanted[key]).norm() <= 1e-6 * wanted[key].norm(), key


@pytest.mark.parametrize("tied", (False, True))
def test_sampled_softmax_against_the_full_logits(tied):
    """In float64: a softmax over the row's classes of the logits that validation has, other classes gone,
    those that are no targets so many times that all 64 are counted."""
    model = build(SMALL, spread=0.05)
    model.tied = tied
    inputs, targets, offsets = batch_of(ROWS, vocab=20)
    places, classes, log_counts = sampled(targets, 24)
    loss = model(inputs, places, offsets, (3, 7), 21, 0, classes, log_counts)
    loss.backward()
    with torch.no_grad():
        logits = model.logits(model.stream(inputs, offsets, (3, 7), 21, model.tables()).flatten(0, 1))
    expected, logits = 0.0, logits.double().view(3, 21, 64)
    for row, wanted, some in zip(logits, targets.tolist(), classes.tolist()):
        own = {target for target in wanted if target >= 0}
        times = torch.tensor([1.0 if c in own else (64 - len(own)) / (24 - len(own)) for c in some]).double()
        for z, target in zip(row, wanted):
            expected += float((times * z[some].exp()).sum().log() - z[target]) if target >= 0 else 0.0
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    # no gradient for a class that no row has; while they are tied the inputs are rows of the head too
    read = {*classes.flatten().tolist()} | ({*inputs.flatten().tolist()} if tied else set())
    moved = {place for place, grad in enumerate(model.lm_head.grad) if grad.any()}
    assert moved == read < {*range(64)}


@pytest.mark.parametrize("name", MODELS)
def test_validation_loss_is_the_plain_cross_entropy(name):
    """The claim of a record rests on it: no term that only training minimises may be in it."""
    model, (inputs, targets, offsets) = build(MODELS[name], spread=0.15), batch_of(ROWS)
    with torch.no_grad():
        loss = float(model(inputs, targets, offsets, (3, 7), 21))
        x = model.stream(inputs, offsets, (3, 7), 21, model.tables()).flatten(0, 1)
        logits = model.logits(x).double()
    chances = torch.exp(logits) / torch.exp(logits).sum(1, keepdim=True)
    counted = [(place, target) for place, target in enumerate(targets.flatten().tolist()) if target >= 0]
    expected = -sum(math.log(chances[place, target]) for place, target in counted)
    assert loss == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", ("tiny", "short"))
def test_operators_one_by_one_have_the_results_of_those_in_a_graph(name, monkeypatch):
    """Norms, softmax, MLP and losses have two forms; classes are sampled or not."""
    inputs, targets, offsets = batch_of(ROWS)
    places, classes, log_counts = sampled(targets, 64)
    sample = classes, log_counts + torch.linspace(0, 1, 64)
    found = []
    for form in (True, False):
        monkeypatch.setattr(train_gpt, "one_by_one", lambda x, form=form: form)
        model = build(MODELS[name], spread=0.15)
        losses = [
            model(inputs, targets, offsets, (3, 7), 21, 1),
            model(inputs, places, offsets, (3, 7), 21, 1, *sample),
        ]
        sum(losses).backward(torch.tensor([1.0, 0.5]))
        found.append((torch.stack(losses).detach(), gradients(model)))
    (losses, grads), (others, expected) = found
    torch.testing.assert_close(losses, others, rtol=1e-6, atol=0)
    for key, grad in expected.items():
        assert (grads[key] - grad).norm() <= 1e-5 * grad.norm(), key


@pytest.mark.parametrize("function", (train_gpt.norm, train_gpt.relu_squared))
def test_backwards_of_our_own(function):
    """Against differences in float64, also where the norm of a row is near its floor; bfloat16 beside it."""
    x, grad = torch.randn(2, 3, 4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x[0, 1] = 1e-3 * x[0, 2]
    assert torch.autograd.gradcheck(function, x.requires_grad_(), atol=1e-7)
    exact, rounded = (
        torch.autograd.grad(function(x.to(dtype)), x, grad.to(dtype))[0]
        for dtype in (torch.float64, torch.bfloat16)
    )
    assert (rounded - exact).norm() <= 2**-7 * exact.norm()


def test_every_matrix_of_the_mlp_is_known_where_there_are_two():
    """Bank, start and slices follow MLP_MATRICES; the learning rates go by (up, down)."""
    model = build(SMALL, seed=3)
    assert len(model.mlp) == SMALL.layers * len(MLP_MATRICES)
    for name, matrices in zip(MLP_MATRICES, (model.mlp[0::2], model.mlp[1::2])):
        assert bool(matrices.any()) == (name == "up")


def test_bfloat16_activations_stay_near_fp32():
    batch = batch_of(ROWS)
    wide, narrow = (build(SMALL, spread=0.05, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    losses = [model(*batch, (3, 7), 21) for model in (wide, narrow)]
    losses[1].backward()
    assert losses[1].dtype == torch.float32
    for name, p in narrow.named_parameters():
        in_fp32 = "embed" in name  # tables: sums of many passes
        assert p.numel() == 0 or p.grad.dtype == (torch.float32 if in_fp32 else p.dtype), name
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=0.01)


# --------------------------------------------------------------------------------------------------
# What flows where


@torch.no_grad()
def losses_by_position(model, inputs, targets, offsets, windows):
    """The loss of each target of one row alone: all other targets are -1."""
    T = inputs.size(1)
    single = torch.full((T, T), -1).diagonal_scatter(targets[0])
    return [float(model(inputs, row[None], offsets, windows, T)) for row in single]


@pytest.mark.parametrize("name,windows", [("short", (64, 64)), ("42", (64, 64)), ("tiny", (3, 64))])
def test_no_information_from_the_future_or_another_document(name, windows):
    """Exactly the losses from a token's position to the end of its document depend on it."""
    lengths = [3, 1, 7, 2]
    model, (inputs, targets, offsets) = build(MODELS[name], spread=0.15), batch_of([lengths], masked=0.0)
    document = [i for i, length in enumerate(lengths) for _ in range(length)]
    T, before = len(document), losses_by_position(model, inputs, targets, offsets, windows)
    for s in range(T):
        changed = inputs.clone()
        changed[0, s] = (changed[0, s] + 1) % 64
        after = losses_by_position(model, changed, targets, offsets, windows)
        found = [t for t in range(T) if before[t] != after[t]]
        assert found == [t for t in range(s, T) if document[t] == document[s]], s


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
        losses = [
            float(model(x, only_middle, o, (3, 7), 21)) for x, o in [(inputs, offsets), (changed, moved)]
        ]
    assert losses[0] == losses[1] != 0


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("micro_rows", (1, 2, 3))
def test_rows_accumulate_to_the_big_batch(name, micro_rows):
    """Losses and gradients are sums: any division into forward passes gives those of all rows at once."""
    rows = [*ROWS, [2, 19], [20, 1], [7, 7, 7]]
    # in float64: where the terms of a sum nearly cancel, roundings of float32 would show
    model, batch = build(MODELS[name], spread=0.15, dtype=torch.float64).double(), batch_of(rows)
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
        assert (found - expected[key]).norm() <= 1e-10 * expected[key].norm(), key


def test_gradients_reach_every_parameter():
    """All but the mix and gate of value embeddings in blocks without one, and table rows of tokens
    that do not occur."""
    model = build(SMALL, spread=0.15)
    inputs, targets, offsets = batch_of(ROWS, masked=0.0)
    model(inputs, targets, offsets, (3, 7), 21).backward()
    found = gradients(model)
    with_table = [1, 2, 5, 6]  # blocks 1, 2, 7, 9, counted without blocks 4, 6, 8
    assert found["value_mix"][:, 1].nonzero().flatten().tolist() == with_table
    assert (found["value_mix"][:, 0] != 0).all()
    seen = torch.zeros(64, dtype=torch.bool)
    seen[inputs.flatten()] = True
    assert torch.equal(found["embed"].any(1), seen)
    assert torch.equal(found["value_embed"].any(1), seen.repeat(4))
    assert found["value_gate"].flatten(1).any(1).nonzero().flatten().tolist() == with_table
    assert found["xsa"].any(1).nonzero().flatten().tolist() == [1, 3, 5, 6]  # blocks 1, 3, 7, 9
    for key in ("qk", "vo", "mlp", "gate", "smear_gate", "lm_head"):
        assert found[key].flatten(1).any(1).all(), key
    for key in ("residual", "skip", "smear", "backout"):
        assert (found[key] != 0).all(), key


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_lookup_adds_up_gradients_in_fp32(dtype):
    """Thousands of small gradients of one row: bfloat16 sums would stop growing at 256 times their size."""
    table, sums = torch.randn(9, 4, dtype=dtype, requires_grad=True), torch.ones(9, 4)
    read = torch.zeros(9, dtype=torch.bool)
    index = torch.tensor([[3, 5, 3], [0, 3, 8]], dtype=torch.int32).repeat(1, 1000)
    found = Lookup.apply(table, sums, read, index)
    assert torch.equal(found, table[index.long()])
    found.backward(torch.full_like(found, 0.125))
    expected = torch.bincount(index.flatten(), minlength=9)[:, None].expand(9, 4) * 0.125
    torch.testing.assert_close(sums, 1 + expected, rtol=1e-6, atol=0)
    assert table.grad is None and read.nonzero().flatten().tolist() == [0, 3, 5, 8]


@pytest.mark.parametrize("low", (False, True))
@pytest.mark.parametrize("name", ("short", "42"))
def test_what_blocks_share_has_the_gradients_of_autograd(name, low):
    """On a GPU each reader adds to the sums: the embedding, the source of attention, skips, backout."""
    found = []
    for adds in (False, True):
        model = build(MODELS[name], spread=0.15)
        model.adds_gradients, model.low_memory = adds, low
        loss = model(*batch_of(ROWS), (3, 7), 21)
        loss.backward()
        found.append((loss.detach(), gradients(model)))
    (loss, expected), (same, sums) = found
    assert torch.equal(loss, same)
    for key, grad in expected.items():
        assert (sums[key] - grad).norm() <= 1e-5 * grad.norm(), key


# --------------------------------------------------------------------------------------------------
# Memory and precision


def saved_bytes(model, batch, windows):
    """Bytes kept for the backward, parameters and their gradients not counted, and the loss."""
    model.tables()  # makes the gradients of tables
    own = [x for p in model.parameters() for x in (p, p.grad) if x is not None]
    own, kept = {x.untyped_storage()._cdata for x in own}, {}

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
        model.loss = lambda x, targets, pieces=pieces, loss_of=loss_of: (
            pieces.append(len(x)) or loss_of(x, targets)
        )
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
    """A row of 16,384 tokens keeps 15 GB for an uncompiled backward, and a gigabyte when blocks are
    recomputed."""
    kept = []
    for low in (False, True):
        model, T = GPT(SHORT.model, 16_384, torch.bfloat16, "meta"), 16_384
        model.fused, model.low_memory = True, low
        batch = [torch.empty(shape, dtype=kind, device="meta") for shape, kind in (
            ((1, T), torch.int32), ((1, T), torch.int64), ((1, 129), torch.int32))]  # fmt: skip
        kept.append(saved_bytes(model, batch, (640, 1408))[0] / 1e9)
    assert 10 < kept[0] < 20 and kept[1] < 1.1, kept


class Strict(tuple):
    """Refuses what dynamo of torch 2.11 refuses: True and False as an index."""

    def __getitem__(self, index):
        assert type(index) is not bool
        return super().__getitem__(index)


@pytest.mark.parametrize("low", [False, True])
def test_nothing_in_the_graph_of_a_pass_is_read_at_a_bool(low):
    model, batch = build(MODELS["short"]), batch_of(ROWS)
    model.LOGITS_AT_ONCE, model.low_memory = Strict(model.LOGITS_AT_ONCE), low
    inputs, targets, offsets = batch
    assert model.body(inputs, targets, offsets, Strict((3, 7)), 21, 0, model.tables()).isfinite().all()


def test_parameters_in_low_precision_change_no_bit_of_the_first_loss():
    """A bfloat16 parameter is the fp32 one rounded on use; its gradient is the one that is rounded anyway."""
    losses, found = [], []
    one_table = replace(SMALL, low_precision=(), ngrams=((2, 97),), matches=())  # nothing is summed before
    for names in ((), SMALL.low_precision):
        model = build(one_table, spread=0.05, dtype=torch.bfloat16)
        for name in names:
            setattr(model, name, torch.nn.Parameter(getattr(model, name).detach().bfloat16()))
        loss = model(*batch_of(ROWS), (3, 7), 21)
        loss.backward()
        losses.append(float(loss.detach()))
        found.append(gradients(model))
    assert losses[0] == losses[1] and SMALL.low_precision
    for key, expected in found[0].items():
        # sums over the places of a token, in fp32 or in bfloat16
        if key in ("embed", "value_embed", "ngram_embed"):
            assert (found[1][key].float() - expected).norm() <= 2**-7 * expected.norm(), key
        else:
            assert torch.equal(found[1][key].float(), expected), key


FP8 = (48**0.5 / 448, 2**-9, 1 / 448)


@pytest.mark.parametrize("seed", range(3))
def test_fp8_head_against_products_in_float64(seed):
    """Three bits of mantissa forward, two in the gradient: a few percent; what exceeds the range
    stays finite."""
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
    x, w, outer = (
        torch.randn(shape, generator=generator).bfloat16() for shape in ((64, 48), (32, 48), (64, 32))
    )
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
    assert 0 < abs(float((losses[1] - losses[0]).detach())) < 0.01 * float(losses[0].detach())
    for key, expected in gradients(plain).items():
        if expected.numel() > 20:  # single numbers are sums that cancel
            assert 0.001 < (gradients(model)[key] - expected).norm() / expected.norm() < 0.1, key


# --------------------------------------------------------------------------------------------------
# Rotary positions

GROWTH = [384, 896, 1408, 1664]


@pytest.mark.parametrize(
    "changes,scale,w10,w31",
    [(0, 0.1000, 1024 ** (-10 / 31), 1 / 1024), (1, 0.1170, 0.05671, 4.185e-4),
     (2, 0.1275, 0.04080, 2.663e-4), (3, 0.1318, 0.03617, 2.254e-4)],
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


# --------------------------------------------------------------------------------------------------
# The start, and the track `short`


def test_shapes_and_size_of_the_short_track():
    model = GPT(SHORT.model, 16_384, torch.bfloat16, "meta")
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == {
        "qk": (42, 256, 768), "vo": (14, 768, 768), "mlp": (20, 768, 2816), "gate": (7, 6, 12),
        "value_gate": (7, 6, 12), "smear_gate": (1, 12), "embed": (50304, 768),
        "ngram_embed": (377_280 + 2 * 50305, 768), "value_embed": (4 * 50304, 768), "lm_head": (50304, 768),
        "residual": (10, 2), "value_mix": (7, 2), "xsa": (7, 6), "skip": (1,), "smear": (1,),
        "backout": (1,),
    }  # fmt: skip
    millions = {name: round(p.numel() / 1e6, 1) for name, p in model.named_parameters()}
    table = {"embed": 38.6, "lm_head": 38.6, "value_embed": 154.5, "ngram_embed": 367.0, "qk": 8.3,
             "vo": 8.3, "mlp": 43.3}  # fmt: skip
    assert table.items() <= millions.items()
    total = sum(p.numel() for p in model.parameters())
    tables, matrices = (8 * 50304 + 2 + 377_280) * 768, 28 * 768**2 + 20 * 768 * 2816
    gates, scalars = 2 * 7 * 6 * 12 + 12, 20 + 14 + 42 + 3
    assert total == tables + matrices + gates + scalars
    low = {name for name, p in model.named_parameters() if p.dtype == torch.bfloat16}
    assert low == {"qk", "vo", "mlp", "embed", "value_embed", "ngram_embed"}
    assert all(p.dtype == torch.float32 for p in GPT(SHORT.model, 16_384, torch.float32, "meta").parameters())
    assert not supports(torch.device("meta"), "flash")


def test_layer_map_of_the_short_track():
    """That of the notes on record #89 without block 7; blocks without attention as in #92, 4 and 9 too."""
    c = SHORT.model
    assert (c.layers, c.width, c.heads, mlp_width(c)) == (10, 768, 6, 2816)
    assert (c.gate_inputs, c.value_gate_inputs) == (12, 6)
    assert c.attention_free == (4, 6, 8) and c.long_blocks == c.key_offset == (3, 9) and c.paired == (0, 2, 5)
    assert [block for block, _ in c.value_tables] == [1, 2, 7, 9]
    assert len({table for _, table in c.value_tables}) == 4
    assert c.skips == ((3, 6),) and c.backout == c.attention_source == 6 and c.xsa == (1, 3, 7, 9)
    assert not {*c.paired} & {*c.key_offset, *c.xsa}
    assert c.softcap == (23.0, 5.0, 7.5) and c.rotary_base == 1024 and c.attention_scale == 0.1
    assert c.ngrams == ((2, 377_280),) and c.matches == (1, 3)
    assert c.tied == 1 and c.width // c.qk_parts == 2 * c.width // c.heads
    assert SHORT.data.predict_start and (SHORT.data.vocab_size, SHORT.data.document_start) == (50257, 50256)


def test_the_mlp_may_be_a_fraction_of_the_width():
    """2,816 of 768, as #92 has it; a whole ratio of an earlier log or checkpoint is the same setting."""
    assert mlp_width(replace(SHORT.model, mlp_ratio=3.6667)) == 2816  # as it is typed
    former = Model(mlp_ratio=4)
    assert former == Model(mlp_ratio=4.0) and mlp_width(former) == 4 * former.width


def test_initial_values():
    """Table 6.1: uniform with std 0.018 = 0.5 / sqrt(768), normal tables, zeros and constants; two
    blocks of full width."""
    c = replace(SHORT.model, padded_vocab=64, layers=2, attention_free=(), long_blocks=(),
                value_tables=((0, 0), (1, 1)), skips=((0, 1),), backout=0, attention_source=-1, xsa=(1,),
                key_offset=(), paired=(), ngrams=((2, 9),))  # fmt: skip
    p = {name: p.detach() for name, p in build(c, seed=3).named_parameters()}
    for bank in (p["qk"][:3], p["qk"][3:6], p["vo"][0::2], p["vo"][1::2], p["mlp"][0::2]):
        assert float(bank.std()) == pytest.approx(0.5 * 768**-0.5, rel=0.01)
        assert abs(float(bank.mean())) < 1e-4
        assert 0.0311 < float(bank.abs().max()) <= 0.03126
    for name, std in (("embed", 0.005), ("lm_head", 0.005), ("value_embed", 0.01)):
        assert float(p[name].std()) == pytest.approx(std, rel=0.03) and float(p[name].abs().max()) > 3 * std
    for zero in (
        p["mlp"][1::2],
        *(p[name] for name in ("gate", "value_gate", "smear_gate", "smear", "xsa", "ngram_embed")),
    ):
        assert not zero.any()
    assert p["residual"].tolist() == [[pytest.approx(1.1), 0]] * 2
    assert p["value_mix"].tolist() == [[0.5, 0.5]] * 2
    assert p["skip"].tolist() == [-1.5] and p["backout"].tolist() == [0.5]
    banks = [*p["qk"], *p["vo"], *p["mlp"][[0, 2]], p["embed"], p["lm_head"], *p["value_embed"].split(64)]
    for i, a in enumerate(banks):  # every matrix has its own draw
        assert all(a.shape != b.shape or not torch.equal(a, b) for b in banks[:i])


def test_the_default_start_is_that_of_record_42():
    """Zero o, down projections and head; N(0, 1) tables."""
    p = dict(build(MODELS["42"], seed=3).named_parameters())
    assert not any(bank.any() for bank in (p["vo"][1::2], p["mlp"][1::2], p["lm_head"]))
    assert all(
        float(p[name].detach().std()) == pytest.approx(1, rel=0.05) for name in ("embed", "value_embed")
    )


@pytest.mark.parametrize("count", (1, 7, 64))
def test_sign_patterns_are_fixed_and_balanced(count):
    first, again = (GPT(replace(SMALL, ngram_signs=count), 8, torch.float32).signs for _ in range(2))
    assert torch.equal(first, again) and first.shape == (count, 48)
    assert torch.equal(first.abs(), torch.ones_like(first))
    assert abs(float(first.mean())) < 4 / first.numel() ** 0.5


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
        assert torch.equal(a, c) == (name not in ("qk", "vo", "mlp", "embed", "value_embed", "lm_head")), name


def test_loss_at_the_start_is_the_log_of_the_vocabulary():
    """A zero head gives ln 50304 = 10.8258; that of the track `short` is almost zero."""
    for head_std, tolerance in ((0.0, 1e-4), (0.005, 3e-3)):
        model = build(replace(SHORT.model, width=24, qk_parts=1, head_std=head_std, ngrams=((2, 50),)))
        batch = batch_of(ROWS, vocab=50257)
        with torch.no_grad():
            loss = model(*batch, (3, 7), 21)
        assert float(loss) / int((batch[1] >= 0).sum()) == pytest.approx(10.8258, abs=tolerance)


# Table 6.1: kind, learning rate at factor 1, betas, decay in one update at factor 1, updated every;
# one group of gates, of scalars and of tables instead of several. Tables have no first moment and are
# row-wise, as in #92. Our epsilon is for means over tokens: 1e-10 over two steps of 32,768.
GROUPS = {
    **dict.fromkeys(("qk", "vo", "mlp"), ("matrix", 0.023, None, 6.3e-4, 1)),
    **dict.fromkeys(("gate", "value_gate", "smear_gate"), ("adam", 0.008, (0.9, 0.99), 0, 2)),
    **dict.fromkeys(("embed", "lm_head"), ("adam", 0.008, (0.5, 0.95), 4.8e-5, 2)),
    **dict.fromkeys(("ngram_embed", "value_embed"), ("adam", 0.6, (0.0, 0.95), 9.0e-3, 2)),
    **dict.fromkeys(
        ("residual", "value_mix", "xsa", "skip", "smear", "backout"), ("adam", 0.04, (0.9, 0.99), 0, 2)
    ),
}


def groups_of(model):
    groups = build_optimizer(model, replace(SHORT, model=model.config)).param_groups
    return {
        name: next(g for g in groups if any(p is q for q in g["params"]))
        for name, p in model.named_parameters()
    }


def test_optimizer_groups_of_the_short_track():
    groups = groups_of(build(SMALL))
    assert groups.keys() == GROUPS.keys()
    for name, (kind, lr, betas, decay, every) in GROUPS.items():
        group = groups[name]
        assert (group["kind"], group["lr"], group["every"]) == (kind, lr, every), name
        assert group["lr"] * group["weight_decay"] == pytest.approx(decay, rel=0.01), name
        assert group["cautious"] or not decay, name
        if kind == "adam":
            assert group["rowwise"] == (name in ("ngram_embed", "value_embed")), name
            assert (group["betas"], group["eps"]) == (betas, pytest.approx(1e-10 / 65_536, rel=0.02)), name
        else:
            assert (group["normuon"], group["beta2"]) == (True, 0.9)
            assert (group["equilibrate"], group["nesterov"]) == ("none", True)
            assert group["scale"] == "spectral" and group["orthogonalize"] == "polar_express"


def test_learning_rate_of_the_mlp_in_the_short_track():
    """Table 6.1: 0.046 for the up and 0.092 for the down projections; both are stored (D, 4 D)
    here, shape factor 1."""
    groups = groups_of(build(SMALL))
    assert groups["qk"]["lr_mul"] == groups["vo"]["lr_mul"] == 1
    assert [groups["mlp"]["lr"] * factor for factor in groups["mlp"]["lr_mul"]] == pytest.approx(
        [0.046, 0.092]
    )


def test_training_lowers_the_loss_on_one_batch():
    """Record #42, zero head: the first update of the Adam groups moves the head alone, two more
    rounds every parameter."""
    model, batch = build(MODELS["42"]), batch_of(ROWS)
    optimizer = build_optimizer(model, Track(model=model.config))
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    count = int((batch[1] >= 0).sum())
    losses, moved, empty = [], [], {"ngram_embed", "value_gate", "xsa"}
    for _ in range(8):
        loss = model(*batch, (3, 7), 21)
        loss.backward()
        losses.append(loss.item() / count)
        optimizer.step(tokens=count)
        optimizer.zero_grad()
        moved.append({name for name, p in model.named_parameters() if not torch.equal(p, start[name])})
    assert losses[0] == losses[1] == pytest.approx(math.log(64), abs=1e-5)
    assert moved[0] == set() and moved[1] == {"lm_head"} and moved[-1] == start.keys() - empty
    assert losses[2] < losses[0] - 0.1 and losses[-1] < losses[2] - 0.1
