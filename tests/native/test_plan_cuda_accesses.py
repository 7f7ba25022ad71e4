"""By which accesses the CUDA plan takes memory: their width, the index map, the ends of rows."""

import pytest

from native.test_plan_cuda import plan


@pytest.mark.parametrize(
    ("c", "hw", "channels_last", "dtype", "alignment", "index_map", "vector"),
    [
        (64, 56 * 56, False, "bfloat16", 16, "rows", 8),
        (64, 56 * 56, False, "bfloat16", 8, "rows", 4),
        (64, 56 * 56, False, "bfloat16", 2, "rows", 1),
        (64, 56 * 56, False, "float32", 16, "rows", 4),
        (64, 56 * 56, False, "float32", 8, "rows", 1),
        (64, 56 * 56, False, "float64", 8, "rows", 1),
        (64, 14 * 14, False, "bfloat16", 16, "rows", 4),
        (64, 7 * 7, False, "bfloat16", 16, "columns", 8),
        (64, 7 * 7, False, "float32", 16, "columns", 4),
        (63, 7 * 7, False, "bfloat16", 16, "columns", 1),
        (64, 15 * 15, False, "bfloat16", 16, "rows", 8),
        (4, 15 * 15, False, "bfloat16", 16, "rows", 4),
        (63, 15 * 15, False, "bfloat16", 16, "rows", 1),
        (64, 4, False, "bfloat16", 16, "columns", 8),
        (64, 1, False, "bfloat16", 16, "columns", 8),
        (60, 49, True, "bfloat16", 16, "columns", 4),
        (3, 224 * 224, True, "bfloat16", 16, "columns", 8),
        (67, 49, True, "bfloat16", 16, "columns", 8),
        (255, 49, True, "bfloat16", 16, "columns", 8),
        (255, 49, True, "float32", 16, "columns", 4),
        (257, 49, True, "bfloat16", 16, "columns", 8),
        (257, 49, True, "bfloat16", 8, "columns", 1),
        (366, 14 * 14, True, "float32", 16, "columns", 4),
        (64, 49, True, "bfloat16", 2, "columns", 1),
    ],
)  # fmt: skip
def test_index_map_and_vector(c, hw, channels_last, dtype, alignment, index_map, vector) -> None:
    p = plan(32, c, hw, channels_last=channels_last, dtype=dtype, alignment=alignment)
    assert (p.index_map, p.vector) == (index_map, vector)


def test_a_mask_keeps_rows() -> None:
    assert plan(32, 64, 49, act="relu", residual=True).index_map == "rows"
    assert plan(32, 64, 49, act="relu").index_map == "columns"
    without = plan(32, 64, 49, "eval_forward", act="relu", residual=True, save_mask=False)
    assert without.index_map == "columns"
    assert without.bytes_floor == 3 * 32 * 64 * 49 * 2


@pytest.mark.parametrize(
    ("c", "hw", "act", "dtype", "alignment", "vector", "ends"),
    [
        (64, 56 * 56, "relu", "bfloat16", 16, 8, "whole"),
        (64, 14 * 14, "relu", "bfloat16", 16, 8, "ragged"),
        (64, 17 * 17, "relu", "bfloat16", 16, 8, "ragged"),
        (64, 25 * 39, "relu", "float16", 16, 8, "ragged"),
        (64, 149 * 149, "relu", "float32", 16, 4, "ragged"),
        (64, 14 * 14, "relu", "float32", 16, 4, "ragged"),
        (64, 7 * 7, "relu", "bfloat16", 16, 8, "ragged"),
        (64, 17 * 17, "leaky_relu", "bfloat16", 16, 4, "ragged"),  # by the loop of all
        (63, 14 * 14, "relu", "bfloat16", 16, 4, "ragged"),
        (63, 17 * 17, "relu", "bfloat16", 16, 1, "ragged"),
        (64, 17 * 17, "relu", "bfloat16", 2, 1, "ragged"),
        (64, 56 * 56, "relu", "bfloat16", 2, 1, "whole"),
    ],
)  # fmt: skip
def test_accesses_of_rows_with_a_mask(c, hw, act, dtype, alignment, vector, ends) -> None:
    p = plan(32, c, hw, "train_backward", dtype=dtype, act=act, residual=True, alignment=alignment)
    assert (p.index_map, p.vector, p.ends) == ("rows", vector, ends)


@pytest.mark.parametrize(
    ("n", "c", "hw", "act", "dtype", "vector", "group"),
    [
        (32, 18, 56 * 56, "relu", "bfloat16", 8, 18),
        (32, 57, 49, "relu", "bfloat16", 8, 57),
        (32, 67, 49, "relu", "float32", 4, 34),
        (32, 67, 49, "relu", "float64", 1, 34),
        (32, 67, 49, "leaky_relu", "bfloat16", 4, 34),
        (32, 131, 49, "relu", "float16", 8, 44),
        (32, 1023, 1, "relu", "float16", 8, 57),
        (3, 67, 49, "relu", "bfloat16", 1, 34),
    ],
)  # fmt: skip
def test_accesses_of_slices_with_a_mask(n, c, hw, act, dtype, vector, group) -> None:
    p = plan(n, c, hw, "train_backward", channels_last=True, dtype=dtype, act=act, residual=True)
    assert (p.index_map, p.ends, p.vector, p.group) == ("columns", "ragged", vector, group)


def test_the_second_derivative_takes_odd_ends_too() -> None:
    for c, hw, last, index_map in ((64, 17 * 17, False, "rows"), (257, 49, True, "columns")):
        p = plan(32, c, hw, "double_backward", channels_last=last, act="relu")
        assert (p.index_map, p.ends, p.vector) == (index_map, "ragged", 4)


def test_a_mask_where_only_sums_are_wanted() -> None:
    """It is read; there is no dx and no residual's gradient to keep operands for."""
    p = plan(32, 64, 56 * 56, "train_backward", act="relu", residual=True, need_input=False,
             need_residual=False)  # fmt: skip
    assert (p.family, p.team, p.launches) == ("streaming", "stream", 2)
    elements = 32 * 64 * 56 * 56
    assert p.bytes_moved == p.bytes_floor == 2 * 2 * elements + elements // 8


def test_the_backward_that_activations_share_takes_four_elements_but_of_whole_rows() -> None:
    for act, residual, shared in (("none", False, False), ("relu", False, False),
                                  ("relu", True, False), ("relu6", True, False),
                                  ("relu6", False, True), ("leaky_relu", True, True),
                                  ("silu", False, True), ("silu", True, True)):  # fmt: skip
        for hw, last in ((56 * 56, False), (56 * 56, True), (17 * 17, False), (7 * 7, False)):
            p = plan(32, 64, hw, "train_backward", channels_last=last, act=act, residual=residual)
            is_whole_row = (p.index_map, p.ends) == ("rows", "whole")
            assert is_whole_row == (hw == 56 * 56 and not last)
            assert p.vector == (4 if shared and not is_whole_row else 8), (act, residual, hw, last)
            assert plan(32, 64, hw, channels_last=last, act=act).vector == 8
    assert plan(32, 64, 14 * 14, "train_backward", act="silu").vector == 4


def test_a_mask_of_rows_that_are_too_long() -> None:
    assert plan(1, 1, 1 << 32, act="relu", residual=True).ends == "whole"
    with pytest.raises(ValueError, match=r"2\^31 elements"):
        plan(1, 1, (1 << 31) + 1, act="relu", residual=True)
