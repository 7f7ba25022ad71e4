"""What test_sync.py runs in several gloo processes.

    python sync_checks.py WHAT RANK RANKS PORT

WHAT is "all", for all of FUNCTIONS, or the way in which the last process is lost.
"""

import copy
import datetime
import os
import sys
import time
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import bnext
from cases import LAYOUTS, make
from pytorch.sync_numbers import (
    has_more_channels_than_a_message_holds,
    is_one_process_on_the_whole_batch,
    module_of,
    passes_gradcheck_through_the_collectives,
    synchronises_subgroups,
    takes_every_activation_and_a_residual,
)

TIMEOUT_SECONDS = 5


def network(kind: type[nn.Module]) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), kind(8), nn.ReLU(), nn.Conv2d(8, 4, 3), kind(4),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2),
    )  # fmt: skip


def train(model: nn.Module, batches: list[Tensor], steps: int = 4) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    for batch in batches[:steps]:
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()


def trains_as_one_process(shard: bool) -> None:
    ranks, rank = dist.get_world_size(), dist.get_rank()
    batches = [torch.randn(3 * ranks, 3, 8, 8) for _ in range(4)]
    one = network(nn.BatchNorm2d)
    model = network(bnext.SyncBatchNorm)
    if shard:
        from torch.distributed.fsdp import fully_shard

        mesh = dist.init_device_mesh("cpu", (ranks,))
        fully_shard(model, mesh=mesh)
        wrapped = model
    else:
        wrapped = nn.parallel.DistributedDataParallel(model)
    train(one, batches)
    train(wrapped, [b.chunk(ranks)[rank] for b in batches])
    state = {
        k: v.full_tensor() if hasattr(v, "full_tensor") else v
        for k, v in model.state_dict().items()
    }
    for name, value in one.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=1e-3, atol=1e-4, msg=name)


def trains_with_ddp() -> None:
    trains_as_one_process(shard=False)


def trains_with_fsdp2() -> None:
    trains_as_one_process(shard=True)


def runs_again_for_a_checkpoint() -> None:
    case = make(LAYOUTS["nchw"][0], residual=True)
    grads = []
    for run in (lambda bn, x: bn(x), lambda bn, x: checkpoint(bn, x, use_reentrant=False)):
        x = (case.x + dist.get_rank()).requires_grad_()
        bn = module_of(case, act="silu")
        run(bn, x).square().sum().backward()
        grads.append((x.grad, bn.weight.grad, bn.bias.grad))
    torch.testing.assert_close(*grads, rtol=0, atol=0)


def keeps_two_models_apart() -> None:
    ranks, rank = dist.get_world_size(), dist.get_rank()
    x = torch.randn(2 * ranks, 3, 4, 4)
    one, other = bnext.SyncBatchNorm(3), bnext.SyncBatchNorm(3)
    mine = x.chunk(ranks)[rank]
    a, b = one(mine).sum(), other(3 * mine + 1)
    c = one(mine)
    (b.square().sum() + c.square().sum() + a).backward()
    for bn, whole, times in ((one, x, 2), (other, 3 * x + 1, 1)):
        expected = nn.BatchNorm2d(3)
        for _ in range(times):
            expected(whole)
        torch.testing.assert_close(bn.running_mean, expected.running_mean)
        torch.testing.assert_close(bn.running_var, expected.running_var)


def needs_no_one_else_in_eval() -> None:
    bn = bnext.SyncBatchNorm(3)
    if dist.get_rank() == 0:
        x = torch.randn(4, 3, 5)
        torch.testing.assert_close(bn.eval()(x), x / (1 + 1e-5) ** 0.5)


def tracks_as_torch_does() -> None:
    ranks, rank = dist.get_world_size(), dist.get_rank()
    x = torch.randn(4 * ranks, 3, 5)
    for options in (
        {"momentum": None}, {"track_running_stats": False}, {"affine": False},
        {"momentum": None, "affine": False},
    ):  # fmt: skip
        ours, one = bnext.SyncBatchNorm(3, **options), nn.BatchNorm1d(3, **options)
        for scale in (1, 2, 3):
            y = ours(scale * x.chunk(ranks)[rank])
            expected = one(scale * x).chunk(ranks)[rank]
            torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours.state_dict(), one.state_dict())


def refuses(make_input: Callable[[int], Tensor], match: str) -> None:
    """All processes raise, and the running statistics stay."""
    x = make_input(dist.get_rank())
    bn = bnext.SyncBatchNorm(x.shape[1], dtype=x.dtype)
    with pytest.raises((RuntimeError, ValueError), match=match):
        bn(x)
    assert not bn.running_mean.any() and bool((bn.running_var == 1).all())
    assert bn.num_batches_tracked == 0


