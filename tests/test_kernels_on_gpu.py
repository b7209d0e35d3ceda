"""What only a CUDA GPU can show: its kernels against float64 or the CPU, one pass over eight rows
against eight."""

import json
from dataclasses import replace

import pytest
import torch

import train_gpt
from helpers import options
from test_attention import offsets_of
from test_model import FP8, batch_of, build, gradients
from train_gpt import GPT, TRACKS, FP8Linear, MuonEq, supports

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CUDA = torch.device("cuda")
# the layer map of the track
SMALL = replace(TRACKS["short"].model, padded_vocab=512, width=768, ngrams=((2, 997),))
ROWS = [[300, 212], [512], [1, 1, 510], [256, 256], [100, 400, 12], [511, 1], [2, 510], [128] * 4]


def on_gpu(config, dtype, spread=0.02):
    """The same weights as on the CPU; attention tables for 512 positions."""
    model, start = GPT(config, 512, dtype, CUDA), build(config, spread=spread, max_tokens=512, dtype=dtype)
    model.load_state_dict(start.state_dict())
    model.set_rotary([384])
    return model


def accumulated(model, batch, rows):
    """Loss and fp32 gradients of passes over `rows` rows at a time."""
    optimizer = train_gpt.build_optimizer(model, replace(TRACKS["short"], model=model.config))
    total = 0.0
    for part in zip(*(x.to(CUDA).split(rows) for x in batch)):
        loss = model(*part, (128, 384), 512)
        loss.backward()
        total += float(loss.detach())
    found = {name: p.grad for name, p in model.named_parameters()}
    optimizer.zero_grad()
    return total, {name: grad.float() for name, grad in found.items() if grad is not None}


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2**-7)])
def test_eight_passes_over_one_row_are_one_pass_over_eight(dtype, tolerance):
    batch = batch_of(ROWS, vocab=512)
    (loss, whole), (sum_of_losses, parts) = (
        accumulated(on_gpu(SMALL, dtype), batch, rows) for rows in (8, 1)
    )
    assert sum_of_losses == pytest.approx(loss, rel=1e-6 if dtype == torch.float32 else 1e-3)
    for name, expected in whole.items():
        if dtype == torch.float32 or expected.numel() > 30:  # single numbers are sums that cancel
            assert (parts[name] - expected).norm() <= tolerance * expected.norm(), name


def test_gradients_of_the_cpu_in_fp32():
    batch = batch_of(ROWS[:2], vocab=512)
    slow, fast = build(SMALL, spread=0.02, max_tokens=512), on_gpu(SMALL, torch.float32)
    slow(*batch, (128, 384), 512).backward()
    fast(*(x.to(CUDA) for x in batch), (128, 384), 512).backward()
    for name, expected in gradients(slow).items():
        assert (gradients(fast)[name].cpu() - expected).norm() <= 1e-4 * expected.norm(), name


@torch._dynamo.config.patch(recompile_limit=64)
@pytest.mark.parametrize("low", (False, True))
def test_compiled_parts_train_as_the_plain_model_does(low):
    """bfloat16 with FlashAttention and the FP8 head: compiling and recomputing stay within rounding."""
    batch = batch_of(ROWS, vocab=512)
    config = replace(SMALL, fp8_head=(768**0.5 / 448, 2**-9, 1 / 448))
    plain, compiled = (on_gpu(config, torch.bfloat16) for _ in range(2))
    compiled.low_memory = low
    torch._dynamo.reset()
    for name in GPT.COMPILED["parts"]:
        setattr(compiled, name, torch.compile(getattr(compiled, name), dynamic=False, fullgraph=True))
    (loss, expected), (found_loss, found) = (accumulated(model, batch, 4) for model in (plain, compiled))
    assert found_loss == pytest.approx(loss, rel=2e-3)
    for name, grad in expected.items():
        if grad.numel() > 30:
            assert (found[name] - grad).norm() <= 0.03 * grad.norm(), name


