"""Bitwise the same: run to run, for any number of threads, whatever the strides of arguments."""

from dataclasses import replace

import pytest
import torch

from bnext.functional import batch_norm_act
from cases import Case, dtype_id, make

CL = torch.channels_last
# Shapes that each family and index map takes, above and below the sizes at which work is split.
SHAPES = [
    ((2, 3, 5, 7), torch.contiguous_format),
    ((8, 64, 28, 28), torch.contiguous_format),
    ((8, 64, 28, 28), CL),
    ((16, 128, 7, 7), torch.contiguous_format),
    ((16, 128, 7, 7), CL),
    ((2, 1, 300, 301), torch.contiguous_format),
    ((2, 3, 257, 255), torch.contiguous_format),
    ((2, 3, 257, 255), CL),
    ((3000, 33), torch.contiguous_format),
    ((5, 1000, 1, 3), torch.contiguous_format),
]


def everything(case: Case, training: bool, relu: bool) -> list[torch.Tensor]:
    """Output, all gradients, both running statistics."""
    leaves = [
        t.detach().requires_grad_() for t in (case.x, case.weight, case.bias, case.residual)
        if t is not None
    ]  # fmt: skip
    x, weight, bias, *residual = leaves
    mean, var = case.running_mean.clone(), case.running_var.clone()
    y = batch_norm_act(
        x, mean, var, weight, bias, residual[0] if residual else None, training,
        act="relu" if relu else None,
    )  # fmt: skip
    return [y.detach(), *torch.autograd.grad(y, leaves, case.grad_out), mean, var]


NAMES = ["output", "grad_input", "grad_weight", "grad_bias", "grad_residual"]


def assert_bitwise_equal(a: list[torch.Tensor], b: list[torch.Tensor], what: str) -> None:
    names = [*NAMES[: len(a) - 2], "running_mean", "running_var"]
    for name, x, y in zip(names, a, b, strict=True):
        assert torch.equal(x, y), f"{what}: {name} differs"


# float64 shows an order of summation that rounding to float32 hides.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=dtype_id)
@pytest.mark.parametrize("residual", [False, True], ids=["bn", "add-relu"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    "shape", SHAPES, ids=lambda s: "x".join(map(str, s[0])) + "-cl" * (s[1] is CL)
)
def test_any_number_of_threads(shape, training, residual, dtype) -> None:
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    case = make(*shape, (dtype, wide, wide), residual=residual)
    torch.set_num_threads(1)
    expected = everything(case, training, residual)
    for threads in (2, 3, 8):
        torch.set_num_threads(threads)
        assert_bitwise_equal(everything(case, training, residual), expected, f"{threads} threads")


@pytest.mark.parametrize("shape", SHAPES[1:6], ids=str)
def test_run_to_run(shape, device) -> None:
    case = make(*shape, device=device, residual=True)
    expected = everything(case, True, True)
    for run in range(5):
        assert_bitwise_equal(everything(case, True, True), expected, f"run {run}")


def test_strides_of_the_arguments_do_not_change_the_bits(device) -> None:
    case = make((6, 5, 9, 11), device=device, residual=True)
    expected = everything(case, True, True)
    strided = make((6, 5, 9, 11), device=device, residual=True)
    for name in ("x", "residual", "grad_out"):
        t = getattr(case, name)
        wide = torch.empty(6, 5, 9, 14, device=device)[..., 2:13]
        setattr(strided, name, wide.copy_(t))
    strided.weight, strided.bias = case.weight, case.bias
    strided.running_mean, strided.running_var = case.running_mean, case.running_var
    assert_bitwise_equal(everything(strided, True, True), expected, "strided")


def test_mask_or_recomputed_sign_or_saved_output_agree(device) -> None:
    """A residual of zeros takes the mask, none the recomputation: the same elements must pass."""
    for memory_format in (torch.contiguous_format, CL):
        case = make((4, 9, 13, 11), memory_format, device=device)
        with_mask = make((4, 9, 13, 11), memory_format, device=device)
        with_mask.__dict__.update(case.__dict__)
        with_mask.residual = torch.zeros_like(case.x)
        for training in (True, False):
            plain = everything(case, training, True)
            masked = everything(with_mask, training, True)
            del masked[4]
            assert_bitwise_equal(masked, plain, f"training {training}")


def test_no_grad_and_grad_forward_agree(device) -> None:
    case = make((4, 9, 13, 11), device=device, residual=True)
    for training in (True, False):
        expected = everything(case, training, True)[0]
        with torch.no_grad():
            y = batch_norm_act(
                case.x, case.running_mean.clone(), case.running_var.clone(), case.weight,
                case.bias, case.residual, training,
            )  # fmt: skip
        assert torch.equal(y, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("shape", [(8, 18, 5, 3), (4, 131, 5, 2), (4, 262, 3, 2)])
def test_the_same_wherever_tensors_begin(shape, dtype, device) -> None:
    """On a GPU the bits of such a mask lie as elements do in aligned items."""
    case = make(shape, CL, (dtype, torch.float32, torch.float32), device=device, residual=True)
    expected = everything(case, True, True)
    for moved in ("x", "residual", "grad_out"):
        t = getattr(case, moved)
        memory = torch.empty(t.numel() + 1, dtype=dtype, device=device)
        other = memory.as_strided(t.shape, t.stride(), 1)
        found = everything(replace(case, **{moved: other.copy_(t)}), True, True)
        for name, a, b in zip([*NAMES, "mean", "var"], expected, found, strict=True):
            assert torch.equal(a, b), f"{moved}: {name}"
