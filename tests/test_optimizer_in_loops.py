"""MuonEq in other people's training loops: torch's contract for an optimizer, one process."""

import copy
import inspect
import io
import pickle
import warnings

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint.state_dict as dcp
from torch.optim.lr_scheduler import CosineAnnealingLR, CyclicLR, LambdaLR, OneCycleLR

from test_optimizer import (
    ADAM,
    MATRIX,
    adam_reference,
    gradients,
    leaf,
    matrix_reference,
    optimizer,
    randn,
    take,
)  # fmt: skip
from train_gpt import MuonEq


def net(seed=0, dtype=torch.float32):
    """Two matrices and two vectors."""
    torch.manual_seed(seed)
    layers = torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3)
    return torch.nn.Sequential(*layers).to(dtype)


def groups_of(model, named=False, order=1, **fields):
    """A matrix group with NorMuon and the two-sided balance, which have state, and an Adam group."""
    pairs = list(model.named_parameters())
    matrices = [pair if named else pair[1] for pair in pairs if pair[1].ndim == 2]
    vectors = [pair if named else pair[1] for pair in pairs if pair[1].ndim == 1]
    matrix = dict(MATRIX, kind="matrix", params=matrices, normuon=True, equilibrate="both") | fields
    return [matrix, dict(ADAM, kind="adam", params=vectors)][::order]


def train(model, opt, steps, first=0, **keywords):
    """Steps on made-up rows; the losses."""
    losses = []
    for step in range(first, first + steps):
        opt.zero_grad()
        loss = model(randn(5, 4, seed=step)).square().sum()
        loss.backward()
        opt.step(**keywords)
        losses.append(loss.item())
    return losses


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


# --------------------------------------------------------------------------------------------------
# step and zero_grad


def test_signatures_take_what_those_of_torch_take():
    for name in ("step", "zero_grad", "add_param_group", "state_dict", "load_state_dict"):
        theirs = inspect.signature(getattr(torch.optim.AdamW, name)).parameters
        ours = inspect.signature(getattr(MuonEq, name)).parameters
        assert [*theirs] == [*ours][: len(theirs)]


def test_a_closure_is_called_with_gradients_on_and_its_loss_returned():
    a, b = net(), net()
    straight, closed = MuonEq(groups_of(a)), MuonEq(groups_of(b))
    losses = train(a, straight, 3)
    for step, expected in enumerate(losses):

        def closure(step=step):
            closed.zero_grad(set_to_none=True)
            loss = b(randn(5, 4, seed=step)).square().sum()
            loss.backward()
            return loss

        assert (closed.step(closure) if step else closed.step(closure=closure)).item() == expected
    assert equal(a, b)
    assert straight.step() is None and straight.step(None) is None


def test_gradients_become_none_or_zero():
    fast, slow = leaf(randn(4, 6)), leaf(randn(4, 6))
    opt = MuonEq([dict(MATRIX, kind="matrix", params=[p], every=k) for p, k in ((fast, 1), (slow, 2))])
    for to_none in (False, True):
        fast.grad = slow.grad = None
        take(opt, [fast, slow], [randn(4, 6)] * 2)  # steps 1 and 3: the slow group waits
        kept = fast.grad
        opt.zero_grad(set_to_none=to_none)
        assert fast.grad is None if to_none else fast.grad is kept and not kept.any()
        assert slow.grad.any()
        opt.step()
        opt.zero_grad(to_none)
        assert slow.grad is None or not slow.grad.any()


# --------------------------------------------------------------------------------------------------
# copies