def test_documents_do_not_see_each_other_in_the_fused_form():
    model, (inputs, targets, offsets) = on_gpu(SMALL, torch.bfloat16), batch_of([[200, 312]], vocab=512)
    targets[:, :200] = -1
    changed = inputs.clone()
    changed[:, :200] = (changed[:, :200] + 1) % 512
    with torch.no_grad():
        losses = [
            float(model(*(t.to(CUDA) for t in (x, targets, offsets)), (128, 384), 512))
            for x in (inputs, changed)
        ]
    assert losses[0] == losses[1]


@pytest.mark.skipif(not (torch.cuda.is_available() and supports(CUDA, "fp8")), reason="needs FP8")
@pytest.mark.parametrize("n", (64, 1024))
def test_fp8_head_against_float64(n):
    generator = torch.Generator().manual_seed(n)
    x, w = torch.randn(n, 48, generator=generator), torch.randn(64, 48, generator=generator) * 0.2
    outer = (torch.rand(n, 64, generator=generator) - 0.5).bfloat16()
    leaves = [x.to(CUDA).bfloat16().requires_grad_(), w.to(CUDA).requires_grad_()]
    y = FP8Linear.apply(*leaves, FP8)
    y.backward(outer.to(CUDA))
    expected = x.double() @ w.double().T, outer.double() @ w.double(), outer.double().T @ x.double()
    for found, wanted in zip((y, leaves[0].grad, leaves[1].grad), expected):
        assert (found.cpu().double() - wanted).norm() / wanted.norm() < 0.08


@pytest.mark.parametrize("fields", [
    dict(normuon=True), dict(equilibrate="rowcol"), dict(equilibrate="both"), dict(norm_bound="spc"),
])  # fmt: skip
def test_optimizer_step_of_the_cpu(fields):
    """The same update as on the CPU in fp32, banks and small parameters."""
    generator, updated = torch.Generator().manual_seed(0), []
    start = [torch.randn(4, 32, 64, generator=generator), torch.randn(300, 16, generator=generator)]
    grads = [torch.randn(x.shape, generator=generator) for x in start]
    for device in ("cpu", CUDA):
        params = [torch.nn.Parameter(x.to(device)) for x in start]
        for p, grad in zip(params, grads):
            p.grad = grad.to(device)
        groups = [dict(kind="matrix", params=params[:1], lr=0.1, work_dtype=torch.float32, **fields),
                  dict(kind="adam", params=params[1:], lr=0.1)]  # fmt: skip
        optimizer = MuonEq(groups)
        for _ in range(3):
            optimizer.step()
        updated.append([p.detach().cpu() for p in params])
    for a, b in zip(*updated):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_a_run_reaches_its_end_and_resumes(tmp_path, monkeypatch):
    """Compiled, bfloat16, FlashAttention, checkpoints: twelve steps, and the last six once more."""
    from helpers import events, make_corpus

    make_corpus(tmp_path)
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    more = dict(compile="parts", dtype="bfloat16", device="cuda", model__width=64, model__padded_vocab=272,
                data__rows=4, schedule__steps=10, checkpoint_every=6)  # fmt: skip
    final = train_gpt.main(options(out=tmp_path / "out", **more))
    torch.compiler.set_stance("default")
    (checkpoint,) = (path for path in (tmp_path / "out").glob("*/step_*.pt") if "06" in path.name)
    again = train_gpt.main(options(out=tmp_path / "again", resume=checkpoint, **more))
    torch.compiler.set_stance("default")
    header, *_ = events(next((tmp_path / "out").glob("*.jsonl")))
    assert header["attention"] == "fa2" and final["compiles_in_timed_region"] == 0
    assert again["val_loss"] == pytest.approx(final["val_loss"], rel=1e-3) and json.dumps(header["startup_s"])


def test_zero_length_documents_and_large_windows(tmp_path):
    """Offsets of fixed length end with documents of no length; a window may exceed the row."""
    model, (inputs, targets, _) = on_gpu(SMALL, torch.bfloat16), batch_of([[512]], vocab=512)
    losses = []
    for tails, window in ((1, 384), (40, 384), (1, 5000)):
        offsets = offsets_of([[512]], 512, tails)
        batch = (x.to(CUDA) for x in (inputs, targets, offsets))
        loss = model(*batch, (window, window), 512)
        losses.append(float(loss.detach()))
    assert losses[0] == losses[1] and losses[2] == losses[2]
