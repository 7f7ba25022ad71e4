"""Processes and threads: DDP, FSDP2, checkpoints, SyncBatchNorm, DataLoader workers, shared memory.

The multi-process tests run one group of two gloo processes for all of them, on the CPU.
"""

import concurrent.futures
import copy
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import bnext

TESTS = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")


class Net(nn.Module):
    """Batch norms that are plain, fused and behind one another."""

    def __init__(self, norm: type[nn.Module], act: type[nn.Module]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.bn = norm(8)
        self.act = act(8)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x))
        return self.fc(self.act(x * 2, x).mean((2, 3)))


class AddAct(nn.BatchNorm2d):
    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return torch.relu(super().forward(x) + residual)


def pair() -> tuple[Net, Net]:
    torch.manual_seed(0)
    theirs = Net(nn.BatchNorm2d, AddAct)
    ours = Net(bnext.BatchNorm2d, bnext.BatchNormAct2d)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def train(model: nn.Module, rank: int, steps: int = 3) -> None:
    """Every process has data of its own."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(rank)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 3, 8, 8, generator=generator)).float().square().sum().backward()
        optimizer.step()


def close(a: object, b: object, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def full(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sharded tensors put together; a collective."""
    return {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in state.items()}


def ddp(rank: int) -> None:
    for options in ({}, {"gradient_as_bucket_view": True}, {"static_graph": True}):
        models = [nn.parallel.DistributedDataParallel(m, **options) for m in pair()]
        for model in models:
            train(model, rank)
        close(*(m.state_dict() for m in models))
    assert isinstance(models[0].module.bn, bnext.BatchNorm2d)


def ddp_broadcasts_buffers(rank: int) -> None:
    """Forward begins with the statistics of process 0, which are one step old at most."""
    model = nn.parallel.DistributedDataParallel(pair()[0])
    train(model, rank, 2)
    model.eval()(torch.zeros(1, 3, 8, 8))
    gathered = [torch.empty(8) for _ in range(2)]
    model.train()
    model(torch.zeros(2, 3, 8, 8))
    dist.all_gather(gathered, model.module.bn.running_mean)
    close(*gathered)


