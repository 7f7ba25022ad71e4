"""Fixtures of the suite: devices, seeds, the thread count, hypothesis' profile."""

import os
from collections.abc import Iterator

# Threads that spin between thousands of tiny operations starve whatever else the machine runs.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# A graph that an earlier version compiled would hide what this one's cannot be compiled for.
os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile(
    "bnext",
    deadline=None,
    max_examples=60,
    derandomize=bool(os.environ.get("CI")),
    suppress_health_check=[
        hypothesis.HealthCheck.function_scoped_fixture,
        hypothesis.HealthCheck.too_slow,
    ],
)
hypothesis.settings.load_profile("bnext")


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every test that takes it runs on both; FAIL_WITHOUT_CUDA=1 makes a missing GPU an error."""
    if request.param == "cuda" and not (torch.cuda.is_available() and _built_for_cuda()):
        reason = "needs a CUDA device, a CUDA torch and CUDA kernels in bnext._C"
        if os.environ.get("FAIL_WITHOUT_CUDA") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(20150211)


@pytest.fixture(autouse=True)
def _thread_count_restored() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


def _built_for_cuda() -> bool:
    import bnext

    return bool(bnext.build_info()["cuda"])
