"""The CUDA kernels on the CPU: every instantiation against the float64 reference.

Each call runs twice: with every access checked (races, bounds, bytes never written, copies not
waited for), and without, in another order drawn at random; the results are the same bits.
"""

from itertools import product

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from bnext._activation import ACTIVATIONS
from cases import DTYPES, dtype_id, make, shape_id
from native import calls
from native.calls import BLOCK, CLUSTER, COLUMNS, GRID, RESIDENT, ROWS, SMALL, STREAMING
from native.checks import Setting, both, check_training, problem

NCHW, NHWC = torch.contiguous_format, torch.channels_last
# (elements of an access, how memory is cut) -> shapes of 2-byte and of 4-byte elements: several
# groups, the last one with fewer channels.
LAYOUTS = {
    (8, ROWS): ((3, 5, 9, 8), NCHW),
    (4, ROWS): ((3, 5, 17, 4), NCHW),
    (1, ROWS): ((3, 5, 71, 1), NCHW),
    (8, COLUMNS): ((6, 72, 5, 2), NHWC),
    (4, COLUMNS): ((6, 68, 5, 2), NHWC),
    (1, COLUMNS): ((5, 67, 3, 3), NHWC),
}
# Accesses of several elements all the same: rows of odd length, and of few channels.
RAGGED, INTERLEAVED = ((3, 8, 9, 9), NCHW), ((8, 3, 6, 4), NHWC)
WIDE = ((2, 67, 4, 2), NHWC)  # more than 512 values a row
# Rows that begin at each place of a mask's byte, and at two; the rest of a row is 3 or 4 elements.
MASKED = {"odd": (3, 8, 11, 17), "even": (3, 6, 14, 14), "short": (9, 16, 5, 7)}
# Slices of channels, one to five, the last one with fewer; they begin at each place.
SLICED = {"one": (8, 18, 5, 3), "three": (4, 131, 5, 2), "five": (4, 262, 3, 2)}
ROOMY = calls.CudaInfo(90, 4, 100 * calls.KIB, 99 * calls.KIB, 2**17, 8)
SHORT_ROWS = {8: (9, 24, 7, 7), 4: (9, 20, 7, 7), 1: (9, 5, 7, 3)}
WIDEST = {torch.float32: 4, torch.float64: 1, torch.bfloat16: 8, torch.float16: 8}
TEAMS = {"block": BLOCK, "cluster": CLUSTER, "grid": GRID, "stream": None}


def layouts() -> list:
    found = []
    for dtypes in DTYPES:
        for (v, index_map), layout in LAYOUTS.items():
            if v <= WIDEST[dtypes[0]] and not (dtypes[0] == torch.float64 and v > 1):
                found.append(pytest.param(dtypes, v, index_map, layout))
    return found


@pytest.mark.parametrize("team", TEAMS)
@pytest.mark.parametrize(("dtypes", "v", "index_map", "layout"), layouts(), ids=lambda v: (
    shape_id(v) or dtype_id(v) if isinstance(v, tuple) else str(v)
))  # fmt: skip
def test_training(dtypes, v, index_map, layout, team) -> None:
    setting = Setting(family=STREAMING if team == "stream" else RESIDENT, team=TEAMS[team],
                      info=SMALL)  # fmt: skip
    number = list(TEAMS).index(team) + v + DTYPES.index(dtypes)
    affine = [(True, True), (False, True), (True, False), (False, False)][number % 4]
    plan = check_training(make(*layout, dtypes, affine=affine), setting)
    assert (plan.vector, plan.map) == (v, index_map)
    setting.act = "relu"
    check_training(make(*layout, dtypes), setting)
    check_training(make(*layout, dtypes, residual=True), setting)


@pytest.mark.parametrize("team", TEAMS)
@pytest.mark.parametrize("v", SHORT_ROWS)
def test_short_rows_are_columns(v, team) -> None:
    setting = Setting(family=STREAMING if team == "stream" else RESIDENT, team=TEAMS[team],
                      info=SMALL, act="relu")  # fmt: skip
    plan = check_training(make(SHORT_ROWS[v], NCHW, DTYPES[2]), setting)
    channel = SHORT_ROWS[v][2] * SHORT_ROWS[v][3]
    assert (plan.vector, plan.map, plan.bins_per_channel) == (v, COLUMNS, channel)