@pytest.mark.parametrize("grads", ["mean", "token_sum"])
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_go_on_as_the_original_does(how, grads):
    """A model and its optimizer, in bfloat16: masters, moments and counts are copied, and apart."""
    tokens = {"tokens": 5} if grads == "token_sum" else {}
    model = net(dtype=torch.bfloat16)
    opt = MuonEq(groups_of(model, every=2), grads=grads)
    LambdaLR(opt, lambda step: 1.0)  # replaces opt.step

    def walk(model, opt):
        for seed in range(3):
            for p in model.parameters():
                p.grad = randn(*p.shape, seed=seed).to(p.grad_dtype or p.dtype)
            opt.step(**tokens)

    walk(model, opt)
    pair = model, opt
    if how == "deepcopy":
        other, twin = copy.deepcopy(pair)
    elif how == "pickle":
        other, twin = pickle.loads(pickle.dumps(pair))
    else:
        torch.save(pair, buffer := io.BytesIO())
        other, twin = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    before = [p.detach().clone() for p in model.parameters()]
    walk(other, twin)
    assert all(map(torch.equal, before, model.parameters())) and not equal(model, other)
    assert twin.step_count == 6 and opt.step_count == 3
    walk(model, opt)
    assert equal(model, other) and twin.defaults == opt.defaults
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert opt.state[p].keys() == twin.state[q].keys()
        assert all(torch.equal(value, twin.state[q][key]) for key, value in opt.state[p].items())


# --------------------------------------------------------------------------------------------------
# schedulers


@pytest.mark.parametrize("make", [
    lambda opt, last: OneCycleLR(opt, 0.1, total_steps=9, last_epoch=last),
    lambda opt, last: CyclicLR(opt, 0.01, 0.1, step_size_up=2, last_epoch=last),
    lambda opt, last: CosineAnnealingLR(opt, 8, last_epoch=last),
])  # fmt: skip
def test_schedulers_are_made_and_made_anew(make):
    """With last_epoch after loading, as without an interruption; the settings they add go through a file."""
    results = []
    for interrupted in (False, True):
        model = net()
        opt = MuonEq(groups_of(model))
        scheduler = make(opt, -1)
        for step in range(6):
            if interrupted and step == 3:
                torch.save(opt.state_dict(), buffer := io.BytesIO())
                opt = MuonEq(groups_of(model))
                opt.load_state_dict(torch.load(io.BytesIO(buffer.getvalue()), weights_only=True))
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # the scheduler's first step comes before the optimizer's
                    scheduler = make(opt, step - 1)
            train(model, opt, 1, first=step)
            scheduler.step()
        momentum = opt.param_groups[0]["momentum"]
        results.append([*model.parameters(), torch.tensor([scheduler.get_last_lr() + [momentum]])])
    for straight, resumed in zip(*results, strict=True):
        torch.testing.assert_close(straight, resumed)
    assert make.__code__.co_names[0] == "CosineAnnealingLR" or momentum != MATRIX["momentum"]


@pytest.mark.parametrize("number", [torch.tensor(0.1), np.float32(0.1), np.float64(0.1)], ids=repr)
@pytest.mark.parametrize("kind", ["matrix", "adam"])
def test_a_learning_rate_is_any_number(kind, number):
    g, results = randn(4, 6, seed=1), []
    for lr in (float(number), number):
        w = leaf(randn(4, 6))
        opt = optimizer(kind, [w], lr=lr, weight_decay=0.1)
        take(opt, [w], [g])
        if isinstance(lr, torch.Tensor):
            assert opt.param_groups[0]["lr"] is lr
            lr.fill_(0.2)  # as torch's schedulers change it
        else:
            opt.param_groups[0]["lr"] = 0.2
        take(opt, [w], [g])
        torch.load(io.BytesIO(saved(opt)), weights_only=True)
        results.append(w.detach())
    torch.testing.assert_close(*results, rtol=1e-6, atol=0)


def saved(opt):
    torch.save(opt.state_dict(), buffer := io.BytesIO())
    return buffer.getvalue()


# --------------------------------------------------------------------------------------------------
# state


