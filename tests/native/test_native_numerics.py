"""The CUDA kernels on the CPU: frozen statistics, running statistics, extreme values, traffic."""

import ctypes

import pytest
import torch

import criterion
import masks
from bnext import reference
from cases import DTYPES, dtype_id, make, shape_id
from native import calls
from native.calls import BLOCK, CLUSTER, GRID, RESIDENT, SMALL, STREAMING
from native.checks import Setting, both, check_gradients, check_training, problem

NCHW, NHWC = torch.contiguous_format, torch.channels_last
LAYOUTS = [((3, 5, 9, 8), NCHW), ((6, 72, 5, 2), NHWC), ((9, 24, 7, 7), NCHW)]
ODD_LAYOUTS = [((3, 8, 9, 9), NCHW), ((8, 3, 6, 4), NHWC), ((4, 262, 3, 2), NHWC)]
TEAMS = {
    "block": Setting(team=BLOCK),
    "cluster": Setting(team=CLUSTER),
    "grid": Setting(team=GRID, info=SMALL),
    "stream": Setting(family=STREAMING, info=SMALL),
}


def forward(case, setting: Setting, stage: str = "train_forward", **args) -> calls.Forward:
    p = problem(case, setting, stage)
    return both().run(lambda e: calls.forward(e, setting.plan(e, p), p, case.x, **args))


def with_running_stats(case, setting: Setting, momentum, count):
    """A forward whose running statistics and count are fresh in each of the two runs."""
    p = problem(case, setting, "train_forward")
    states = []

    def run(e):
        states.append((case.running_mean.clone(), case.running_var.clone(), count.clone()))
        *running, tracked = states[-1]
        return calls.forward(
            e, setting.plan(e, p), p, case.x, weight=case.weight, bias=case.bias,
            running=running, num_batches_tracked=tracked, momentum=momentum,
        )  # fmt: skip

    both().run(run)
    return states[0]


