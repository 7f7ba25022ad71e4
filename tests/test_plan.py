"""The plan as a table, on made-up devices: no kernel runs here."""

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import bnext
from bnext import _C

KIB, MIB = 1024, 1024 * 1024
STAGES = ["train_forward", "eval_forward", "train_backward", "eval_backward"]
SIZES = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}
SERVER = _C.DeviceInfo("avx512", 8, 48 * KIB, 1 * MIB, 32 * MIB)
LAPTOP = _C.DeviceInfo("avx2", 2, 32 * KIB, 256 * KIB, 4 * MIB)
BASIC = _C.DeviceInfo("default", 1, 32 * KIB, 128 * KIB, 0)
DEVICES = [SERVER, LAPTOP, BASIC]


def plan(n, c, hw, stage="train_forward", *, channels_last=False, dtype="float32", relu=False,
         residual=False, device=SERVER):  # fmt: skip
    return _C.plan(n, c, hw, channels_last, dtype, stage, relu, residual, device)


problems = st.tuples(
    st.integers(1, 512), st.integers(1, 2048), st.integers(1, 60000), st.booleans(),
    st.sampled_from(list(SIZES)), st.sampled_from(STAGES), st.booleans(), st.booleans(),
)  # fmt: skip
devices = st.builds(
    _C.DeviceInfo, st.sampled_from(["default", "avx2", "avx512"]), st.integers(1, 256),
    st.sampled_from([32 * KIB, 48 * KIB]), st.sampled_from([128 * KIB, MIB, 2 * MIB]),
    st.sampled_from([0, 4 * MIB, 32 * MIB, 512 * MIB]),
)  # fmt: skip


@given(problem=problems, device=devices)
def test_invariants_of_every_plan(problem, device) -> None:
    n, c, hw, _, dtype, stage, relu, residual = problem
    p = _C.plan(*problem, device)
    elements = n * c * hw * SIZES[dtype]
    assert p.family in ("resident", "streaming", "elementwise")
    assert p.index_map in ("rows", "columns")
    assert p.bytes_moved >= p.bytes_floor
    assert (p.family == "elementwise") == stage.startswith("eval"), "eval has nothing to wait for"
    assert p.isa == device.isa and p.threads == device.threads
    assert p.tasks >= 1 and p.chunk_elements >= 1
    # The floor: forward reads x, writes y; backward reads x and dy, writes dx; a residual is one more.
    tensors = (2 if stage.endswith("forward") else 3) + residual
    if stage.endswith("backward"):
        tensors = 3 + (residual and relu)
    mask = n * c * hw / 8 if relu and residual else 0
    assert p.bytes_floor <= tensors * elements + mask + n * (c + hw)
    assert p.bytes_floor >= tensors * elements if stage != "eval_backward" else 2 * elements
    if p.family == "resident":
        assert p.bytes_moved == p.bytes_floor, "resident reads memory once"
    if p.family == "streaming":
        assert p.bytes_moved - p.bytes_floor == (1 if stage == "train_forward" else 2) * elements
    assert _C.plan(*problem, device) == p, "the plan is a function"


@given(problem=problems, device=devices)
def test_the_split_of_sums_does_not_depend_on_threads_or_isa(problem, device) -> None:
    """What makes results equal bit for bit whatever the machine: the chunks are the problem's."""
    for threads, isa in ((1, "default"), (7, "avx2"), (64, "avx512")):
        other = _C.DeviceInfo(isa, threads, device.l1_bytes, device.l2_bytes, device.l3_bytes)
        assert _C.plan(*problem, other).chunk_elements == _C.plan(*problem, device).chunk_elements


# ResNet-50's shapes at N = 32 whose channels fit a core's cache: the memory is read once.
@pytest.mark.parametrize(
    ("c", "hw"), [(64, 56 * 56), (256, 56 * 56), (128, 28 * 28), (512, 784), (1024, 196), (2048, 49)]
)
@pytest.mark.parametrize("stage", ["train_forward", "train_backward"])
def test_resnet_shapes_are_resident(c, hw, stage) -> None:
    p = plan(32, c, hw, stage)
    assert (p.family, p.index_map) == ("resident", "rows")
    assert p.tasks >= SERVER.threads


TABLE = [
    # n, c, hw, stage, channels_last -> family, index map
    ((32, 64, 112 * 112, "train_forward", False), ("resident", "rows")),
    ((32, 64, 512 * 512, "train_forward", False), ("streaming", "rows")),
    ((4096, 1, 1, "train_forward", False), ("streaming", "rows")),
    ((1, 1, 1 << 24, "train_forward", False), ("streaming", "rows")),
    ((32, 3, 224 * 224, "train_forward", False), ("streaming", "rows")),
    ((32, 64, 56 * 56, "train_forward", True), ("resident", "columns")),
    ((32, 64, 56 * 56, "eval_forward", True), ("elementwise", "columns")),
    ((32, 64, 56 * 56, "eval_forward", False), ("elementwise", "rows")),
    ((32, 64, 56 * 56, "eval_backward", False), ("elementwise", "rows")),
    ((125000, 50, 1, "train_forward", True), None),
]


@pytest.mark.parametrize(("arguments", "expected"), [row for row in TABLE if row[1]])
def test_family_and_index_map(arguments, expected) -> None:
    *sizes, channels_last = arguments
    p = plan(*sizes, channels_last=channels_last)
    assert (p.family, p.index_map) == expected


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
    [({"dtype": "int8"}, "int8"), ({"stage": "train"}, "train"), ({"n": -1}, "")],
)
def test_a_problem_that_does_not_exist_is_a_value_error(changed, word) -> None:
    kwargs = {"n": 2, "c": 3, "hw": 4, "channels_last": False, "dtype": "float32",
              "stage": "eval_forward", "relu": False, "residual": False, "device": SERVER}  # fmt: skip
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
    assert e.forward == _C.plan(8, 16, 196, last, "bfloat16", f"{stage}_forward", False, False, device)
    assert e.backward == _C.plan(8, 16, 196, last, "bfloat16", f"{stage}_backward", False, False, device)
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
