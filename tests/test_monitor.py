"""The values of tools/monitor.py against NumPy and brute force; the run under it is the run without it."""

import functools
import json
import math
from unittest import mock

import numpy as np
import pytest
import torch

import monitor
import train_gpt
from helpers import events, options, train, train_with
from lib.logs import any_runs

CAUTIOUS = dict(
    embed__weight_decay=0.01, embed__cautious=True, tables__weight_decay=0.01, tables__cautious=True
)
EVERY = ["--every", "4"]
PROBE = 40  # tokens at least; twice the long window are 48, which end no document, and then all 64 of a row


@pytest.fixture(scope="module", autouse=True)
def few_probed_tokens(data_dir):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(monitor, "PROBE", PROBE)
        yield


def log_of(outcome):
    *lines, overhead = events(outcome.log.with_suffix(".monitor.jsonl"))
    assert {line["event"] for line in lines} == {"monitor"} and overhead["event"] == "overhead"
    return {line["step"]: line for line in lines}, overhead


class Witness:
    """What the optimizer and the training passes of a run see, of each step; q, k and streams of
    the first row."""

    def __init__(self):
        self.steps, self.pairs, self.streams, self.row = {}, [], [], None
        step = train_gpt.MuonEq.step
        block = train_gpt.GPT.block
        attend = train_gpt.attend
        forward = train_gpt.GPT.forward
        witness = self

        def seen_step(optimizer, *, tokens):
            named = [pair for unit in optimizer.units for pair in zip(unit.names, unit.params)]
            before = {name: p.detach().double().numpy().copy() for name, p in named}
            grads = {
                name: p.grad.double().numpy().copy() if p.grad is not None else 0 * before[name]
                for name, p in named
            }
            counts = {name: unit.tokens + tokens for unit in optimizer.units for name in unit.names}
            step(optimizer, tokens=tokens)
            witness.steps[optimizer.step_count] = dict(
                before=before, mean={name: grad / counts[name] for name, grad in grads.items()},
                after={name: p.detach().double().numpy().copy() for name, p in named},
                state=optimizer.state_dict()["state"], row=witness.row, pairs=witness.pairs,
                streams=witness.streams)  # fmt: skip
            witness.pairs, witness.streams, witness.row = [], [], None

        def seen_block(*args):
            x = block(*args)
            witness.streams += [x[0].detach().double().numpy()] * torch.is_grad_enabled()
            return x

        def seen_attend(q, k, *args):
            witness.pairs += [
                (q[0].detach().double().numpy(), k[0].detach().double().numpy())
            ] * torch.is_grad_enabled()
            return attend(q, k, *args)

        def seen_forward(model, inputs, targets, offsets, windows, *args):
            witness.row = witness.row or (offsets[0].numpy(), windows)
            return forward(model, inputs, targets, offsets, windows, *args)

        self.patches = [
            mock.patch.object(train_gpt.MuonEq, "step", seen_step),
            mock.patch.object(train_gpt.GPT, "block", seen_block),
            mock.patch.object(train_gpt, "attend", seen_attend),
            mock.patch.object(train_gpt.GPT, "forward", seen_forward),
        ]  # fmt: skip


def witnessed(argv):
    witness = Witness()
    for patch in witness.patches:
        patch.start()
    try:
        return train(argv, monitor.main), witness.steps
    finally:
        mock.patch.stopall()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    argv = options(out=tmp_path_factory.mktemp("monitored"), checkpoint_every=8, **CAUTIOUS)
    outcome, seen = witnessed([*EVERY, *argv])
    return outcome, *log_of(outcome), seen, argv


def rms(x):
    return math.sqrt((x**2).mean())