@pytest.mark.parametrize("team", TEAMS)
@pytest.mark.parametrize("dtypes", [DTYPES[i] for i in (0, 2, 4)], ids=dtype_id)
@pytest.mark.parametrize("layout", [RAGGED, INTERLEAVED, WIDE], ids=shape_id)
@pytest.mark.parametrize("act", [None, "relu", "leaky_relu", "silu"])
def test_odd_rows_by_wide_accesses(act, layout, dtypes, team) -> None:
    setting = Setting(act, STREAMING if team == "stream" else RESIDENT, TEAMS[team], SMALL)
    plan = check_training(make(*layout, dtypes), setting)
    assert plan.vector == WIDEST[dtypes[0]]
    assert plan.interleaved == (layout != RAGGED)
    assert (plan.ends == 1) == (layout == RAGGED)
    check_training(make(*layout, dtypes, residual=True), setting)


@pytest.mark.parametrize("team", TEAMS)
@pytest.mark.parametrize("dtypes", [DTYPES[i] for i in (0, 2, 4)], ids=dtype_id)
@pytest.mark.parametrize("act", [None, "relu", "leaky_relu", "silu"])
def test_slices_of_many_odd_channels(act, dtypes, team) -> None:
    setting = Setting(act, STREAMING if team == "stream" else RESIDENT, TEAMS[team], ROOMY)
    for c in (261, 390):
        plan = check_training(make((4, c, 3, 2), NHWC, dtypes), setting)
        assert (plan.vector, plan.map, plan.ends) == (WIDEST[dtypes[0]], COLUMNS, 1)
        assert plan.groups > 2
        assert plan.family == setting.family


@pytest.mark.parametrize("act", [None, "relu", "leaky_relu", "silu"])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("family", [RESIDENT, STREAMING])
@pytest.mark.parametrize("layout", [RAGGED, ((8, 9, 3, 5), NHWC), ((2, 259, 2, 2), NHWC)])
def test_a_channel_of_nan_changes_no_other(layout, act, residual, family) -> None:
    case = make(*layout, DTYPES[2], residual=residual)
    others = [0, *range(2, layout[0][1])]
    setting, e = Setting(act, family), both().plain
    affine = {"weight": case.weight, "bias": case.bias, "act_param": 0.25}

    def results() -> list[torch.Tensor]:
        p = problem(case, setting, "train_forward")
        y = calls.forward(e, setting.plan(e, p), p, case.x, residual=case.residual, **affine)
        p = problem(case, setting, "train_backward")
        by = calls.backward(
            e, setting.plan(e, p), p, case.grad_out, case.x, mask=y.mask, save_stats=y.save_stats,
            residual=case.residual if p.residual else None, **affine,
        )  # fmt: skip
        found = (y.output, by.input, by.residual)
        of_others = [t[:, others] for t in found if t is not None]
        return [*of_others, *(t[others] for t in (by.weight, by.bias))]

    expected = results()
    for t in (case.x, case.grad_out, case.residual):
        if t is not None:
            t[:, 1] = torch.nan
    torch.testing.assert_close(results(), expected, rtol=0, atol=0)


@pytest.mark.parametrize("team", TEAMS)
@pytest.mark.parametrize("dtypes", [DTYPES[i] for i in (0, 2, 4)], ids=dtype_id)
@pytest.mark.parametrize("shape", MASKED)
@pytest.mark.parametrize("act", ["relu", "relu6", "leaky_relu"])
def test_masks_of_rows_that_are_no_whole_bytes(act, shape, dtypes, team) -> None:
    setting = Setting(act, STREAMING if team == "stream" else RESIDENT, TEAMS[team], SMALL)
    case = make(MASKED[shape], NCHW, dtypes, residual=True)
    plan = check_training(case, setting)
    assert (plan.vector, plan.map, plan.ends) == (WIDEST[dtypes[0]], ROWS, 1)
    # Aligned less, by accesses of fewer elements: the mask is the same.
    plan = check_training(case, setting, alignment=case.x.element_size())
    assert (plan.vector, plan.map, plan.ends) == (1, ROWS, 1)


