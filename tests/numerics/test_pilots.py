"""The value that sums are taken about: where it is read, what a bad one costs, and that no usual
data has one. Errors are in units of rounding (`criterion.units`).
"""

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import criterion
from bnext import _C
from bnext.functional import batch_norm

LAYOUTS = ["nchw", "short rows", "channels last"]


def place(values: Tensor, layout: str) -> Tensor:
    """[N, C] -> an input with those values in each channel, in the order of memory."""
    n, c = values.shape
    if layout == "channels last":
        return values.contiguous()
    width = 7 if layout == "short rows" else 4096
    if n % width:
        width = n
    return values.view(n // width, width, c).transpose(1, 2).contiguous()


def channels(x: Tensor) -> Tensor:
    """The inverse of `place`."""
    return x if x.dim() == 2 else x.transpose(1, 2).flatten(0, 1)


def mantissas(count: int) -> Tensor:
    return 1 + (torch.arange(count, dtype=torch.float64) + 0.37) / count


def statistics(x: Tensor, eps: float = 1e-5) -> tuple[Tensor, Tensor, Tensor]:
    mean, var = torch.zeros(2, x.shape[1], dtype=x.dtype)
    y = batch_norm(x, mean, var, training=True, momentum=1.0, eps=eps)
    return y, mean, var


def assert_exact(x: Tensor, var_units: float = 6, y_units: float = 4, eps: float = 1e-5) -> None:
    y, _, var = statistics(x, eps)
    one = torch.ones(x.shape[1], dtype=x.dtype)
    expected = criterion.exact(x, one, 0 * one, x, eps)
    assert criterion.units(var, expected.var).max() <= var_units
    assert criterion.units(y, expected.output).max() <= y_units


def slow(call: Callable[[], object]) -> int:
    """How many channels a call sums again."""
    before = _C.slow_channels()
    call()
    return _C.slow_channels() - before


def sampled(values: int, layout: str) -> list[int]:
    """Which of a channel's values make its pilot."""
    width = {"nchw": 4096, "short rows": 7, "channels last": 1}[layout]
    width = width if values % width == 0 else values
    runs = width >= 16 and values >= 784
    places = 64 if width == 1 and values >= 4096 else 8 if runs else 32
    first = [
        math.floor(values * (k + math.modf(0.6180339887498949 * k + 0.5)[0]) / places)
        for k in range(places)
    ]
    return [i // width * width + min(i % width, width - 16) if runs else i for i in first]


@pytest.fixture
def set_pilots() -> Iterator[Callable[[list[float]], None]]:
    yield _C.set_pilots
    _C.set_pilots([])


@pytest.mark.parametrize("kind", ["constant", "masked", "two values"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("n", [37, 98, 784, 4096, 4097, 50176])
def test_one_signed_gradients(n, layout, kind) -> None:
    x = place(torch.randn(n, 50), layout)
    half = torch.rand(n, 50) < 0.5
    factor = {"constant": 1.0, "masked": half, "two values": torch.where(half, 1.0, 1.7)}[kind]
    dy = place((mantissas(50) * factor).expand(n, 50).float(), layout)
    bias = torch.zeros(50, requires_grad=True)
    y = batch_norm(x, None, None, None, bias, True)
    (dbias,) = torch.autograd.grad(y, bias, dy)
    values = channels(dy).double()
    expected = values.sum(0).numpy(), values.abs().sum(0).numpy()
    assert criterion.units(dbias, expected).max() <= 4


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("n", [784, 4096, 25088])
def test_structured_inputs(n, layout) -> None:
    alternating = (torch.arange(n) % 2).double()[:, None].expand(n, 16)
    for values in (
        torch.where(torch.rand(n, 16) < 0.5, 1.0, 3.0).double(),
        (torch.rand(n, 16) < 0.05).double(),
        (torch.rand(n, 16) < 1e-3).double(),
        alternating,
        torch.linspace(0, 1, n, dtype=torch.float64)[:, None].expand(n, 16),
    ):
        assert_exact(place((values * mantissas(16)).float(), layout))


@pytest.mark.parametrize("q", [0.9, 1.1, 16, 1e4, 1e10])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("n", [98, 4096, 25088])
def test_a_bad_pilot_is_found_and_costs_nothing(n, layout, q, set_pilots) -> None:
    """Of a mean that is sqrt(q) standard deviations away."""
    x = place(torch.randn(n, 16) + 3, layout)
    values = channels(x).double()
    pilots = values.mean(0) - math.sqrt(q) * values.std(0, unbiased=False)
    set_pilots(pilots.tolist())
    assert slow(lambda: assert_exact(x)) == (16 if q > 1 else 0)


def drift(n: int, c: int) -> Tensor:
    return torch.randn(n, c) + torch.linspace(-5, 5, n)[:, None]


def smooth(n: int, c: int) -> Tensor:
    """Neighbours are alike."""
    t = torch.randn(n // 14 + 2, c).repeat_interleave(14, 0)[:n]
    return t + 0.1 * torch.randn(n, c)


def rows_of(value: float, share: float) -> Callable[[int, int], Tensor]:
    """Normal values of which the first are others: padding, a first line, a first image."""

    def values(n: int, c: int) -> Tensor:
        t = torch.randn(n, c)
        t[: max(1, int(n * share))] += value
        return t

    return values


# name -> values, and how many of 10,000 channels may be summed twice
USUAL: dict[str, tuple[Callable[[int, int], Tensor], int]] = {
    "normal": (torch.randn, 0),
    "relu, 95 % zeros": (lambda n, c: torch.relu(torch.randn(n, c) - 1.645), 10),
    "smooth": (smooth, 10),
    "padding": (rows_of(-3, 0.2), 10),
    "first line": (rows_of(-5, 1 / 28), 10),
    "first image": (rows_of(10, 1 / 24), 10),
    "drift": (drift, 10),
    "sorted": (lambda n, c: torch.randn(n, c).sort(0).values, 10),
}


@pytest.mark.parametrize("kind", USUAL)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("n", [98, 784, 4096, 25088])
def test_usual_data_is_summed_once(n, layout, kind) -> None:
    values, allowed = USUAL[kind]
    c = min(10_000, 4_000_000 // n)
    x = place(values(n, c), layout)
    assert slow(lambda: statistics(x)) <= allowed * math.ceil(c / 1000) / 10


@pytest.mark.parametrize("size", [3, 1e3, 1e10, 1e18, 1e30])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("n", [98, 784, 4096])
def test_outliers(n, layout, size) -> None:
    for places in ([0], range(8), [sampled(n, layout)[3]]):
        values = torch.randn(n, 16)
        values[list(places)] = size
        assert_exact(place(values, layout))


@pytest.mark.parametrize("constant", [1.0, -0.1, 3e38, -1e30, 1e-38, 1.4e-45])
@pytest.mark.parametrize("n", [2, 3, 7, 98, 100, 784])
def test_a_constant_gives_exactly_the_bias(n, constant) -> None:
    bias = torch.randn(5)
    for layout in LAYOUTS:
        x = place(torch.full((n, 5), constant), layout)
        y = batch_norm(x, None, None, None, bias, True)
        assert torch.equal(channels(y), bias.expand(n, 5))


@pytest.mark.parametrize("flushed", [False, True], ids=["denormals", "flushed"])
@pytest.mark.parametrize("eps", [1e-5, 1e-40])
@pytest.mark.parametrize("scale", [1e18, 3e18, 1e19, 1e30, 2.0**-56, 2.0**-60, 2.0**-68])
def test_squares_that_leave_float32(scale, eps, flushed) -> None:
    if flushed and not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush denormals")
    try:
        for layout in LAYOUTS:
            x = place(torch.randn(784, 8) * scale, layout)
            y, mean, _ = statistics(x, eps)
            one = torch.ones(8)
            expected = criterion.exact(x, one, 0 * one, x, eps)
            assert criterion.units(mean, expected.mean).max() <= 4
            assert criterion.units(y, expected.output).max() <= 4
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("flushed", [False, True], ids=["denormals", "flushed"])
@pytest.mark.parametrize("scale", [2.0**-100, 2.0**-122])
def test_products_that_leave_float32(scale, flushed) -> None:
    if flushed and not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush denormals")
    try:
        for layout in LAYOUTS:
            x = place(torch.randn(784, 8), layout)
            dy = place(torch.randn(784, 8) * scale, layout)
            weight = torch.full((8,), 1e20, requires_grad=True)
            y = batch_norm(x, None, None, weight, None, True)
            (dweight,) = torch.autograd.grad(y, weight, dy)
            expected = criterion.exact(x, weight.detach(), torch.zeros(8), dy)
            assert criterion.units(dweight, expected.weight).max() <= 4
    finally:
        torch.set_flush_denormal(False)


def test_a_gradient_of_zeros_is_not_slow() -> None:
    x = torch.randn(64, 8, 14, 14)
    weight = torch.ones(8, requires_grad=True)
    y = batch_norm(x, None, None, weight, None, True)
    assert slow(lambda: torch.autograd.grad(y, weight, torch.zeros_like(y))) == 0


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("n", [98, 4096])
def test_neighbours_of_what_is_not_finite_keep_their_bits(n, layout, bad) -> None:
    clean = torch.randn(n, 16)
    expected = channels(statistics(place(clean, layout))[0])
    others = [c for c in range(16) if c != 5]
    for at in (0, n // 2, n - 1, sampled(n, layout)[2]):
        values = clean.clone()
        values[at, 5] = bad
        y = channels(statistics(place(values, layout))[0])
        assert y[:, 5].isnan().all()
        assert torch.equal(y[:, others], expected[:, others])