def test_the_run_is_that_of_train_gpt(run, tmp_path):
    outcome, lines, overhead, *_ = run
    before = {name: getattr(train_gpt, name) for name in ("Log", "attend", "orthogonalize")} | vars(
        train_gpt.Unit
    )
    alone = train(options(out=tmp_path, **CAUTIOUS))
    assert not list(tmp_path.glob("*.monitor.jsonl"))
    assert alone.losses == outcome.losses
    assert all(torch.equal(p, outcome.params[name]) for name, p in alone.params.items())
    assert list(lines) == [4, 8, 12, 16, 20]
    assert overhead["train_time_s"] == outcome.final["train_time_s"]
    assert overhead["share"] == pytest.approx(overhead["monitor_s"] / overhead["train_time_s"])
    assert 0 < overhead["share"] < 1
    train(options(out=tmp_path, **CAUTIOUS), monitor.main)
    assert before == {name: getattr(train_gpt, name) for name in ("Log", "attend", "orthogonalize")} | vars(
        train_gpt.Unit
    )


def test_weights_updates_and_gradients(run):
    _, lines, _, seen, _ = run
    for step, line in lines.items():
        now = seen[step]
        tied = {"embed"} if step <= 12 else set()  # the head stands in for it: it does no work
        assert line["parameters"].keys() == now["after"].keys() - tied
        for name, found in line["parameters"].items():
            before, after, mean = now["before"][name], now["after"][name], now["mean"][name]
            assert found["weight_rms"] == pytest.approx(rms(after), rel=1e-5)
            assert found["update_rms"] == pytest.approx(rms(after - before), rel=1e-4, abs=1e-9)
            assert found["grad_norm"] == pytest.approx(np.linalg.norm(mean), rel=1e-4, abs=1e-12)


def polar(s):
    """What five iterations make of singular values s, in float64."""
    margin, triples, _ = train_gpt.ORTHOGONALIZERS["polar_express"]
    s = s / np.linalg.norm(s) / margin
    for a, b, c in triples:
        s = a * s + b * s**3 + c * s**5
    return s


def test_singular_values_and_cautious_decay_of_matrices(run):
    """From the gradients alone: momentum, Nesterov, rows to length 1, the polynomial on NumPy's
    singular values."""
    outcome, lines, _, seen, argv = run
    track, _ = train_gpt.parse_command_line(argv)
    names = [name for name, found in lines[4]["parameters"].items() if "entering" in found]
    assert {*names} == {"qk", "vo", "mlp", "gate", "value_gate", "smear_gate"}
    momentum, turns = dict.fromkeys(names, 0.0), {name: set() for name in names}
    for step in range(1, 21):
        mu = train_gpt.momentum_at(track.schedule, step - 1)
        for name in names:
            grad = seen[step]["mean"][name].reshape(-1, *seen[step]["mean"][name].shape[-2:])
            momentum[name] = mu * momentum[name] + (1 - mu) * grad
            if step not in lines:
                continue
            found, entering = lines[step]["parameters"][name], mu * momentum[name] + (1 - mu) * grad
            if "gate" not in name:
                entering = entering / np.linalg.norm(entering, axis=-1, keepdims=True)
            u, s, vt = np.linalg.svd(entering, full_matrices=False)
            turns[name].add(i := found["matrix"])
            assert found["entering"] == pytest.approx(
                [s[i].min(), s[i].max()], rel=1e-4, abs=1e-6 * s[i].max()
            )
            left = np.array([polar(row) for row in s])
            assert found["leaving"] == pytest.approx([left[i].min(), left[i].max()], rel=1e-3, abs=1e-3)
            assert ("decayed" in found) == ("gate" not in name)
            if "decayed" in found:
                agree = (u * left[:, None]) @ vt * seen[step]["before"][name] >= 0
                assert found["decayed"] == pytest.approx(agree.mean(), abs=3 / agree.size)
    assert turns["mlp"] == {0, 1, 2, 3} and turns["gate"] == {0, 1} and turns["smear_gate"] == {0}