@pytest.mark.parametrize("team", TEAMS)
@pytest.mark.parametrize("dtypes", [DTYPES[i] for i in (0, 1, 2, 4)], ids=dtype_id)
@pytest.mark.parametrize("shape", SLICED)
@pytest.mark.parametrize("act", ["relu", "relu6", "leaky_relu"])
def test_masks_of_slices(act, shape, dtypes, team) -> None:
    setting = Setting(act, STREAMING if team == "stream" else RESIDENT, TEAMS[team], ROOMY)
    n, c, h, w = SLICED[shape]
    case = make((n, c, h, w), NHWC, dtypes, residual=True)
    plan = check_training(case, setting)
    assert (plan.vector, plan.map, plan.ends) == (WIDEST[dtypes[0]], COLUMNS, 1)
    # Where items do not fill memory, single elements.
    plan = check_training(make((3, c | 1, 5, 1), NHWC, dtypes, residual=True), setting)
    assert (plan.vector, plan.map, plan.ends) == (1, COLUMNS, 1)


def test_a_mask_of_slices_takes_no_tensor_that_is_not_aligned() -> None:
    case = make(SLICED["three"], NHWC, DTYPES[2], residual=True)
    for alignment in (2, 4, 8):
        with pytest.raises(calls.EmulatorError, match="a mask of slices of channels"):
            check_training(case, Setting("relu"), alignment=alignment)


@pytest.mark.parametrize("act", [act for act in ACTIVATIONS if act not in (None, "relu")])
@pytest.mark.parametrize("dtypes", [DTYPES[i] for i in (0, 1, 2, 4)], ids=dtype_id)
@pytest.mark.parametrize("residual", [False, True])
def test_activations(act, dtypes, residual) -> None:
    for (v, _), layout in LAYOUTS.items():
        if v <= WIDEST[dtypes[0]] and not (dtypes[0] == torch.float64 and v > 1):
            case = make(*layout, dtypes, residual=residual)
            for team in (BLOCK, None):
                family = RESIDENT if team == BLOCK else STREAMING
                check_training(case, Setting(act, family, team, SMALL))


@pytest.mark.parametrize("layout", [((9, 3, 10, 12), NCHW), ((9, 40, 5, 3), NHWC)], ids=shape_id)
@pytest.mark.parametrize("blocks", [2, 4, 8, 16])
def test_sizes_of_clusters(blocks, layout) -> None:
    setting = Setting(team=CLUSTER, team_blocks=blocks, act="relu")
    check_training(make(*layout, DTYPES[2], residual=True), setting)


@pytest.mark.parametrize("layout", [((9, 7, 10, 12), NCHW), ((9, 130, 3, 3), NHWC)], ids=shape_id)
@pytest.mark.parametrize(("blocks", "teams"), [(3, 2), (1, 3), (5, 1)])
def test_grids_of_teams_that_take_turns(blocks, teams, layout) -> None:
    setting = Setting(team=GRID, team_blocks=blocks, teams=teams, act="relu")
    check_training(make(*layout, DTYPES[0]), setting)


@pytest.mark.parametrize("layout", [((5, 7, 10, 12), NCHW), ((9, 130, 3, 3), NHWC)], ids=shape_id)
@pytest.mark.parametrize(("blocks", "teams"), [(3, 2), (1, 3), (4, 1)])
def test_streaming_in_ranges(blocks, teams, layout) -> None:
    setting = Setting(family=STREAMING, team_blocks=blocks, teams=teams)
    check_training(make(*layout, DTYPES[0]), setting)


@pytest.mark.parametrize("shape", [(2, 1), (1, 1, 2), (3, 40, 1), (2, 3, 300), (1, 2, 1000)])
@pytest.mark.parametrize("team", TEAMS)
def test_odd_sizes(team, shape) -> None:
    setting = Setting(family=STREAMING if team == "stream" else RESIDENT, team=TEAMS[team],
                      info=SMALL, act="relu")  # fmt: skip
    check_training(make(shape, NCHW, DTYPES[0]), setting)


@pytest.mark.parametrize("alignment", [2, 4, 8])
def test_tensors_that_are_aligned_less(alignment) -> None:
    case = make((3, 5, 9, 8), NCHW, DTYPES[2])
    plan = check_training(case, Setting(), alignment=alignment)
    assert plan.vector == {2: 1, 4: 1, 8: 4}[alignment]


GPUS = st.builds(
    calls.CudaInfo, st.just(90), st.integers(1, 8), st.just(100 * calls.KIB),
    st.just(99 * calls.KIB), st.sampled_from([0, 2**17, 2**20]), st.sampled_from([1, 2, 4, 8]),
)  # fmt: skip