def names_the_rank_that_disagrees() -> None:
    last = dist.get_world_size() - 1
    refuses(
        lambda rank: torch.randn(4, 4 if rank == last else 3, 5),
        rf"rank (0|{last}) has (4|3) channels",
    )
    refuses(
        lambda rank: torch.randn(4, 2000 if rank == last else 3, 5),
        rf"rank (0|{last}) has (2000|3) channels",
    )
    refuses(
        lambda rank: torch.randn(4, 3, 5).to(torch.float64 if rank == last else torch.float32),
        rf"rank (0|{last}) has 3 channels of torch.float(64|32)",
    )


def refuses_a_single_value() -> None:
    refuses(
        lambda rank: torch.randn(int(rank == 0), 3, 1), "Expected more than 1 value per channel"
    )


def changes_nothing_where_an_argument_is_refused() -> None:
    bn, x = bnext.SyncBatchNorm(3), torch.randn(4, 3, 5)
    for name, wrong in (
        ("weight", torch.ones(3, dtype=torch.float64)), ("bias", torch.ones(4)),
        ("residual", x.double()[:, :2]),
    ):  # fmt: skip
        changed = copy.deepcopy(bn)
        if name != "residual":
            setattr(changed, name, nn.Parameter(wrong))
        with pytest.raises(RuntimeError, match=name if name != "residual" else "size of tensor"):
            changed(x, wrong if name == "residual" else None)
        assert not changed.running_mean.any() and changed.num_batches_tracked == 0


def compiles_with_a_break() -> None:
    ranks, rank = dist.get_world_size(), dist.get_rank()
    x = torch.randn(2 * ranks, 3, 8, 8)
    plain, model = network(bnext.SyncBatchNorm), network(bnext.SyncBatchNorm)
    compiled = torch.compile(model, backend="aot_eager")
    for m in (plain, compiled):
        m(x.chunk(ranks)[rank]).square().mean().backward()
    for a, b in zip(plain.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-6)


def is_copied_and_converted() -> None:
    model = bnext.SyncBatchNorm.convert_sync_batchnorm(
        nn.Sequential(bnext.BatchNormAct2d(3, act="silu"), nn.BatchNorm2d(3))
    )
    ranks, rank = dist.get_world_size(), dist.get_rank()
    x = torch.randn(2 * ranks, 3, 4, 4)
    expected = nn.Sequential(nn.BatchNorm2d(3), nn.SiLU(), nn.BatchNorm2d(3))(x)
    theirs = nn.Sequential(nn.SyncBatchNorm(3), nn.SiLU(), nn.SyncBatchNorm(3))
    for kind in (copy.deepcopy(model), bnext.convert(theirs, fuse=True)):
        y = kind(x.chunk(ranks)[rank])
        torch.testing.assert_close(y, expected.chunk(ranks)[rank], rtol=1e-4, atol=1e-5)


FUNCTIONS = [
    is_one_process_on_the_whole_batch, takes_every_activation_and_a_residual,
    has_more_channels_than_a_message_holds, synchronises_subgroups,
    passes_gradcheck_through_the_collectives, trains_with_ddp, trains_with_fsdp2,
    runs_again_for_a_checkpoint, keeps_two_models_apart, needs_no_one_else_in_eval,
    tracks_as_torch_does, names_the_rank_that_disagrees, refuses_a_single_value,
    changes_nothing_where_an_argument_is_refused, compiles_with_a_break, is_copied_and_converted,
]  # fmt: skip


def loses_a_rank(how: str) -> None:
    """The last process goes away in one way or another; the others say so in time."""
    last = dist.get_world_size() - 1
    bn, x = bnext.SyncBatchNorm(3), torch.randn(4, 3, 5)
    bn(x)
    state = copy.deepcopy(bn.state_dict())
    dist.barrier()
    if dist.get_rank() == last:
        if how == "ends":
            os._exit(0)
        if how == "is in eval mode":
            bn.eval()(x)
        time.sleep(3 * TIMEOUT_SECONDS)
        return
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="could not exchange statistics") as error:
        bn(x)
    assert time.monotonic() - start < 2 * TIMEOUT_SECONDS
    assert f"rank {last}" in str(error.value), error.value
    torch.testing.assert_close(bn.state_dict(), state, rtol=0, atol=0)
    print("done loses_a_rank", flush=True)
    os._exit(0)  # the group cannot be left in order


def main(what: str, rank: int, ranks: int, port: str) -> None:
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=port)
    torch.set_num_threads(1)
    seconds = 120 if what == "all" else TIMEOUT_SECONDS
    dist.init_process_group(
        "gloo", rank=rank, world_size=ranks, timeout=datetime.timedelta(seconds=seconds)
    )
    if what != "all":
        return loses_a_rank(what)
    for function in FUNCTIONS:
        torch.manual_seed(1)
        function()
        dist.barrier()
        print("done", function.__name__, flush=True)
    return dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
