"""SyncBatchNorm in 2, 3 and 4 gloo processes, against the float64 reference of the whole batch.

Each number of processes is started once, and all functions of FUNCTIONS run there in turn.
"""

import copy
import datetime
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import bnext
import criterion
from bnext import reference
from bnext._activation import ACTIVATIONS, parameter
from bnext._exchange import all_gather_single, room
from cases import DTYPES, LAYOUTS, Case, make

TESTS = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
TIMEOUT_SECONDS = 5


def sizes_of(n: int, ranks: int) -> list[int]:
    """Uneven shares of a batch, the first process's empty."""
    shares = [0] + [n // (ranks - 1)] * (ranks - 1)
    shares[-1] += n - sum(shares)
    return shares


def part(t: Tensor | None, sizes: list[int]) -> Tensor | None:
    return None if t is None else t.split(sizes)[dist.get_rank()]


def gathered(t: Tensor) -> list[Tensor]:
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, t)
    return found


def module_of(case: Case, **options: Any) -> bnext.SyncBatchNorm:
    bn = bnext.SyncBatchNorm(case.x.shape[1], **options)
    state = {"weight": case.weight, "bias": case.bias, "running_mean": case.running_mean,
             "running_var": case.running_var}  # fmt: skip
    for name, value in state.items():
        if getattr(bn, name) is not None:
            getattr(bn, name).data = value.clone()
    return bn


def check(case: Case, sizes: list[int], act: str | None = None, bn: Any = None) -> None:
    """One training step of this process's part."""
    bn = bn or module_of(case, act=act)
    param = parameter(act, None)
    before = bn.running_mean.clone(), bn.running_var.clone()
    x = part(case.x, sizes).detach().clone().requires_grad_()
    residual = part(case.residual, sizes)
    residual = None if residual is None else residual.detach().clone().requires_grad_()
    y = bn(x, residual)
    y.backward(part(case.grad_out, sizes))
    expected = reference.forward(
        case.x, case.weight, case.bias, case.residual, act=act, act_param=param
    )
    allowance = 1 if act in (None, "relu") else 8
    criterion.assert_as_good_as_torch(
        y.detach(), None, part(expected.output, sizes),
        allowance * part(expected.magnitude, sizes), "output",
    )  # fmt: skip
    outputs = torch.cat(gathered(y.detach()))
    z = expected.pre.detach().requires_grad_()
    slope = torch.autograd.grad(reference.ACTIVATIONS[act](z, param).sum(), z)[0]
    if act == "relu":
        slope = (outputs > 0).double()
    dy = slope * case.grad_out.double()
    wanted = reference.backward(dy, case.x, case.weight)
    flat = reference.backward(case.grad_out, case.x, case.weight)
    factor = allowance * (2 if case.x.dtype is torch.float64 else 1)
    magnitude = torch.maximum(wanted.input_magnitude, flat.input_magnitude)
    criterion.assert_as_good_as_torch(
        x.grad, None, part(wanted.input, sizes), factor * part(magnitude, sizes), "input"
    )
    for name in ("weight", "bias"):  # this process's, as with torch.nn's: DDP averages them
        grads = torch.stack(gathered(getattr(bn, name).grad)).double()
        magnitude = torch.maximum(
            getattr(wanted, f"{name}_magnitude"), getattr(flat, f"{name}_magnitude")
        )
        allowed = torch.finfo(case.weight.dtype).eps * grads.abs().sum(0)  # each is rounded
        allowed += 16 * factor * magnitude * (2.0**-53 if x.dtype is torch.float64 else 2.0**-24)
        assert bool(((grads.sum(0) - getattr(wanted, name)).abs() <= allowed).all()), name
    if residual is not None:
        eps = 16 * torch.finfo(x.dtype).eps
        torch.testing.assert_close(residual.grad, part(dy, sizes).to(x.dtype), rtol=eps, atol=eps)
    new = reference.updated_running_stats(case.x, *before, bn.momentum)
    for got, want in zip((bn.running_mean, bn.running_var), new, strict=True):
        eps = 4 * torch.finfo(got.dtype).eps
        torch.testing.assert_close(got, want.to(got.dtype), rtol=eps, atol=eps)
        assert all(torch.equal(got, other) for other in gathered(got)), "processes differ"
    assert bn.num_batches_tracked == 1


def is_one_process_on_the_whole_batch() -> None:
    ranks = dist.get_world_size()
    for dtypes, (shape, layout) in product(DTYPES, LAYOUTS.values()):
        case = make((5, *shape[1:]), layout, dtypes)
        for sizes in (sizes_of(5, ranks), sizes_of(5, ranks)[::-1]):
            check(case, sizes)


def takes_every_activation_and_a_residual() -> None:
    for act, layout, added in product(ACTIVATIONS, ("nchw", "nhwc"), (False, True)):
        shape, memory_format = LAYOUTS[layout]
        case = make((4, *shape[1:]), memory_format, DTYPES[0], residual=added)
        check(case, sizes_of(4, dist.get_world_size()), act)


def has_more_channels_than_a_message_holds() -> None:
    channels = room(dist.get_world_size()) + 5
    for dtypes in (DTYPES[0], DTYPES[1]):
        case = make((4, channels, 2), dtypes=dtypes)
        check(case, sizes_of(4, dist.get_world_size()))


