"""What the processes of a group tell each other: moments forward, sums backward.

Forward it is one all-gather, whose size must not depend on what processes may disagree about: gloo
ends a process that receives another size than it expects. So a message has a header that is
compared, and room for a fixed number of channels; only layers of more send the rest after that.
"""

import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bnext._check import DTYPES
from bnext._ops import EAGER

__all__ = ["Group", "Joined", "all_gather_single", "all_reduce", "join", "message_bytes", "room"]

# Of the header: the format of the message, channels, dtype, values per channel.
_FORMAT, _CHANNELS, _DTYPE, _COUNT, _HEADER = range(5)
_VERSION = 1.0
# Bytes of the messages that a process receives, at most where the least room is not more.
_MAX_RECEIVED, _LEAST_ROOM, _MOST_ROOM = 1 << 20, 64, 1024
_ROWS = 3  # of moments
# How long processes whose exchange has failed wait for each other's word of it.
_REPORT_SECONDS = 2.0

Group = Any  # a torch.distributed.ProcessGroup, which a build may lack


def all_gather_single(received: Tensor, sent: Tensor, group: Group = None) -> None:
    """What torch before 2.13 calls all_gather_into_tensor."""
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(received, sent, group=group)


@dataclass(frozen=True)
class Joined:
    """The statistics of a batch that several processes share."""

    save_stats: Tensor  # [3, C]
    count: Tensor  # []: values per channel of all processes
    group: Group


def room(ranks: int) -> int:
    """The channels of a layer that is exchanged in one message."""
    most = _MAX_RECEIVED // (8 * _ROWS * ranks)
    return min(max(most, _LEAST_ROOM), _MOST_ROOM)


def message_bytes(channels: int, ranks: int) -> list[int]:
    """Of each message that a process sends forward."""
    first = room(ranks)
    rest = max(channels - first, 0)
    return [8 * size for size in (_HEADER + _ROWS * first, _ROWS * rest) if size]


def join(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
    group: Group,
) -> Joined:
    """The statistics of the whole batch, after which the running ones have moved.

    If processes disagree, or one does not take part, nothing has changed.
    """
    ranks, channels = dist.get_world_size(group), input.shape[1]
    moments = EAGER.moments(input, eps)  # [3, C]
    header = _header(input)
    first = room(ranks)
    packed = moments.new_zeros(_HEADER + _ROWS * first)
    packed[:_HEADER] = header
    packed[_HEADER:].view(_ROWS, first)[:, :channels] = moments[:, :first]
    received = _all_gather(packed, ranks, group)
    _compare(received[:, :_HEADER], header, group)
    joined = received[:, _HEADER:].view(ranks, _ROWS, first)[..., :channels]
    if channels > first:
        rest = _all_gather(moments[:, first:].flatten(), ranks, group)
        joined = torch.cat([joined, rest.view(ranks, _ROWS, channels - first)], 2)
    counts = received[:, _COUNT]
    count = counts.sum()
    if input.device.type == "cpu" and count == 1:
        raise ValueError(
            "Expected more than 1 value per channel when training, got input size "
            f"{input.shape} in the only process that has values"
        )
    save_stats = EAGER.join(
        input, joined, counts, running_mean, running_var, num_batches_tracked, momentum, eps
    )
    return Joined(save_stats, count, group)


def all_reduce(sums: Tensor, group: Group) -> Tensor:
    """The sums of all processes, in place."""
    try:
        dist.all_reduce(sums, group=group)
    except RuntimeError as error:
        raise RuntimeError(_what_failed("gradients' sums", sums, group)) from error
    return sums


def _header(input: Tensor) -> Tensor:
    channels = input.shape[1]
    count = input.numel() // channels
    fields = [_VERSION, channels, DTYPES.index(input.dtype), count]
    key = (*fields, input.device)
    header = _HEADERS.get(key)
    if header is None:
        if len(_HEADERS) > 1000:
            _HEADERS.clear()
        header = torch.tensor(fields, dtype=torch.float64, device=input.device)
        _HEADERS[key] = header
    return header


# Made once, because copying one to a GPU would make the host wait.
_HEADERS: dict[tuple[Any, ...], Tensor] = {}


def _all_gather(packed: Tensor, ranks: int, group: Group) -> Tensor:
    """[ranks, size]; what did not come is NaN."""
    received = packed.new_full((ranks, packed.numel()), torch.nan)
    try:
        all_gather_single(received.view(-1), packed, group=group)
    except RuntimeError as error:
        raise RuntimeError(_what_failed("statistics", packed, group)) from error
    return received


def _compare(headers: Tensor, own: Tensor, group: Group) -> None:
    """Raise if a process has other channels or another dtype than this one."""
    same = headers[:, :_COUNT] == own[:_COUNT]
    if headers.device.type != "cpu":  # the host does not wait for a GPU
        torch._assert_async(same.all(), "SyncBatchNorm: processes disagree on channels or dtype")
        return
    if bool(same.all()):
        return
    me = dist.get_rank(group)
    others = [
        f"rank {dist.get_global_rank(group, rank)} has {_described(headers[rank])}"
        for rank in range(len(headers)) if not bool(same[rank].all())
    ]  # fmt: skip
    raise RuntimeError(
        f"bnext: SyncBatchNorm: processes disagree: {'; '.join(others)}; this one, rank "
        f"{dist.get_global_rank(group, me)}, has {_described(own)}"
    )


def _described(header: Tensor) -> str:
    version, channels, dtype, _ = header.tolist()
    if version != _VERSION:
        return "sent no statistics: it calls something else"
    return f"{channels:.0f} channels of {DTYPES[int(dtype)]}"


def _what_failed(what: str, tensor: Tensor, group: Group) -> str:
    """Say which processes did not take part in a collective that failed here."""
    me = dist.get_global_rank(group, dist.get_rank(group))
    message = f"bnext: SyncBatchNorm: rank {me} could not exchange {what} with its process group"
    absent = _silent_ranks(group)
    if absent:
        names = " and ".join(f"rank {rank}" for rank in absent)
        return (
            f"{message}. Nothing came from {names}: it has ended, hangs, is in eval mode or calls "
            "other layers"
        )
    kind = tensor.device.type
    return f"{message}. Does its backend ({dist.get_backend(group)}) take {kind} tensors?"


def _silent_ranks(group: Group) -> list[int]:
    """The ranks that have not found out that something failed, as far as the store can tell."""
    ranks = dist.get_process_group_ranks(group)
    try:
        store = dist.distributed_c10d._get_process_group_store(group)
        keys = {rank: f"bnext/failed/{rank}" for rank in ranks}
        store.set(keys[dist.get_rank()], "")
        end = time.monotonic() + _REPORT_SECONDS
        while keys and time.monotonic() < end:
            keys = {rank: key for rank, key in keys.items() if not store.check([key])}
            time.sleep(0.05)
    except (AttributeError, KeyError, RuntimeError):  # the store has ended as well
        return [rank for rank in ranks if rank != dist.get_rank()][:1] if len(ranks) == 2 else []
    return sorted(keys)