def test_cautious_decay_of_elements(run):
    _, lines, _, seen, _ = run
    for step, line in lines.items():
        for name in ("embed", "ngram_embed", "value_embed")[step <= 12 :]:  # tied to the head until then
            moment = seen[step]["mean"][name]  # row-wise tables have no other
            if name == "embed":
                moment = seen[step]["state"][name]["exp_avg"].double().numpy()
            agree = (moment * seen[step]["before"][name] > 0).mean()
            assert line["parameters"][name]["decayed"] == pytest.approx(agree, abs=2e-4)
            assert 0 < agree < 1
        assert "decayed" not in line["parameters"]["lm_head"]


def largest_visible(q, k, documents, window):
    """Brute force: q, k (T, H, d), the document of each position."""
    i, j = np.arange(len(q))[:, None], np.arange(len(q))
    seen = (j <= i) & (i - j <= window) & (documents[:, None] == documents)
    return np.where(seen, np.einsum("ihd,jhd->hij", q, k), -math.inf).max()


def test_logits_and_streams(run):
    _, lines, _, seen, _ = run
    for step, line in lines.items():
        (offsets, windows), pairs, streams = (seen[step][key] for key in ("row", "pairs", "streams"))
        n = {24: 48, 32: 64, 40: 64}[windows[1]]
        for i, found in enumerate(line["layers"]):  # block 1 has the long window and paired heads
            documents = np.searchsorted(offsets, np.arange(n), side="right").repeat(1 + i)
            q, k = (x[: n * (1 + i)] for x in pairs[i])
            assert found["logit_max"] == pytest.approx(largest_visible(q, k, documents, windows[i]), rel=1e-5)
            assert found["output_rms"] == pytest.approx(rms(streams[i][:n]), rel=1e-5)


@pytest.mark.parametrize("T, window", [(40, 16), (37, 5), (12, 30)])
def test_largest_logit_where_all_are_negative(T, window):
    generator = torch.Generator().manual_seed(T)
    q, k = torch.rand(2, 2, T, 3, 8, generator=generator)
    offsets = torch.tensor([[0, 7, 7, T, T], [0, 1, 9, 12, T]])
    found = monitor.largest_logit(-q, k, train_gpt.blocked_layout(offsets, T, window).mask)
    documents = [np.searchsorted(row.numpy(), np.arange(T), side="right") for row in offsets]
    rows = zip(-q.double().numpy(), k.double().numpy(), documents)
    assert float(found) == pytest.approx(max(largest_visible(*row, window) for row in rows), rel=1e-5)
    assert found < 0


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (1, 4)])
def test_singular_range(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    s = np.linalg.svd(x.double().numpy(), compute_uv=False)
    assert monitor.singular_range(x).tolist() == pytest.approx([s.min(), s.max()], rel=1e-9)
    assert monitor.singular_range(0 * x).tolist() == [0, 0]
    for bad in (math.nan, math.inf):
        x[0, 0] = bad
        assert monitor.singular_range(x).isnan().all()


def same(found, expected, place=""):
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), place
        for key in expected:
            same(found[key], expected[key], f"{place}.{key}")
    elif isinstance(expected, list) and isinstance(expected[0], dict):
        for i, pair in enumerate(zip(found, expected, strict=True)):
            same(*pair, f"{place}[{i}]")
    elif isinstance(expected, str):
        assert found == expected
    else:
        # the least singular value is as good as the matrix, whose rounding goes with the largest;
        # some start at 0
        largest = max(expected) if isinstance(expected, list) else 0.0
        assert found == pytest.approx(expected, rel=1e-3, abs=max(2e-4 * largest, 1e-9)), place


def test_three_processes_say_what_one_says(run, data_dir, tmp_path):
    """Sharded stacks: the first two processes own the 4 matrices of `mlp`, the third has only padding."""
    _, lines, *_ = run
    argv = [*EVERY, *options(out=tmp_path / "out", **CAUTIOUS)]
    ((outcome, *_),) = train_with(3, [argv], {"DATA_DIR": str(data_dir)}, tmp_path / "three", short_probe)
    assert {path.name for path in (tmp_path / "out").glob("*.monitor.jsonl")} == {
        f"{outcome.log.stem}.monitor.jsonl"
    }
    found, _ = log_of(outcome)
    same(list(found.values()), list(lines.values()))