def test_settings_go_with_the_state():
    """As torch's: every setting that is no function is the saved one after loading, what others added too."""
    model = net()
    first = MuonEq(groups_of(model, lr=0.3, steps=4, equilibrate="col", lr_mul=(1.0, 3.0), weight_decay=0.2))
    first.param_groups[0]["initial_lr"] = np.float64(0.5)
    train(model, first, 2)
    state = torch.load(io.BytesIO(saved(first)), weights_only=True)
    other = copy.deepcopy(model)
    second = MuonEq(groups_of(other, equilibrate="row"))
    second.load_state_dict(state)
    for a, b in zip(first.param_groups, second.param_groups, strict=True):
        assert {**a, "params": 0} == {**b, "params": 0}
    assert state["param_groups"][1]["params"] == ["2", "3"]
    assert train(model, first, 2) == train(other, second, 2)
    assert equal(model, other)
    with_function = MuonEq(groups_of(model, orthogonalize=torch.sign))
    assert "orthogonalize" not in torch.load(io.BytesIO(saved(with_function)))["param_groups"][0]
    with_function.load_state_dict(with_function.state_dict())
    assert with_function.param_groups[0]["orthogonalize"] is torch.sign


def test_groups_are_found_by_their_parameters():
    first = MuonEq(groups_of(net(), named=True, lr=0.02))
    second = MuonEq(groups_of(net(), named=True, order=-1))
    second.load_state_dict(first.state_dict())
    assert [(g["kind"], g["lr"]) for g in second.param_groups] == [("adam", 0.01), ("matrix", 0.02)]
    assert "momentum" not in second.param_groups[0]


def test_groups_that_do_not_fit_are_refused_and_nothing_is_taken_over():
    state = MuonEq(groups_of(net(1), named=True, lr=0.02)).state_dict()
    pairs = [*net().named_parameters()]
    split = [dict(MATRIX, kind="matrix", params=[pairs[i]]) for i in (0, 2)]
    split += [dict(ADAM, kind="adam", params=[pairs[1], pairs[3]])]
    turned = dict(state, param_groups=[dict(g, kind="adam") for g in state["param_groups"]])
    wrong = dict(state, param_groups=[dict(g, lr=-1.0) for g in state["param_groups"]])
    mixed = dict(state, param_groups=[dict(g, params=g["params"][:1]) for g in state["param_groups"]])
    for groups, given, message in (
        (split, state, "different number of parameter groups: 2 parameter groups, this optimizer 3"),
        (None, turned, "no matrix group of the parameters 0.weight, 2.weight"),
        (None, mixed, "no matrix group of the parameters 0.weight, 2.weight"),
        (None, wrong, "lr is at least 0"),
        (None, {}, "'step' and 'state'; this one has \\[\\]"),
    ):
        opt = MuonEq(groups or groups_of(net(), named=True))
        before = saved(opt)
        with pytest.raises(ValueError, match=message):
            opt.load_state_dict(given)
        assert saved(opt) == before


def test_checkpoints_of_before_are_read():
    """Their groups have three settings and no parameters; the state is the same."""
    model = net()
    first = MuonEq(groups_of(model))
    train(model, first, 2)
    state = first.state_dict()
    old = {key: state[key] for key in ("step", "state")}
    old["groups"] = [dict(lr=0.5, weight_decay=0.1, momentum=0.8), dict(lr=0.25, weight_decay=0.0)]
    second = MuonEq(groups_of(model))
    second.load_state_dict(old)
    assert [group["lr"] for group in second.param_groups] == [0.5, 0.25] and second.step_count == 2
    assert second.param_groups[0]["momentum"] == 0.8 and second.param_groups[1]["betas"] == ADAM["betas"]
    for name, entry in second.state_dict()["state"].items():
        assert all(torch.equal(value, state["state"][name][key]) for key, value in entry.items()
                   if key != "updates")  # fmt: skip
    with pytest.raises(ValueError, match="different number of parameter groups"):
        second.load_state_dict(dict(old, groups=old["groups"][:1]))


def test_hooks_of_state_are_called():
    model = net()
    opt, seen = MuonEq(groups_of(model)), []
    opt.register_state_dict_pre_hook(lambda o: seen.append("before saving"))
    opt.register_state_dict_post_hook(lambda o, state: dict(state, note=7))
    opt.register_load_state_dict_pre_hook(lambda o, state: seen.append(state.pop("note")))
    opt.register_load_state_dict_post_hook(lambda o: seen.append("loaded"))
    state = opt.state_dict()
    opt.load_state_dict(state)
    assert seen == ["before saving", 7, "loaded"] and state["note"] == 7