def fsdp2(rank: int) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = dist.init_device_mesh("cpu", (2,))
    mixed = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    results = []
    # torch.nn's takes no bfloat16 weight beside float32 statistics on the CPU; ours does.
    for kind, policy in ((0, MixedPrecisionPolicy()), (1, MixedPrecisionPolicy()), (0, mixed)):
        model = pair()[kind]
        fully_shard(model.act, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
        train(model, rank)
        results.append(full(model.state_dict()))
    ours, theirs, ours_mixed = results
    close(ours, theirs)
    close(ours_mixed, theirs, 0.05)
    assert ours_mixed["bn.weight"].dtype == ours_mixed["bn.running_var"].dtype == torch.float32
    assert not torch.equal(ours_mixed["bn.weight"], ours["bn.weight"]), "nothing was in bfloat16"


def checkpoint(rank: int) -> None:
    """torch.distributed.checkpoint of a sharded model of ours, read into torch.nn's, and back."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
    from torch.distributed.fsdp import fully_shard

    folder = [tempfile.mkdtemp()] if rank == 0 else [None]
    dist.broadcast_object_list(folder)
    ours, theirs = pair()
    mesh = dist.init_device_mesh("cpu", (2,))
    for model in (ours, theirs):
        fully_shard(model, mesh=mesh)
    train(ours, 0, 1)  # the same data: of statistics, which are not sharded, one process' are saved
    dcp.save(get_model_state_dict(ours), checkpoint_id=folder[0])
    state = get_model_state_dict(theirs)
    dcp.load(state, checkpoint_id=folder[0])
    set_model_state_dict(theirs, state)
    close(full(ours.state_dict()), full(theirs.state_dict()), 0)
    assert int(theirs.bn.num_batches_tracked) == 1


def main(rank: int, port: str) -> None:
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=port)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    for function in (ddp, ddp_broadcasts_buffers, fsdp2, checkpoint):
        function(rank)
        dist.barrier()
        print("done", function.__name__, flush=True)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes() -> list[str]:
    """The output of both."""
    import socket

    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    environment = {**os.environ, "PYTHONPATH": str(TESTS.parent), "GLOO_SOCKET_IFNAME": "lo"}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), port], cwd=TESTS, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        return [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()


@pytest.mark.parametrize("function", [ddp, ddp_broadcasts_buffers, fsdp2, checkpoint])
def test_in_two_processes(function, two_processes) -> None:
    for output in two_processes:
        assert f"done {function.__name__}\n" in output, output[-3000:]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_sync_batch_norm_without_a_group_is_a_batch_norm(training, device) -> None:
    ours, theirs = (
        k.SyncBatchNorm(3, momentum=None, device=device).train(training) for k in (bnext, nn)
    )
    assert repr(ours) == repr(theirs)
    for _ in range(2):
        x = torch.randn(4, 3, 5, 5, device=device)
        close(ours(x), theirs(x))
    close(ours.state_dict(), theirs.state_dict())


def test_convert_sync_batchnorm_keeps_parameters_and_activations() -> None:
    model = nn.ModuleDict(
        {"plain": bnext.BatchNorm2d(3), "act": bnext.BatchNormAct2d(3, momentum=0.3).eval()}
    )
    act, state = model["act"], dict(model.state_dict(keep_vars=True))
    model = bnext.SyncBatchNorm.convert_sync_batchnorm(model)
    assert all(type(m) is bnext.SyncBatchNorm for m in model.values())
    assert model["act"].momentum == 0.3 and not model["act"].training
    after = model.state_dict(keep_vars=True)
    assert after.keys() == state.keys() and all(after[k] is state[k] for k in state)
    x, residual = torch.randn(2, 2, 3, 4, 4)
    close(model["act"](x, residual), act(x, residual))
    plain = bnext.BatchNorm2d(3, momentum=0.3).eval()
    close(model["act"](x, residual[:1]), torch.relu(plain(x) + residual[:1]))
    assert type(bnext.SyncBatchNorm.convert_sync_batchnorm(bnext.BatchNorm1d(3))) is (
        bnext.SyncBatchNorm
    )


def test_sync_batch_norm_has_an_act_param() -> None:
    old = bnext.SyncBatchNorm(3, act="elu")
    del old.__dict__["act_param"]  # as pickled before there was one
    x = torch.randn(4, 3, 5, 5)
    close(copy.deepcopy(old)(x), nn.functional.elu(nn.BatchNorm2d(3)(x)))
    new = bnext.SyncBatchNorm(3, act="elu", act_param=0.3)
    for module in (new, bnext.SyncBatchNorm.convert_sync_batchnorm(new)):
        assert "act='elu', act_param=0.3)" in repr(module)
    assert "act" not in repr(bnext.SyncBatchNorm(3))


def test_torchs_convert_sync_batchnorm_takes_ours() -> None:
    model = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(bnext.BatchNorm2d(3)))
    assert type(model[0]) is nn.SyncBatchNorm


def test_share_memory() -> None:
    ours, theirs = pair()
    ours.share_memory()
    assert all(t.is_shared() for t in ours.state_dict().values())
    close(ours(torch.ones(2, 3, 8, 8)), theirs(torch.ones(2, 3, 8, 8)))
    assert all(t.is_shared() for t in ours.state_dict().values()), "replaced instead of changed"


def test_threads_share_one_module_in_inference() -> None:
    """The same bits from eight threads at once as from one, with the intra-op pool in use."""
    model = bnext.BatchNormAct2d(16).eval()
    inputs = [torch.randn(4, 16, 40, 40) for _ in range(16)]
    with torch.inference_mode():
        expected = [model(x) for x in inputs]

    def run(x: Tensor) -> Tensor:
        with torch.inference_mode():
            return model(x)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        results = list(pool.map(run, inputs * 4))
    assert all(torch.equal(y, z) for y, z in zip(results, expected * 4, strict=True))


def test_threads_train_modules_of_their_own() -> None:
    def run(seed: int) -> dict[str, Tensor]:
        bn = bnext.BatchNorm2d(8)
        x = torch.randn(4, 8, 20, 20, generator=torch.Generator().manual_seed(seed))
        for _ in range(3):
            bn(x).square().sum().backward()
        return {**bn.state_dict(), "grad": bn.weight.grad}

    expected = [run(seed) for seed in range(4)]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        close(list(pool.map(run, range(4))), expected, 0)


class Normalised(torch.utils.data.Dataset):
    """A batch norm that workers run, as a preprocessing or a feature extractor might."""

    def __init__(self) -> None:
        self.bn = bnext.BatchNorm2d(3).eval()

    def __len__(self) -> int:
        return 6

    def __getitem__(self, i: int) -> Tensor:
        with torch.no_grad():
            return self.bn(torch.full((1, 3, 64, 64), float(i)))[0, 0, 0, 0]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_data_loader_workers(method) -> None:
    """After a call in the parent, whose thread pool a forked child does not have."""
    bnext.BatchNorm2d(3)(torch.randn(8, 3, 64, 64))
    data = Normalised()
    loader = torch.utils.data.DataLoader(
        data, batch_size=3, num_workers=2, multiprocessing_context=method, timeout=60
    )
    close(torch.cat(list(loader)), torch.stack([data[i] for i in range(6)]))


def test_meta_device_and_to_empty(device) -> None:
    """As large models are made: on meta, materialised, initialised, loaded."""
    with torch.device("meta"):
        model = Net(bnext.BatchNorm2d, bnext.BatchNormAct2d)
    assert model(torch.empty(2, 3, 8, 8, device="meta")).shape == (2, 4)
    _, theirs = pair()
    model.to_empty(device=device).load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 8, 8, device=device)
    close(model(x), theirs.to(device)(x))
    with torch.device("meta"):
        assigned = Net(bnext.BatchNorm2d, bnext.BatchNormAct2d)
    assigned.load_state_dict(copy.deepcopy(theirs.state_dict()), assign=True)
    close(assigned(x), theirs(x))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