@pytest.mark.parametrize("layout", LAYOUTS + ODD_LAYOUTS, ids=shape_id)
@pytest.mark.parametrize("dtypes", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("after", ["plain", "relu", "residual"])
def test_frozen_statistics(dtypes, layout, after) -> None:
    case = make(*layout, dtypes, residual=after == "residual")
    setting = Setting(act=None if after == "plain" else "relu", family=-1, info=SMALL)
    affine = {"weight": case.weight, "bias": case.bias}
    y = forward(case, setting, "eval_forward", residual=case.residual, frozen=case.stats, **affine)
    expected = reference.forward(
        case.x,
        case.weight,
        case.bias,
        case.residual,
        case.stats,
        act=setting.act,
    )
    criterion.assert_as_good_as_torch(y.output, None, expected.output, expected.magnitude)
    active = y.output > 0 if setting.act else None
    mask = masks.pack(active, case.x, cuda=True) if after == "residual" else None
    gradients = reference.backward(case.grad_out, case.x, case.weight, case.stats, active=active)
    for need_input, need_params in [(True, True), (True, False), (False, True)]:
        p = problem(case, setting, "eval_backward", need_input=need_input, need_params=need_params)
        check_gradients(
            both().run(lambda e, p=p: calls.backward(
                e, setting.plan(e, p), p, case.grad_out, case.x, mask=mask, frozen=case.stats,
                **affine,
            )),
            case, gradients,
        )  # fmt: skip


@pytest.mark.parametrize("team", TEAMS)
@pytest.mark.parametrize(("need_input", "need_params"), [(True, False), (False, True)])
def test_gradients_that_nobody_needs(team, need_input, need_params) -> None:
    case = make((3, 5, 9, 8), NCHW, DTYPES[2])
    setting = TEAMS["stream"] if not need_input else TEAMS[team]  # nothing to keep for a dx
    mean, var = reference.batch_stats(case.x)
    stats = calls.save_stats(mean, (var + 1e-5).rsqrt())
    p = problem(case, setting, "train_backward", need_input=need_input, need_params=need_params)
    grads = both().run(lambda e: calls.backward(
        e, setting.plan(e, p), p, case.grad_out, case.x, weight=case.weight, save_stats=stats,
    ))  # fmt: skip
    assert (grads.input is None, grads.weight is None) == (not need_input, not need_params)
    check_gradients(grads, case, reference.backward(case.grad_out, case.x, case.weight))


@pytest.mark.parametrize("team", TEAMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_running_statistics_average_cumulatively(team, dtype) -> None:
    case = make((3, 5, 9, 8), NCHW, (torch.float32, torch.float32, dtype))
    for count in (0, 3):
        mean, var, tracked = with_running_stats(case, TEAMS[team], None, torch.tensor(count))
        assert tracked == count + 1
        expected = reference.updated_running_stats(
            case.x, case.running_mean, case.running_var, 1 / (count + 1)
        )
        for got, want in zip((mean, var), expected, strict=True):
            eps = max(torch.finfo(dtype).eps, 1e-6)
            torch.testing.assert_close(got.double(), want, rtol=eps, atol=eps)


@pytest.mark.parametrize("team", TEAMS)
def test_momentum_nan_is_no_cumulative_average(team) -> None:
    case = make((3, 5, 9, 8), NCHW)
    mean, var, tracked = with_running_stats(case, TEAMS[team], torch.nan, torch.tensor(3))
    assert tracked == 4 and bool(mean.isnan().all()) and bool(var.isnan().all())


@pytest.mark.parametrize("layout", LAYOUTS, ids=shape_id)
@pytest.mark.parametrize("stage", ["train_backward", "eval_backward"])
def test_a_mask_where_only_sums_are_wanted(stage, layout) -> None:
    case, frozen = make(*layout, DTYPES[0], residual=True), stage == "eval_backward"
    setting = Setting(act="relu", family=-1, info=SMALL)
    active = torch.rand_like(case.x) > 0.5
    mean, var = case.stats if frozen else reference.batch_stats(case.x)
    save_stats = None if frozen else calls.save_stats(mean, (var + 1e-5).rsqrt())
    p = calls.problem(case.x, stage, act="relu", has_mask=True, need_input=False)
    grads = both().run(lambda e: calls.backward(
        e, setting.plan(e, p), p, case.grad_out, case.x, weight=case.weight, bias=case.bias,
        mask=masks.pack(active, case.x, cuda=True), save_stats=save_stats,
        frozen=case.stats if frozen else None,
    ))  # fmt: skip
    assert grads.input is None and grads.residual is None
    stats = case.stats if frozen else None
    check_gradients(
        grads, case, reference.backward(case.grad_out, case.x, case.weight, stats, active=active)
    )


@pytest.mark.parametrize("team", TEAMS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=shape_id)
@pytest.mark.parametrize("value", [0.0, 0.1, 1000.3, -1e30])
def test_a_constant_channel_gives_exactly_the_bias(team, layout, value) -> None:
    case = make(*layout, DTYPES[0])
    case.x.fill_(value)
    y = forward(case, TEAMS[team], weight=case.weight, bias=case.bias).output
    assert bool((y == reference.per_channel(case.bias, case.x).float()).all())


@pytest.mark.parametrize("team", TEAMS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=shape_id)
@pytest.mark.parametrize("scale", [1e30, 1e19, 1e-19, 1e-30])
def test_squares_that_no_float_holds(team, layout, scale) -> None:
    case = make(*layout, DTYPES[0], affine=(False, False))
    case.x[:, 1] *= scale
    case.x[:, 2] *= scale
    p = problem(case, TEAMS[team], "train_forward")
    eps = 0.0
    ours = both().run(lambda e: calls.forward(e, TEAMS[team].plan(e, p), p, case.x, eps=eps))
    expected = reference.forward(case.x, eps=eps)
    criterion.assert_as_good_as_torch(ours.output, None, expected.output, expected.magnitude)
    p = problem(case, TEAMS[team], "train_backward")
    grads = both().run(lambda e: calls.backward(
        e, TEAMS[team].plan(e, p), p, case.grad_out, case.x, save_stats=ours.save_stats, eps=eps,
    ))  # fmt: skip
    check_gradients(grads, case, reference.backward(case.grad_out, case.x, eps=eps))


@pytest.mark.parametrize("team", TEAMS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=shape_id)
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_not_finite_stays_in_its_channel(team, layout, value) -> None:
    case = make(*layout, DTYPES[0])
    clean = forward(case, TEAMS[team], weight=case.weight, bias=case.bias).output
    case.x[1, 2].flatten()[3:4].fill_(value) if layout[1] == NCHW else case.x[1, 2, 1, 1].fill_(
        value
    )
    y = forward(case, TEAMS[team], weight=case.weight, bias=case.bias).output
    others = [c for c in range(case.x.shape[1]) if c != 2]
    assert bool(y[:, 2].isnan().all())
    torch.testing.assert_close(y[:, others], clean[:, others], rtol=0, atol=0)


@pytest.mark.parametrize("team", ["block", "cluster", "grid"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=shape_id)
def test_resident_reads_memory_once(team, layout) -> None:
    case, e, setting = make(*layout, DTYPES[2], residual=False), both().checked, TEAMS[team]
    size = case.x.numel() * case.x.element_size()
    p = problem(case, setting, "train_forward")
    e.statistics()
    plan = setting.plan(e, p)
    y = calls.forward(e, plan, p, case.x)
    s = e.statistics()
    # And 32 values of each channel for a pilot, in each block that has some.
    pilots = 32 * case.x.element_size() * case.x.shape[1] * -(-plan.rows // plan.rows_per_block)
    assert s.bytes_read == size + pilots
    assert s.bytes_written == size + y.save_stats.numel() * 8
    assert s.launches == 1
    p = problem(case, setting, "train_backward", need_params=False)
    calls.backward(e, setting.plan(e, p), p, case.grad_out, case.x, save_stats=y.save_stats)
    s = e.statistics()
    assert (s.launches, s.bytes_read, s.bytes_written) == (1, 2 * size, size)


@pytest.mark.parametrize("team", TEAMS)
def test_every_order_gives_the_same_bits(team) -> None:
    case = make((4, 40, 5, 3), NHWC, DTYPES[0])
    outputs = []
    for seed in range(6):
        both().plain.seed(seed)
        p = problem(case, TEAMS[team], "train_forward")
        plan = TEAMS[team].plan(both().plain, p)
        outputs.append(calls.forward(both().plain, plan, p, case.x, weight=case.weight).output)
    assert all(torch.equal(outputs[0], y) for y in outputs)


def test_blocks_share_a_row() -> None:
    case = make((1, 2, 40, 33), NCHW, DTYPES[0])
    for team in TEAMS.values():
        plan = check_training(case, team)
    p = problem(case, TEAMS["cluster"], "train_forward")
    plan = TEAMS["cluster"].plan(both().plain, p)
    assert plan.rows_per_block < plan.row_items and plan.family == RESIDENT


def test_parameters_may_be_strided() -> None:
    case = make((3, 5, 9, 8), NCHW, DTYPES[0])
    wide = torch.stack([case.weight, case.bias], 1)
    y = forward(case, TEAMS["block"], weight=wide[:, 0], bias=wide[:, 1]).output
    expected = reference.forward(case.x, case.weight, case.bias)
    criterion.assert_as_good_as_torch(y, None, expected.output, expected.magnitude)


def test_a_plan_without_kernels_is_refused() -> None:
    case = make((3, 5, 9, 8), NCHW, DTYPES[0])
    p = problem(case, Setting(), "train_forward")
    plan = calls.plan(both().plain, p, vector=2)
    with pytest.raises(calls.EmulatorError):
        calls.forward(both().plain, plan, p, case.x)


def test_an_empty_batch_is_counted() -> None:
    count = torch.tensor(41)
    assert both().checked.library.bnext_count(ctypes.c_void_p(count.data_ptr())) == 0
    assert count == 42


def test_structures_are_as_large_as_those_they_mirror() -> None:
    sizes = (ctypes.c_int64 * 7)()
    both().plain.library.bnext_sizes(sizes)
    mirrors = [
        calls.Problem, calls.CudaInfo, calls.CudaPlan, calls.ForwardArgs, calls.BackwardArgs,
        calls.DoubleBackwardArgs, calls.JoinArgs,
    ]  # fmt: skip
    assert list(sizes) == [ctypes.sizeof(m) for m in mirrors]