def test_state_shows_what_the_optimizer_holds_and_keeps_what_others_add():
    """As schedulefree's wrapper does with its z."""
    model = net()
    opt = MuonEq(groups_of(model))
    train(model, opt, 2)
    weight = model[0].weight
    assert opt.state[weight].keys() == {"updates", "momentum", "second_moment", "row_norm", "col_norm"}
    assert opt.state[weight]["momentum"].shape == (6, 4) and opt.state[weight]["updates"] == 2
    for name, entry in opt.state_dict()["state"].items():
        shown = opt.state[opt.named[name]]
        assert all(torch.equal(torch.as_tensor(value), shown[key]) for key, value in entry.items())
    opt.state[weight]["z"] = torch.full((6, 4), 3.0)
    state, twin = opt.state_dict(), copy.deepcopy(opt)
    opt.state[weight]["z"].zero_()
    other = net()
    second = MuonEq(groups_of(other))
    second.load_state_dict(state)
    for z in (second.state[other[0].weight]["z"], twin.state[twin.named["0"]]["z"]):
        assert torch.equal(z, torch.full((6, 4), 3.0))
    train(model, opt, 1)
    assert opt.state[weight]["updates"] == 3 and second.state[other[0].weight]["updates"] == 2


def test_state_of_no_parameter_is_kept():
    """Wrappers such as TRAC keep one entry for the whole optimizer, under a name of their own, and look for
    it in the state; what they load there may have parameters for keys."""
    opt = MuonEq(groups_of(net()))
    opt.state["trac"] = {"s": torch.ones(3)}
    saved = opt.state_dict()
    former = opt.state_dict()
    former["others"] = {"trac": former["state"].pop("trac")}
    resumed, older = MuonEq(groups_of(net())), MuonEq(groups_of(net()))
    resumed.load_state_dict(saved)
    older.load_state_dict(former)
    saved["state"]["trac"]["s"].zero_()
    for other in (resumed, older, copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        assert torch.equal(other.state["trac"]["s"], torch.ones(3))
    p = resumed.named["0"]
    saved["state"]["trac"][p] = torch.ones(3)
    resumed.load_state_dict(saved)
    assert torch.equal(resumed.state["trac"][p], torch.ones(3))


def test_private_functions_of_torch_are_there():
    assert callable(torch._foreach_copy_) and callable(torch._fused_adamw_)


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("named", [False, True])
def test_distributed_checkpoint_names_the_state_and_resumes(named, flatten):
    """get_ / set_optimizer_state_dict: keyed by the model's names, into an optimizer in another order."""
    options = dcp.StateDictOptions(flatten_optimizer_state_dict=flatten)
    model = net()
    opt = MuonEq(groups_of(model, named, lr=0.05))
    train(model, opt, 3)
    state = dcp.get_optimizer_state_dict(model, opt, options=options)
    key = "state.2.weight.momentum"
    assert (key in state) if flatten else state["state"].keys() == dict(model.named_parameters()).keys()
    other = net(1)
    other.load_state_dict(model.state_dict())
    second = MuonEq(groups_of(other, named, order=1 if flatten else -1))
    dcp.set_optimizer_state_dict(other, second, state, options=options)
    assert second.step_count == 3 and second.param_groups[0 if flatten else 1]["lr"] == 0.05
    assert train(model, opt, 3, first=3) == train(other, second, 3, first=3)
    assert equal(model, other)


def test_distributed_checkpoint_of_a_frozen_layer():
    model = net(dtype=torch.bfloat16)
    model[0].weight.requires_grad_(False)
    opt = MuonEq(groups_of(model))
    second = MuonEq(groups_of(model))
    dcp.set_optimizer_state_dict(model, second, dcp.get_optimizer_state_dict(model, opt))
    assert second.state_dict()["state"].keys() == {"0", "1", "2", "3"}
    assert torch.equal(second.state_dict()["state"]["0"]["master"], model[0].weight.float())


def test_replaced_groups_count():
    w = leaf(randn(4, 6))
    opt = optimizer("matrix", [w])
    opt.param_groups = [dict(opt.param_groups[0], lr=0.0)]
    before = w.detach().clone()
    take(opt, [w], [randn(4, 6, seed=1)])
    assert torch.equal(w, before)


# --------------------------------------------------------------------------------------------------
# what is refused


@pytest.mark.parametrize("kind, fields, message", [
    ("matrix", dict(momentum=1.5), "momentum is below 1"),
    ("matrix", dict(momentum=-0.1), "momentum is at least 0"),
    ("matrix", dict(momentum="x"), "momentum takes float"),
    ("matrix", dict(beta2=1.0), "beta2 is below 1"),
    ("matrix", dict(weight_decay=-1.0), "weight_decay is at least 0"),
    ("matrix", dict(every=1.5), "every takes int"),
    ("matrix", dict(work_dtype="bf16"), "work_dtype takes dtype"),
    ("matrix", dict(lr=torch.tensor(float("nan"))), "lr takes numbers below"),
    ("matrix", dict(lr=torch.ones(2)), "lr takes float"),
    ("matrix", dict(learningrate=1.0), "a matrix group has no field 'learningrate'"),
    ("adam", dict(momentum=0.9), "an adam group has no field 'momentum'"),
    ("adam", dict(betas=(1.5, 0.9)), "betas is below 1"),
    ("adam", dict(betas=(0.9, -0.1)), "betas is at least 0"),
    ("adam", dict(eps=-1.0), "eps is at least 0"),
    ("adam", dict(weight_decay=-1.0), "weight_decay is at least 0"),
])  # fmt: skip
def test_values_that_cannot_be_are_refused(kind, fields, message):
    with pytest.raises(ValueError, match=message):
        optimizer(kind, [leaf(randn(4, 6))], **fields)


@pytest.mark.parametrize("key, value", [
    ("equilibrate", "rows"), ("scale", "none"), ("norm_bound", "inf"), ("orthogonalize", "svd"),
])  # fmt: skip
def test_words_set_later_are_checked_at_the_step(key, value):
    w = leaf(randn(4, 6))
    opt = optimizer("matrix", [w])
    take(opt, [w], [randn(4, 6)])
    opt.param_groups[0][key] = value
    with pytest.raises(ValueError, match=f"{key} .*{value}"):
        opt.step()
    opt.param_groups[0][key] = MATRIX[key]
    opt.step()


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64, torch.bool], ids=str)
def test_parameters_that_are_no_real_numbers_are_refused(dtype):
    for kind in ("matrix", "adam"):
        with pytest.raises(ValueError, match=f"parameter 'w' is {dtype}"):
            optimizer(kind, [("w", torch.ones(4, 4, dtype=dtype))])


