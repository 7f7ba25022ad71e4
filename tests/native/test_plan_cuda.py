"""The CUDA plan as a table, on the numbers of GPUs that nobody needs to have."""

from itertools import product
from math import prod

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import bnext.introspect
import masks
from bnext import _C

KIB, MIB = 1024, 1024 * 1024
GPUS = {
    **bnext.introspect.GPUS,
    "H100 with portable clusters": _C.CudaInfo(90, 132, 228 * KIB, 227 * KIB, 48 * MIB, 8),
}
STAGES = [
    "train_forward", "eval_forward", "train_backward", "eval_backward", "double_backward",
]  # fmt: skip
SIZES = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}
# What kernels are instantiated for: elements per access.
VECTORS = {"float32": {4, 1}, "float64": {1}, "bfloat16": {8, 4, 1}, "float16": {8, 4, 1}}
PARTIAL_BYTES, RECORD_BYTES, RESULT_BYTES, PREPARED_BYTES = 32, 32, 32, 64
# C and the height of the 53 batch norms of ResNet-50.
RESNET50 = [
    (64, 112), (64, 56), (128, 56), (256, 56), (128, 28), (256, 28), (512, 28), (256, 14),
    (512, 14), (1024, 14), (512, 7), (2048, 7),
]  # fmt: skip


def plan(n, c, hw, stage="train_forward", *, channels_last=False, dtype="bfloat16", act="none",
         residual=False, gpu="H200", **kwargs):  # fmt: skip
    device = GPUS[gpu]
    return _C.plan_cuda(n, c, hw, channels_last, dtype, stage, act, residual, device, **kwargs)