def synchronises_subgroups() -> None:
    ranks, rank = dist.get_world_size(), dist.get_rank()
    groups = [dist.new_group(members) for members in ([0, 1], [*range(2, ranks)]) if members]
    mine, first = (groups[0], 0) if rank < 2 else (groups[1], 2)
    members = dist.get_world_size(mine)
    case = make((3 * members, 4, 5))
    x = case.x.split(3)[rank - first].clone().requires_grad_()
    bn = module_of(case, process_group=mine)
    y = bn(x)
    y.backward(case.grad_out.split(3)[rank - first])
    expected = reference.forward(case.x, case.weight, case.bias)
    wanted = reference.backward(case.grad_out, case.x, case.weight)
    torch.testing.assert_close(
        y.double(), expected.output.split(3)[rank - first], rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(
        x.grad.double(), wanted.input.split(3)[rank - first], rtol=1e-5, atol=1e-5
    )
    if ranks > 2:
        other = groups[1] if rank < 2 else groups[0]
        with pytest.raises(RuntimeError, match="expected one that this process"):
            module_of(case, process_group=other)(case.x)


class Gather(torch.autograd.Function):
    """All processes' parts of an equal size; the gradient of all is the same everywhere."""

    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:
        all_of_it = own.new_empty(dist.get_world_size() * own.shape[0], *own.shape[1:])
        all_gather_single(all_of_it, own.contiguous())
        return all_of_it

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return Split.apply(grad)


class Split(torch.autograd.Function):
    """This process's part."""

    @staticmethod
    def forward(ctx: Any, all_of_it: Tensor) -> Tensor:
        return all_of_it.chunk(dist.get_world_size())[dist.get_rank()].clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return Gather.apply(grad)


class Share(torch.autograd.Function):
    """A parameter that all processes have."""

    @staticmethod
    def forward(ctx: Any, t: Tensor) -> Tensor:
        return t.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return Total.apply(grad)


class Total(torch.autograd.Function):
    """The sum over processes."""

    @staticmethod
    def forward(ctx: Any, t: Tensor) -> Tensor:
        t = t.clone()
        dist.all_reduce(t)
        return t

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return Share.apply(grad)


def passes_gradcheck_through_the_collectives() -> None:
    ranks = dist.get_world_size()
    x, residual = torch.randn(2, 2 * ranks, 2, dtype=torch.float64)
    weight, bias = torch.rand(2, 2, dtype=torch.float64) + 0.5
    inputs = [t.requires_grad_() for t in (x, weight, bias, residual)]
    for act, added in ((None, False), ("silu", True), ("leaky_relu", True)):
        bn = bnext.SyncBatchNorm(2, act=act, dtype=torch.float64)

        def f(x, weight, bias, residual, bn=bn, added=added):
            del bn._parameters["weight"], bn._parameters["bias"]
            bn._parameters.update(weight=Share.apply(weight), bias=Share.apply(bias))
            return Gather.apply(bn(Split.apply(x), Split.apply(residual) if added else None))

        assert torch.autograd.gradcheck(f, inputs)
        assert torch.autograd.gradgradcheck(f, inputs, atol=1e-4)


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


def outputs_of(what: str, ranks: int) -> list[str]:
    """What each of so many processes wrote; where the last one is lost, the others."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    environment = {
        **os.environ,
        "PYTHONPATH": f"{TESTS.parent}:{TESTS}",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, what, str(rank), str(ranks), port], cwd=TESTS,
            env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for rank in range(ranks)
    ]  # fmt: skip
    try:
        heard = processes if what == "all" else processes[:-1]
        return [process.communicate(timeout=300)[0] for process in heard]
    finally:
        for process in processes:
            process.kill()


@pytest.fixture(scope="module", params=[2, 3, 4])
def processes(request) -> list[str]:
    return outputs_of("all", request.param)


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_in_processes(processes, function) -> None:
    for output in processes:
        assert f"done {function.__name__}\n" in output, output[-3000:]


@pytest.mark.parametrize(
    ("ranks", "how"), [(2, "ends"), (2, "hangs"), (3, "ends"), (3, "is in eval mode")]
)
def test_a_process_is_lost(ranks, how) -> None:
    for output in outputs_of(how, ranks):
        assert "done loses_a_rank\n" in output, output[-3000:]


def test_the_readmes_example_learns_digits(tmp_path) -> None:
    readme = (TESTS.parent / "README.md").read_text()
    (code,) = re.findall(
        r"```python\n(import torch\nimport torch\.distributed.*?)```", readme, re.S
    )
    (tmp_path / "digits.py").write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(TESTS.parent), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         "digits.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    found = re.search(r"([\d.]+)% of the test images are right", run.stdout)
    assert found and float(found[1]) > 90, run.stdout


def test_the_benchmark_runs_in_two_processes(tmp_path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         "-m", "benchmarks", "sync", "--quick", "--out", tmp_path],
        cwd=TESTS.parent, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    assert "bnext.SyncBatchNorm: 22 collectives" in run.stdout, run.stdout
    assert "1024 ranks" in run.stdout
    rows = (tmp_path / "sync.csv").read_text()
    assert "nn.BatchNorm2d + all_reduce" in rows and "predicted exchanges" in rows


def test_the_benchmark_says_how_to_start_it(capsys) -> None:
    from benchmarks.__main__ import main as benchmarks

    assert benchmarks(["sync"]) == 2
    assert "torchrun" in capsys.readouterr().out


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