def short_probe(argv):
    monitor.PROBE = PROBE
    return monitor.main(argv)


@pytest.mark.parametrize("step", [16, 20])
def test_a_resumed_run_has_each_step_once(run, step):
    outcome, lines, _, _, argv = run
    (checkpoint,) = outcome.log.with_suffix("").glob(f"step_{step:06d}.pt")
    train([*EVERY, *argv, "--resume", str(checkpoint)], monitor.main)
    again, overhead = log_of(outcome)
    assert again == lines and overhead["train_time_s"] < events(outcome.log)[-1]["train_time_s"]


def test_exact_copies_of_low_precision_weights(tmp_path):
    low = dict(
        dtype="bfloat16", model__low_precision="('qk','embed')", schedule__steps=4, schedule__extension=0,
        model__tied=0,
    )  # fmt: skip
    outcome, seen = witnessed(["--every", "2", *options(out=tmp_path, **low)])
    for step, line in log_of(outcome)[0].items():
        for name in ("qk", "embed"):
            before, after = (seen[at]["state"][name]["master"].double().numpy() for at in (step - 1, step))
            found = line["parameters"][name]
            assert found["weight_rms"] == pytest.approx(rms(after), rel=1e-5)
            assert found["update_rms"] == pytest.approx(rms(after - before), rel=1e-4, abs=1e-9)


def test_nothing_is_compiled_again(tmp_path):
    plain = {
        name: "()"
        for name in ("long_blocks", "value_tables", "skips", "xsa", "key_offset", "paired", "ngrams")
    }
    short = dict(
        compile="parts",
        schedule__steps=4,
        schedule__extension=0,
        model__tied=0.0,
        model__layers=1,
        model__backout=-1,
        schedule__stages="((0,(16,24)),(0.5,(24,40)))",
        model__attention_source=-1,
    )
    short |= {f"model__{name}": value for name, value in plain.items()}
    with mock.patch.object(torch, "compile", functools.partial(torch.compile, backend="eager")):
        outcome = train(["--every", "1", *options(out=tmp_path, **short)], monitor.main)
    assert outcome.final["compiles_in_timed_region"] == 0 and list(log_of(outcome)[0]) == [1, 2, 3, 4]


def test_a_gradient_that_is_not_finite_is_null(tmp_path, monkeypatch, capsys):
    original = train_gpt.Trainer.forward_backward

    def spoilt(trainer, *args):
        loss = original(trainer, *args)
        if trainer.optimizer.step_count == 2:
            trainer.model.vo.grad[1, 0, 0] = math.nan
        return loss

    monkeypatch.setattr(train_gpt.Trainer, "forward_backward", spoilt)
    with pytest.raises(SystemExit):
        train(["--every", "1", *options(out=tmp_path)], monitor.main)
    assert "gradients of vo since step 3" in capsys.readouterr().err
    *_, last = [json.loads(line) for line in next(tmp_path.glob("*.monitor.jsonl")).read_text().splitlines()]
    assert last["step"] == 3 and last["parameters"]["vo"]["grad_norm"] is None
    assert last["parameters"]["mlp"]["grad_norm"] > 0 and last["parameters"]["qk"]["update_rms"] > 0


def test_figures_pass_over_the_log(run):
    assert [found.path for found in any_runs(run[0].log.parent)] == [run[0].log]


def test_refusals_and_help(capsys):
    for words in (["--every", "0"], ["--every", "x"]):
        with pytest.raises(SystemExit) as stop:
            monitor.main([*words, *options()])
        assert stop.value.code == 2
    with pytest.raises(SystemExit):
        monitor.main(["--help"])
    assert "tools/monitor.py [--every 25]" in capsys.readouterr().out
