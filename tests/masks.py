"""The mask of an op: which of its bits stands for which element (see csrc/problem.h)."""

import torch
from torch import Tensor


def row_bytes_of(c: int, hw: int, channels_last: bool) -> int:
    """Of a row of memory."""
    if not channels_last:
        return (hw + 7) // 8 + (hw % 8 + 6) // 8
    if c % 4 == 0:
        return (c + 7) // 8
    width = slice_of(c)
    return -(-c // width) * ((width + 14) // 8)


def slice_of(c: int) -> int:
    """Of channels that four does not divide: as few slices as can be of at most 57."""
    slices = -(-c // 57)
    return -(-c // slices)


def places(x: Tensor, cuda: bool) -> tuple[Tensor, tuple[int, int]]:
    """The place of each element's bit, in x's shape, and the shape of the mask."""
    n, c, hw = x.shape[0], x.shape[1], x[0, 0].numel()
    if c > 1 and (hw == 1 or not x.is_contiguous()):
        row_bytes = row_bytes_of(c, hw, True)
        pixels, channels = torch.arange(n * hw).unsqueeze(1), torch.arange(c)
        if not cuda:
            found = 8 * -(-c // 8) * pixels + channels
        elif c % 4 == 0:
            found = 8 * row_bytes * pixels + channels
        else:  # as elements lie in aligned items, where items fill memory
            width = slice_of(c)
            which, within = channels // width, channels % width
            starts = 8 * (row_bytes * pixels + (width + 14) // 8 * which)
            if x.numel() % 8 == 0 and x.dtype != torch.float64:
                starts += (pixels * c + which * width) % 8
            found = starts + within
        return found.view(n, hw, c).transpose(1, 2).reshape(x.shape), (n * hw, row_bytes)
    rows, width = (n * c, hw) if c > 1 else (1, n * hw)
    row_bytes = row_bytes_of(c, width, False)
    starts = torch.arange(rows)
    if not cuda:
        starts *= 8 * -(-width // 8)
    elif c * width % 8 == 0:
        starts = 8 * row_bytes * starts + starts * width % 8
    else:
        starts *= 8 * row_bytes
    return (starts.unsqueeze(1) + torch.arange(width)).view(x.shape), (rows, row_bytes)


def pack(active: Tensor, x: Tensor, cuda: bool) -> Tensor:
    """The mask that stands for `active`; what is no element's is zero."""
    where, shape = places(x, cuda)
    bits = torch.zeros(8 * shape[0] * shape[1], dtype=torch.uint8)
    bits[where.flatten()] = active.cpu().flatten().to(torch.uint8)
    mask = (bits.view(-1, 8) << torch.arange(8, dtype=torch.uint8)).sum(1).to(torch.uint8)
    return mask.view(shape).to(x.device)


def unpack(mask: Tensor, x: Tensor, cuda: bool) -> Tensor:
    """The bits of a mask as booleans of x's shape; what is no element's must be zero."""
    where, shape = places(x, cuda)
    assert mask.dtype == torch.uint8 and mask.shape == shape
    bits = mask.cpu().flatten().unsqueeze(1) >> torch.arange(8, dtype=torch.uint8) & 1
    active = bits.flatten()[where].bool().to(x.device)
    assert torch.equal(mask, pack(active, x, cuda))
    return active