def ceil(a: int, b: int) -> int:
    return -(-a // b)


problems = st.tuples(
    st.integers(1, 512), st.integers(1, 2048), st.integers(1, 60000) | st.integers(1, 300),
    st.booleans(), st.sampled_from(list(SIZES)), st.sampled_from(STAGES),
    st.sampled_from(["none", "relu", "silu"]), st.booleans(),
)  # fmt: skip
asked_gradients = st.sampled_from([(True, True), (True, False), (False, True), (False, False)])
alignments = st.sampled_from([16, 8, 4, 2])


def check(problem, gpu, p, needs=(True, True), alignment=16) -> None:
    """What holds of every plan: kernels exist, all is covered once, the GPU can run it."""
    n, c, hw, channels_last, dtype, stage, act, residual = problem
    if c == 1:
        n, hw, channels_last = 1, n * hw, False
    elif hw == 1:
        channels_last = True
    size, backward, double = SIZES[dtype], "backward" in stage, stage == "double_backward"
    training = "train" in stage or double
    operands = 3 if double else 2 if backward else 1
    applies = not backward or needs[0] or residual
    sums = training or (backward and (needs[1] or double))

    # The kernels there are.
    assert p.vector in VECTORS[dtype] and p.vector * size <= 16
    assert p.vector == 1 or p.vector * size <= alignment
    assert p.threads % (32 * p.warp_sets) == 0 and 32 <= p.threads <= 512, "the launch bounds"
    teams_of = {"resident": {"block", "cluster", "grid"}}.get(p.family, {"stream"})
    assert p.team in teams_of
    assert p.family == ("elementwise" if not sums else p.family)
    families = ("resident", "streaming") if training else ("elementwise", "streaming")
    assert p.family in (("streaming",) if double else families)
    assert p.family != "resident" or applies, "what only sums reads once anyway"

    # Groups of channels, and rows of them.
    bins = p.group * p.bins_per_channel
    assert 1 <= bins <= (8 * 256 if p.interleaved else 512) and p.groups == ceil(c, p.group)
    masked = residual and act == "relu"
    if p.index_map == "rows":
        assert not channels_last and p.bins_per_channel == 1
        assert (p.warp_rows, p.warp_sets) == (32, p.group), "whole warps for each channel"
        unit = 8 if masked else p.vector
        assert (p.ends == "ragged") == (hw % unit != 0)
        if p.ends == "ragged":
            assert masked or hw % 4 != 0
            assert c * hw % unit == 0 or hw % p.vector == 0, "rows begin alike in each sample"
            assert p.row_items * p.vector == ceil(unit - 1 + hw, unit) * unit
        else:
            assert p.row_items * p.vector == hw
        assert p.rows == n * p.row_items
        assert p.rows_per_block % (8 // p.vector) == 0, "whole bytes of a mask"
        assert p.row_items > 1 or n == 1
        for i in {0, p.row_items - 1, p.row_items, 7 * p.row_items, 2**31 - 1}:
            if n > 1:
                assert (i * p.magic >> 32) >> p.magic_shift == i // p.row_items
    else:
        columns = 32 // p.warp_rows
        assert p.magic == 0
        assert columns & (columns - 1) == 0 and bins <= columns * p.warp_sets * p.vector
        assert p.warp_sets == 1 or columns == 32
        assert not masked or columns * p.vector >= 8, "neighbours in a byte share a warp"
        sliced = p.ends == "ragged"
        assert sliced == (channels_last and c % 4 != 0 and not p.interleaved
                          and (masked or p.vector > 1))  # fmt: skip
        if p.interleaved:
            assert (
                channels_last and not masked and p.groups == 1 and n * hw % p.bins_per_channel == 0
            )
        else:
            assert p.bins_per_channel == (1 if channels_last else hw)
        if sliced:
            assert p.group == masks.slice_of(c) <= 57
            unit = 8 if masked else p.vector
            assert columns * p.warp_sets * p.vector >= (unit - 1) * (p.vector > 1) + p.group
            if p.vector > 1:
                step = p.threads // 32 // p.warp_sets * p.warp_rows
                assert p.warp_sets == 1 and p.threads // 32 % 8 == step * c % 8 == 0
                assert n * hw * c % 8 == 0 and p.vector * size == (8 if p.vector == 4 != 16 // size
                                                                  else 16)  # fmt: skip
        assert channels_last or not masked, "mask bytes belong to rows of memory"
        assert sliced or c * p.bins_per_channel % p.vector == 0
        assert sliced or p.groups == 1 or bins % 8 == 0
        assert sliced or p.groups == 1 or bins * size >= 128, "a line of memory"
        assert p.row_items == ceil(c * p.bins_per_channel, p.vector)
        assert p.rows == (n * hw // p.bins_per_channel if channels_last else n)
    items = ceil(p.rows_per_block, p.threads // 32 // p.warp_sets * p.warp_rows)
    assert p.team_blocks * p.rows_per_block >= p.rows
    assert p.team == "cluster" or (p.team_blocks - 1) * p.rows_per_block < p.rows
    assert p.rows_per_block < 2**31 and (
        p.index_map == "rows" or p.rows_per_block == 1 or p.rows_per_block * p.row_items < 2**32
    )

    # What a block, a team and a launch may be.
    resident = p.family == "resident"
    assert p.items_per_thread == (items if resident else 0)
    slabs = ceil(operands * p.items_per_thread * p.threads * p.vector * size, 32) * 32
    bins_of_thread = 1 if p.index_map == "rows" else p.vector
    channel = PARTIAL_BYTES + RECORD_BYTES + RESULT_BYTES + PREPARED_BYTES * backward
    assert p.slab_bytes == slabs
    scratch = p.threads // p.warp_rows * bins_of_thread * 16
    assert p.shared_bytes == slabs + scratch + p.group * channel
    assert p.shared_bytes <= gpu.shared_bytes_per_block
    assert 1 <= p.teams * p.team_blocks < 2**31
    partials = p.teams * p.team_blocks * p.group * (40 if double else PARTIAL_BYTES)
    turns = ceil(p.groups, p.teams)
    if p.team == "block":
        assert p.team_blocks == 1
    elif p.team == "cluster":
        assert p.team_blocks in (2, 4, 8, 16) and p.team_blocks <= gpu.max_cluster_blocks
    elif p.team == "grid":
        assert p.teams * p.team_blocks <= gpu.sms, "all blocks of a cooperative launch run at once"
    else:
        assert p.teams == p.groups_per_launch <= p.groups
    results = p.teams * p.group * RESULT_BYTES
    assert p.workspace_bytes == {"grid": partials + results, "stream": sums * partials}.get(
        p.team, 0
    )
    sliced = p.index_map == "columns" and p.ends == "ragged"
    if not (training and applies) and p.family == "streaming":
        # One pass, then what becomes of the sums; of slices dx comes last.
        assert p.launches == (3 if sliced and applies else 2) and turns == 1
    else:
        assert p.launches == (2 * turns if p.family == "streaming" else 1)

    # Bytes.
    tensor = prod((n, c, hw)) * size
    reads = (operands if needs[1] or act != "none" or training else 1) * tensor
    mask = n * (hw if channels_last else c) * masks.row_bytes_of(c, hw, channels_last)
    added = {"none": 0, "relu": mask, "silu": tensor * backward}[act]
    floor = reads + needs[0] * tensor + residual * (tensor + added)
    assert p.bytes_floor == floor
    assert floor <= p.bytes_moved <= floor + reads
    once = not (training or (sliced and sums)) or not applies
    if p.family != "streaming" or reads <= gpu.l2_bytes // 2 or once:
        assert p.bytes_moved == floor


def must_be_aligned(problem) -> bool:
    """Or bits of a mask would lie elsewhere."""
    n, c, hw, channels_last, dtype, _, act, residual = problem
    masked = residual and act == "relu" and c > 1 and (channels_last or hw == 1)
    return masked and c % 4 != 0 and n * c * hw % 8 == 0 and dtype != "float64"


@given(
    problem=problems, gpu=st.sampled_from(list(GPUS)), needs=asked_gradients, alignment=alignments
)
@example((1, 1, 60000, False, "float64", "train_forward", "none", False), "A100", (True, True), 16)
@example((512, 3, 49, False, "bfloat16", "train_forward", "none", False), "H200", (True, True), 16)
def test_every_plan(problem, gpu, needs, alignment) -> None:
    forward = "forward" in problem[5]
    needs = (True, True) if forward else needs
    alignment = max(alignment, SIZES[problem[4]])
    arguments = (*problem, GPUS[gpu], *needs, True, alignment)
    if must_be_aligned(problem) and alignment < 16:
        try:
            check(problem, GPUS[gpu], _C.plan_cuda(*arguments), needs, alignment)
        except ValueError as error:
            assert "a mask of slices of channels" in str(error)
        return
    p = _C.plan_cuda(*arguments)
    check(problem, GPUS[gpu], p, needs, alignment)
    assert p == _C.plan_cuda(*arguments), "the plan is a function"


@given(
    problem=problems, sms=st.integers(1, 300), shared=st.integers(48, 512), l2=st.integers(0, 512),
    cluster=st.sampled_from([1, 2, 4, 8, 16]),
)  # fmt: skip
@example((1, 240, 86, True, "bfloat16", "eval_backward", "silu", False), 2, 49, 184, 16)
def test_every_plan_on_any_gpu(problem, sms, shared, l2, cluster) -> None:
    gpu = _C.CudaInfo(90, sms, (shared + 1) * KIB, shared * KIB, l2 * MIB, cluster)
    check(problem, gpu, _C.plan_cuda(*problem, gpu))


@given(
    problem=problems, gpu=st.sampled_from(list(GPUS)),
    choice=st.sampled_from(["streaming", "resident", "block", "cluster", "grid"]),
)  # fmt: skip
def test_a_choice_is_kept_or_refused(problem, gpu, choice) -> None:
    with pytest.MonkeyPatch.context() as environment:
        name = "FAMILY" if choice in ("streaming", "resident") else "TEAM"
        environment.setenv(f"BNEXT_CUDA_{name}", choice)
        try:
            p = _C.plan_cuda(*problem, GPUS[gpu])
        except ValueError as error:
            assert f"BNEXT_CUDA_{name}={choice}" in str(error) and "does not fit" in str(error)
            assert choice != "streaming"
            return
    check(problem, GPUS[gpu], p)
    shared = problem[5] == "train_backward" and (
        problem[6] == "silu" or (problem[6] == "none" and problem[7]) or p.vector == 1
    )
    if problem[5].startswith("train") and not (shared and p.index_map == "columns"
                                               and p.ends == "ragged"):  # fmt: skip
        assert choice in (p.family, p.team)
        assert p.team_blocks > 1 or choice != "cluster"


def test_every_kernel_is_chosen_by_some_plan() -> None:
    """dtype, vector and index map make an instantiation; the team is a matter of its launch."""
    wanted, found = set(), set()
    for dtype, vectors in VECTORS.items():
        for vector, index_map, stage in product(vectors, ("rows", "columns"), STAGES):
            families = ("resident", "streaming") if "train" in stage else ("elementwise",)
            if stage == "double_backward":
                families = ("streaming",) if vector <= 4 else ()
            wanted |= {(dtype, vector, index_map, stage, family) for family in families}
        for n, c, hw, last, stage, needs_params in product(
            (2, 256, 1 << 18), (24, 36, 7, 131), (1, 35, 36, 49, 128, 132, 641**2, 642**2, 640**2),
            (False, True), STAGES, (False, True),
        ):  # fmt: skip
            p = plan(
                n, c, hw, stage, channels_last=last, dtype=dtype, need_params=needs_params
            )  # fmt: skip
            found.add((dtype, p.vector, p.index_map, stage, p.family))
    assert wanted <= found, sorted(wanted - found)


def test_every_team_is_chosen_by_some_plan() -> None:
    shapes = [(n, c, h * h) for n in (32, 256) for c, h in RESNET50]
    found = {(p.team, p.team_blocks if p.team == "cluster" else 0)
             for n, c, hw in shapes for last in (False, True)
             for p in [plan(n, c, hw, channels_last=last)]}  # fmt: skip
    assert found >= {("block", 0), ("grid", 0), ("stream", 0)}
    assert found >= {("cluster", blocks) for blocks in (2, 4, 8, 16)}


@pytest.mark.parametrize("n", [32, 64, 128, 256])
@pytest.mark.parametrize("stage", ["train_forward", "train_backward"])
@pytest.mark.parametrize("gpu", ["H100", "H200", "B200"])
def test_resnet_is_resident_in_bf16(gpu, stage, n) -> None:
    for c, h in RESNET50:
        p = plan(n, c, h * h, stage, gpu=gpu)
        assert p.family == "resident" and p.vector == (4 if h == 14 else 8), (c, h, p)
        # A slab of 64 channels, a line wide, in the shared memory of all SMs but its overhead.
        slab = n * h * h * 128 * (2 if "backward" in stage else 1)
        last = plan(n, c, h * h, stage, channels_last=True, gpu=gpu)
        if slab < 0.93 * GPUS[gpu].sms * GPUS[gpu].shared_bytes_per_block:
            assert last.family == "resident" and last.vector == 8, (c, h, last)


# Blocks per channel at the two ends of the batch sizes, as 208 KiB of an SM allow (bf16, H200).
@pytest.mark.parametrize(
    ("n", "c", "h", "forward", "backward"),
    [
        (32, 256, 56, 2, 4), (128, 256, 56, 8, 8), (256, 256, 56, 8, 16), (32, 512, 28, 1, 1),
        (256, 512, 28, 4, 8), (32, 1024, 14, 1, 1), (32, 2048, 7, 1, 1),
    ],
)  # fmt: skip
def test_teams_are_as_small_as_two_blocks_an_sm_allow(n, c, h, forward, backward) -> None:
    for stage, blocks in (("train_forward", forward), ("train_backward", backward)):
        assert plan(n, c, h * h, stage).team_blocks == blocks


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("channels_last", [False, True])
def test_large_problems_fill_the_gpu(gpu, stage, channels_last) -> None:
    for n, c, hw in ((64, 3, 224 * 224), (256, 64, 56 * 56), (1, 1, 6_000_000), (32, 512, 784)):
        p = plan(n, c, hw, stage, channels_last=channels_last, gpu=gpu)
        blocks = p.teams * p.team_blocks
        assert 2 * blocks > GPUS[gpu].sms, p


@pytest.mark.parametrize("gpu", GPUS)
def test_streaming_goes_by_what_the_l2_keeps(gpu) -> None:
    half = GPUS[gpu].l2_bytes // 2
    p = plan(64, 64, 512 * 512, dtype="float32", gpu=gpu)
    if p.family == "streaming":
        assert p.bytes_moved > p.bytes_floor
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("BNEXT_CUDA_FAMILY", "streaming")
        small = plan(8, 128, 784, gpu=gpu)
        assert (small.launches, small.bytes_moved) == (2, small.bytes_floor)
        large = plan(256, 256, 56 * 56, gpu=gpu)
    if large.launches > 2:
        assert large.groups_per_launch * 256 * 56 * 56 * 2 <= half, "a range stays in half the L2"
        assert large.bytes_moved == large.bytes_floor
    else:
        assert half < 128 * KIB * GPUS[gpu].sms, "only where more launches cost more than they save"


def test_one_streaming_block_an_sm_has_all_threads() -> None:
    """Groups whose exchange is too much for two."""
    for c, threads in ((512, 512), (67, 480), (255, 512)):
        p = plan(256, c, 56 * 56, channels_last=True)
        assert (p.family, p.vector, p.threads) == ("streaming", 8, threads)
        assert p.teams * p.team_blocks <= 132


def test_what_is_asked_for_decides_the_passes() -> None:
    shape = (32, 64, 56 * 56)
    frozen = plan(*shape, "eval_backward")
    assert (frozen.family, frozen.launches) == ("streaming", 2)
    assert frozen.bytes_moved == frozen.bytes_floor, "x and dy are read once"
    assert plan(*shape, "eval_backward", need_params=False).family == "elementwise"
    sums = plan(*shape, "train_backward", need_input=False)
    assert (sums.family, sums.launches) == ("streaming", 2)
    assert plan(*shape, "train_backward", need_params=False).family == "resident"


def test_huge_problems() -> None:
    for shape in ((1 << 16, 256, 1 << 10), (1, 1, 1 << 34), (1 << 34, 1, 1), (1, 1 << 30, 1)):
        for stage, last, gpu in product(STAGES, (False, True), GPUS):
            problem = (*shape, last, "bfloat16", stage, "none", False)
            check(problem, GPUS[gpu], _C.plan_cuda(*problem, GPUS[gpu]))


def test_choices_that_nothing_serves() -> None:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("BNEXT_CUDA_TEAM", "block")
        with pytest.raises(ValueError, match=r"BNEXT_CUDA_TEAM=block.*does not fit.*132 SMs"):
            plan(256, 64, 56 * 56)
        environment.setenv("BNEXT_CUDA_FAMILY", "streaming")
        with pytest.raises(ValueError, match="is of the resident family"):
            plan(256, 64, 56 * 56)
        environment.setenv("BNEXT_CUDA_FAMILY", "elementwise")
        with pytest.raises(ValueError, match="expected resident or streaming, got"):
            plan(256, 64, 56 * 56)
        environment.setenv("BNEXT_CUDA_FAMILY", "")
        environment.setenv("BNEXT_CUDA_TEAM", "stream")
        with pytest.raises(ValueError, match="expected block, cluster or grid"):
            plan(256, 64, 56 * 56)


def test_device_info_holds_what_it_is_given() -> None:
    info = _C.CudaInfo(90, 132, 228 * KIB, 227 * KIB, 60 * MIB, 16)
    assert info == GPUS["H200"] != GPUS["H100"]
    assert (info.capability, info.sms, info.l2_bytes) == (90, 132, 60 * MIB)
    for wrong in ((90, 0, 228, 227, 60, 16), (90, 1, 228, 40, 60, 1), (90, 1, 100, 227, 60, 1)):
        sizes = [wrong[0], wrong[1], *(n * KIB for n in wrong[2:5]), wrong[5]]
        with pytest.raises(ValueError, match="CudaInfo: expected"):
            _C.CudaInfo(*sizes)


def test_plans_compare_and_print() -> None:
    p = plan(32, 64, 3136)
    assert p == plan(32, 64, 3136) and p != plan(32, 65, 3136)
    for word in ("resident", "rows", "cluster", str(p.bytes_moved)):
        assert word in repr(p)