def groups_without_kind():
    w = torch.nn.Parameter(randn(4, 6))
    matrix = dict(kind="matrix", params=[w], lr=0.1)
    return {
        "parameters": (lambda: MuonEq([w], lr=0.02), TypeError, "list of groups.*not lr of its own"),
        "pairs": (lambda: MuonEq([("w", w)]), TypeError, "list of groups.*not parameters without a group"),
        "one": (lambda: MuonEq(w), TypeError, "list of groups"),
        "params": (lambda: MuonEq([dict(matrix, params=[1, 2])]), TypeError, "tensor or a pair .*not 1"),
        "computed": (lambda: MuonEq([dict(matrix, params=[w * 2])]), ValueError, "computed from others"),
        "none": (lambda: MuonEq([]), ValueError, "empty"),
    }


@pytest.mark.parametrize("case", groups_without_kind())
def test_what_is_no_group_is_named(case):
    make, error, message = groups_without_kind()[case]
    with pytest.raises(error, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_a_single_group_needs_no_list():
    w = leaf(randn(4, 6))
    assert len(MuonEq(dict(kind="matrix", params=w, lr=0.1)).units) == 1


def test_gradients_and_weights_that_cannot_be_used_are_named():
    table = torch.nn.Embedding(5, 3, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="gradient of parameter 'table' is sparse"):
        optimizer("adam", [("table", table.weight)]).step()
    model = net()
    opt = MuonEq(groups_of(model, named=True))
    model.half()
    with pytest.raises(ValueError, match="parameter '.*' is torch.float16 now and was torch.float32"):
        opt.step()


def test_an_optimizer_of_nothing_has_seen_nothing_bad():
    assert not len(optimizer("matrix", [leaf(torch.zeros(0, 4))]).bad_since())


# --------------------------------------------------------------------------------------------------
# fp64


@pytest.mark.parametrize("kind", ["matrix", "adam"])
def test_fp64_parameters_are_updated_in_fp64(kind):
    p = randn(4, 6).double() + 1e-12 * randn(4, 6, seed=2)
    w = leaf(p)
    take(optimizer(kind, [w], lr=0.0), [w], [randn(4, 6, seed=1)])
    assert torch.equal(w, p)
    grads = [g.double() + 1e-12 for g in gradients((4, 6), 3)]
    fields = dict(weight_decay=0.3, cautious=True)
    if kind == "matrix":
        fields |= dict(work_dtype=torch.float64, normuon=True, equilibrate="row", lr_mul=(0.3,))
    reference = matrix_reference if kind == "matrix" else adam_reference
    opt = optimizer(kind, [w], **fields)
    for g in grads:
        take(opt, [w], [g])
    fields["lr_mul"] = 0.3
    (*_, expected) = reference(p, grads, **fields)
    torch.testing.assert_close(w.detach(), expected, rtol=0, atol=1e-12)
    moment = opt.state_dict()["state"]["0"]["momentum" if kind == "matrix" else "exp_avg"]
    assert moment.dtype == torch.float64


# --------------------------------------------------------------------------------------------------
# Weights that others change, compiled steps


@pytest.mark.parametrize("kind", ["matrix", "adam"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("how", ["copy_", "load_state_dict", "data", "one number", "frozen"])
def test_low_precision_weights_that_others_change_are_taken_over(how, dtype, kind):
    """Between two steps, in a stack of two: changed numbers go on from there, the others from their fp32."""
    layers = [torch.nn.Linear(6, 4, bias=False, dtype=dtype) for _ in range(2)]
    weights = [layer.weight for layer in layers]
    opt = optimizer(kind, weights, lr=1e-4)

    def step(seed):
        take(opt, weights, [randn(4, 6, seed=seed + i).to(dtype) for i in range(2)])
        return opt.state_dict()["state"]["0"]["master"]

    before = step(0)
    if how == "copy_":
        with torch.no_grad():
            weights[0].copy_(torch.zeros(4, 6))
    elif how == "load_state_dict":
        layers[0].load_state_dict({"weight": torch.zeros(4, 6)})
    elif how == "one number":
        weights[0].data[2, 3] = 0
    else:
        weights[0].data.zero_()
    weights[0].requires_grad_(how != "frozen")
    after = step(7)
    changed = torch.zeros(4, 6, dtype=torch.bool)
    changed[2, 3] = True
    expected = before.masked_fill(changed if how == "one number" else ~torch.zeros_like(changed), 0.0)
    assert 0 < (after - expected).abs().max() < 4e-4 or how == "frozen" and torch.equal(after, expected)
    assert torch.equal(weights[0], after.to(dtype))
    assert how != "one number" or weights[0][2, 3].abs() < 4e-4


def test_a_sign_alone_is_a_change():
    w = leaf(randn(4, 6).bfloat16())
    opt = optimizer("matrix", [w], lr=0.0)
    w.data.neg_()
    expected = w.detach().clone()
    take(opt, [w], [randn(4, 6).bfloat16()])
    assert torch.equal(w, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_compiled_training_step_gives_the_same_bits(dtype):
    results = []
    for compiled in (False, True):
        model = net(dtype=dtype)
        opt = MuonEq(groups_of(model))

        def step(x, model=model, opt=opt):
            loss = model(x).float().square().sum()
            loss.backward()
            opt.step()
            opt.zero_grad()
            return loss

        run = torch.compile(step, backend="aot_eager") if compiled else step
        losses = [run(randn(5, 4, seed=seed).to(dtype)).detach() for seed in range(3)]
        results.append([*losses, *model.parameters()])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(eager, compiled, rtol=1e-6, atol=0)