@settings(max_examples=40)
@given(
    n=st.integers(1, 12), c=st.integers(1, 130), h=st.integers(1, 20), w=st.integers(1, 20),
    memory_format=st.sampled_from([NCHW, NHWC]), dtypes=st.sampled_from(DTYPES), info=GPUS,
    act=st.sampled_from(list(ACTIVATIONS)), residual=st.booleans(),
    family=st.sampled_from([-1, RESIDENT, STREAMING]),
    team=st.sampled_from([None, *range(3)]),
)  # fmt: skip
def test_any_problem(n, c, h, w, memory_format, dtypes, info, act, residual, family, team) -> None:
    assume(h * w > 1)  # calls with one pixel are columns: see canonical
    case = make((n, c, h, w), memory_format, dtypes, residual=residual)
    setting = Setting(act, family, team if family == RESIDENT else None, info)
    try:
        check_training(case, setting)
    except calls.EmulatorError as e:
        assume("does not fit a GPU" not in str(e))
        raise


def test_every_kernel_is_launched_by_some_plan() -> None:
    e = both().plain
    e.kernels()  # forgets what was launched before
    odd = [(DTYPES[i], 1, ROWS, ((3, 5, 71, 1), NCHW)) for i in (0, 1, 2, 4)]
    odd += [(DTYPES[0], 4, ROWS, ((3, 5, 9, 8), NCHW)), (DTYPES[2], 4, ROWS, ((3, 5, 9, 8), NCHW))]
    odd += [(DTYPES[i], 4, ROWS, ((3, 5, 17, 4), NCHW)) for i in (0, 2, 4)]
    odd += [(DTYPES[i], 8, ROWS, RAGGED) for i in (0, 2, 4)]
    odd += [(DTYPES[i], 4, ROWS, ((3, 4, 13, 13), NCHW)) for i in (2, 4)]
    odd += [(DTYPES[i], 8, COLUMNS, ((4, c, 3, 2), NHWC)) for i in (0, 2, 4) for c in (66, 262)]
    for dtypes, _, _, layout in [*(p.values for p in layouts()), *odd]:
        case = make(*layout, dtypes)
        stats = calls.save_stats(case.running_mean, case.running_var)
        for act, residual, family in product(
            (None, "relu", "silu"), (False, True), (RESIDENT, STREAMING)
        ):
            added = {"act": act, "residual": residual}
            z = case.grad_out if residual else None
            p = calls.problem(case.x, "train_forward", **added)
            calls.forward(e, calls.plan(e, p, SMALL, family), p, case.x, residual=z)
            p = calls.problem(case.x, "train_backward", **added)
            mask = torch.zeros(calls.mask_shape(p), dtype=torch.uint8) if p.has_mask else None
            z = z if p.residual else None
            plan = calls.plan(e, p, SMALL, family)
            calls.backward(
                e, plan, p, case.grad_out, case.x, save_stats=stats, mask=mask, residual=z
            )
            p = calls.problem(case.x, "eval_backward", **added)
            for needs in (True, False):
                p.need_params = needs
                calls.backward(
                    e, calls.plan(e, p), p, case.grad_out, case.x, frozen=case.stats, mask=mask,
                    residual=z,
                )  # fmt: skip
        p = calls.problem(case.x, "train_forward", need_input=False)
        calls.forward(e, calls.plan(e, p, SMALL), p, case.x, moments=torch.empty_like(stats))
        for masked in (False, True):
            p = calls.problem(case.x, "double_backward", act="relu", has_mask=masked)
            mask = torch.zeros(calls.mask_shape(p), dtype=torch.uint8) if masked else None
            by = (case.grad_out, None, None, None)
            calls.double_backward(
                e, calls.plan(e, p, SMALL), p, by, case.grad_out, case.x, weight=case.weight,
                mask=mask, save_stats=stats,
            )  # fmt: skip
    p = calls.problem(case.x, "train_forward")
    calls.forward(
        e, calls.plan(e, p), p, case.x, num_batches_tracked=torch.tensor(0), momentum=None
    )
    joined = torch.ones(2, 3, 4, dtype=torch.float64)
    calls.join(e, joined, joined[:, 0, 0], (torch.zeros(4), torch.ones(4)), torch.tensor(0), 0.1)
    launched = e.kernels()
    assert len(launched) > 100
    assert not [name for name, was in launched.items() if not was]
