"""The plan as a table, on made-up devices: no kernel runs here."""

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import bnext
import masks
from bnext import _C

KIB, MIB = 1024, 1024 * 1024
STAGES = ["train_forward", "eval_forward", "train_backward", "eval_backward"]
SIZES = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}
SERVER = _C.DeviceInfo("avx512", 8, 48 * KIB, 1 * MIB, 32 * MIB)
LAPTOP = _C.DeviceInfo("avx2", 2, 32 * KIB, 256 * KIB, 4 * MIB)
BASIC = _C.DeviceInfo("default", 1, 32 * KIB, 128 * KIB, 0)
DEVICES = [SERVER, LAPTOP, BASIC]


def plan(n, c, hw, stage="train_forward", *, channels_last=False, dtype="float32", act="none",
         residual=False, device=SERVER, **kwargs):  # fmt: skip
    return _C.plan(n, c, hw, channels_last, dtype, stage, act, residual, device, **kwargs)


def ceil(a: int, b: int) -> int:
    return -(-a // b)


ACTS = ["none", "relu", "silu"]  # backward needs of them: nothing, the sign, the sum
problems = st.tuples(
    st.integers(1, 512), st.integers(1, 2048), st.integers(1, 60000), st.booleans(),
    st.sampled_from(list(SIZES)), st.sampled_from(STAGES), st.sampled_from(ACTS), st.booleans(),
)  # fmt: skip
devices = st.builds(
    _C.DeviceInfo, st.sampled_from(["default", "avx2", "avx512"]), st.integers(1, 256),
    st.sampled_from([32 * KIB, 48 * KIB]), st.sampled_from([128 * KIB, MIB, 2 * MIB]),
    st.sampled_from([0, 4 * MIB, 32 * MIB, 512 * MIB]),
)  # fmt: skip


SPLIT = (
    "index_map", "channels", "width", "fold", "rows", "row_stride", "rest", "pieces", "slices",
)  # fmt: skip


@given(problem=problems, device=devices)
def test_bytes_of_every_plan(problem, device) -> None:
    n, c, hw, channels_last, dtype, stage, act, residual = problem
    p = _C.plan(*problem, device)
    tensor = n * c * hw * SIZES[dtype]
    # One channel is one run of memory; one pixel makes both formats the same.
    by_pixels = c > 1 and (channels_last or hw == 1)
    rows, width = (n * hw if by_pixels else n * c, hw) if c > 1 else (1, n * hw)
    row_bytes = masks.row_bytes_of(c, width, by_pixels)
    mask = rows * row_bytes if act == "relu" and residual else 0
    again = tensor if act == "silu" and residual and "backward" in stage else 0
    # Forward reads x and writes y; backward reads x and dy, writes dx; a residual is one more.
    least = (2 if "forward" in stage else 3) * tensor
    assert p.bytes_floor == least + residual * tensor + mask + again
    assert p.bytes_moved >= p.bytes_floor
    again = tensor * (1 if "forward" in stage else 2)
    # A second read that half the L3 holds does not reach memory.
    misses = p.family == "streaming" and again > device.l3_bytes // 2
    # Where it is not rounded so, dy f' waits in grad_residual, or in dx, which is written twice; in
    # 16 bits the residual is read once more.
    if act == "silu" and stage == "train_backward" and residual == (SIZES[dtype] == 2):
        again += tensor
    assert p.bytes_moved - p.bytes_floor == (again if misses else 0)
    assert (p.family == "elementwise") == stage.startswith("eval"), "eval has nothing to wait for"


@given(problem=problems, device=devices)
def test_the_work_is_covered_once(problem, device) -> None:
    n, c, hw, _, _, _, _, _ = problem
    p = _C.plan(*problem, device)
    assert p.isa == device.isa
    assert p.rows * p.row_stride + p.rest == n * c * hw
    assert p.row_stride == p.fold * p.channels * p.width
    assert p.rest % (p.channels * p.width) == 0 and p.rest < p.row_stride
    assert (p.index_map == "rows") == (p.width > 128), "rows are longer than any two vectors"
    if p.index_map == "columns":
        assert p.row_stride >= 64, "two vectors of any dtype"
        assert p.fold == 1 or p.row_stride <= 2048, "what is staged fits its buffer"
    else:
        assert p.fold == 1 and p.pieces == max(1, p.width // 16384)
    assert 1 <= p.slices <= max(1, p.rows * p.pieces)
    assert p.block * p.blocks <= p.channels < p.block * (p.blocks + 1)
    assert p.fold == 1 or p.blocks == 1, "a channel is in every fold"
    assert p.tasks == p.blocks * (1 if p.family == "resident" else p.slices)
    assert p.block >= 1 and p.grain >= 1
    if p.index_map == "columns" and p.blocks > 1:
        assert p.block % (32 if SIZES[problem[4]] == 2 else 16) == 0, "blocks are whole vectors"


@given(problem=problems, device=devices, other=devices)
def test_the_split_of_the_sums_does_not_depend_on_the_machine(problem, device, other) -> None:
    """What makes results equal bit for bit whatever the threads and caches."""
    p, q = _C.plan(*problem, device), _C.plan(*problem, other)
    assert [getattr(p, name) for name in SPLIT] == [getattr(q, name) for name in SPLIT]
    assert _C.plan(*problem, device) == p, "the plan is a function"


# ResNet-50's shapes at N = 32 whose channels fit a core's cache: the memory is read once.
@pytest.mark.parametrize(
    ("c", "hw"),
    [(64, 56 * 56), (256, 56 * 56), (128, 28 * 28), (512, 784), (1024, 196), (2048, 49)],
)
@pytest.mark.parametrize("stage", ["train_forward", "train_backward"])
def test_resnet_shapes_are_resident(c, hw, stage) -> None:
    p = plan(32, c, hw, stage)
    assert (p.family, p.index_map) == ("resident", "columns" if hw == 49 else "rows")
    assert p.tasks >= SERVER.threads


@pytest.mark.parametrize(
    ("n", "c", "hw", "stage", "channels_last", "family", "index_map"),
    [
        (32, 64, 112 * 112, "train_forward", False, "resident", "rows"),
        (32, 64, 512 * 512, "train_forward", False, "streaming", "rows"),
        (32, 3, 224 * 224, "train_forward", False, "streaming", "rows"),
        (1, 1, 1 << 24, "train_forward", False, "streaming", "rows"),
        (32, 64, 56 * 56, "train_forward", True, "streaming", "columns"),
        (32, 512, 28 * 28, "train_forward", True, "streaming", "columns"),
        (32, 512, 28 * 28, "train_backward", True, "streaming", "columns"),
        (256, 1024, 1, "train_forward", True, "streaming", "columns"),
        (125000, 50, 1, "train_forward", True, "streaming", "columns"),
        (32, 2048, 4, "train_forward", False, "resident", "columns"),
        (32, 64, 56 * 56, "eval_forward", True, "elementwise", "columns"),
        (32, 64, 56 * 56, "eval_forward", False, "elementwise", "rows"),
        (32, 64, 56 * 56, "eval_backward", False, "elementwise", "rows"),
    ],
)
def test_family_and_index_map(n, c, hw, stage, channels_last, family, index_map) -> None:
    p = plan(n, c, hw, stage, channels_last=channels_last)
    assert (p.family, p.index_map) == (family, index_map)


def test_a_mask_where_only_sums_are_wanted() -> None:
    """It is read; there is no dx and no residual's gradient to keep operands for."""
    p = plan(32, 64, 56 * 56, "train_backward", act="relu", residual=True, need_input=False,
             need_residual=False)  # fmt: skip
    assert p.family == "streaming"
    elements = 32 * 64 * 56 * 56
    assert p.bytes_moved == p.bytes_floor == 2 * 4 * elements + elements // 8


def test_outputs_that_would_fill_the_cache_are_stored_past_it() -> None:
    assert plan(64, 64, 112 * 112).nontemporal_stores
    assert not plan(8, 64, 14 * 14).nontemporal_stores
    assert plan(64, 64, 111 * 111).nontemporal_stores, "odd rows are staged"
    assert plan(64, 65, 112 * 112, channels_last=True).nontemporal_stores, "folded to whole lines"
    odd = plan(64, 1001, 28 * 28, channels_last=True)
    assert odd.fold == 1 and not odd.nontemporal_stores, "rows of columns must be whole lines"


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("device", DEVICES, ids=lambda d: d.isa)
def test_few_channels_still_feed_every_thread(device, stage) -> None:
    for c, channels_last in product((1, 2, 3), (False, True)):
        p = plan(64, c, 128 * 128, stage, channels_last=channels_last, device=device)
        assert p.tasks >= device.threads, (c, channels_last, p)


def test_huge_problem_needs_64_bit_sizes() -> None:
    p = plan(1 << 16, 256, 1 << 10, dtype="bfloat16")
    assert p.bytes_floor == 2 * (1 << 34) * 2


def test_device_info_holds_what_it_is_given() -> None:
    d = _C.DeviceInfo("avx2", 3, 1, 2, 3)
    assert (d.isa, d.threads, d.l1_bytes, d.l2_bytes, d.l3_bytes) == ("avx2", 3, 1, 2, 3)
    with pytest.raises(AttributeError):
        d.threads = 4


def test_this_machine() -> None:
    d = _C.cpu_device_info(3)
    assert d.threads == 3
    assert d.isa in ("default", "avx2", "avx512")
    assert 8 * KIB <= d.l1_bytes <= d.l2_bytes <= 64 * MIB


def test_plans_compare_and_print() -> None:
    p = plan(32, 64, 3136)
    assert p == plan(32, 64, 3136) and p != plan(32, 65, 3136)
    assert p != "a plan"
    for word in ("resident", "rows", str(p.bytes_moved)):
        assert word in repr(p)
    with pytest.raises(AttributeError):
        p.family = "streaming"


@pytest.mark.parametrize(
    ("changed", "word"),
    [({"dtype": "int8"}, "int8"), ({"stage": "train"}, "train"), ({"n": -1}, "at least 1")],
)
def test_a_problem_that_does_not_exist_is_a_value_error(changed, word) -> None:
    kwargs = {
        "n": 2, "c": 3, "hw": 4, "channels_last": False, "dtype": "float32",
        "stage": "eval_forward", "act": "none", "residual": False, "device": SERVER,
    }  # fmt: skip
    with pytest.raises(ValueError, match=word):
        _C.plan(**{**kwargs, **changed})
    with pytest.raises(ValueError, match="sse9"):
        _C.DeviceInfo("sse9", 1, 1, 1, 1)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_explain_holds_the_plans_of_the_shape(memory_format, training) -> None:
    e = bnext.explain((8, 16, 14, 14), torch.bfloat16, memory_format, training, num_threads=2)
    stage = "train" if training else "eval"
    last = memory_format is torch.channels_last
    device = _C.cpu_device_info(2)
    assert e.forward == _C.plan(
        8, 16, 196, last, "bfloat16", f"{stage}_forward", "none", False, device
    )
    assert e.backward == _C.plan(
        8, 16, 196, last, "bfloat16", f"{stage}_backward", "none", False, device
    )
    for word in (e.forward.family, e.forward.index_map, "bfloat16", device.isa):
        assert word in str(e)


def test_explain_refuses_what_it_cannot_describe() -> None:
    for shape in ((3,), (1, 2, 3, 4, 5, 6)):
        with pytest.raises(ValueError, match="dimensions"):
            bnext.explain(shape)
    with pytest.raises(ValueError):
        bnext.explain((2, 3), torch.int32)


def test_build_info_says_what_was_built() -> None:
    info = bnext.build_info()
    assert info["version"] == bnext.__version__
    assert isinstance(info["cuda"], bool)
    text = str(info)
    assert "default" in text, "the CPU instruction sets that were built"
    assert info["cuda"] or "missing" in text or "why" in text or "CUDA" in text
    info["version"] = "changed"
    assert bnext.build_info()["version"] == bnext.__version__
