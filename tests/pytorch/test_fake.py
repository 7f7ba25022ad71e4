"""The ops on tensors without memory against the ops on real ones: same verdict, words, outputs."""

import math
import random
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

import bnext  # noqa: F401  (registers the ops)
import masks

OPS = {
    "train": torch.ops.bnext.batch_norm_train.default,
    "inference": torch.ops.bnext.batch_norm_inference.default,
    "backward": torch.ops.bnext.batch_norm_backward.default,
    "double_backward": torch.ops.bnext.batch_norm_double_backward.default,
    "moments": torch.ops.bnext.batch_norm_moments.default,
    "join": torch.ops.bnext.batch_norm_join.default,
    "apply": torch.ops.bnext.batch_norm_apply.default,
    "backward_sums": torch.ops.bnext.batch_norm_backward_sums.default,
    "backward_apply": torch.ops.bnext.batch_norm_backward_apply.default,
}
f16, f32, f64, bf16 = torch.float16, torch.float32, torch.float64, torch.bfloat16
# name -> (shape, memory format, dtype, dtype of parameters)
INPUTS = {
    "nc": ((4, 3), torch.contiguous_format, f32, f32),
    "nchw": ((2, 3, 5, 2), torch.contiguous_format, f64, f64),
    "nhwc": ((2, 3, 5, 2), torch.channels_last, bf16, f32),
    "one image, nhwc": ((1, 3, 5, 2), torch.channels_last, f16, f16),
    "ndhwc": ((2, 3, 2, 5, 2), torch.channels_last_3d, f32, f32),
    "one channel": ((2, 1, 5), torch.contiguous_format, f32, f32),
    "one pixel": ((4, 9, 1, 1), torch.contiguous_format, f32, f32),
    "empty": ((0, 3, 5, 2), torch.channels_last, f32, f32),
    "no channels": ((4, 0, 2), torch.contiguous_format, f32, f32),
    "empty, 1-D": ((0,), torch.contiguous_format, f32, f32),
}
Args = list[object]
MODE = FakeTensorMode()


def mask_of(x: Tensor) -> Tensor:
    """A mask of the right shape for x, by the op that writes it."""
    c = x.shape[1] if x.dim() > 1 else 0
    stats = torch.zeros(c, dtype=x.dtype)
    return OPS["inference"](x, None, None, stats, stats, 1e-5, x, 1, 0.0, True)[1]


def arguments(name: str, op: str, frozen: bool) -> Args:
    shape, memory_format, dtype, param_dtype = INPUTS[name]
    x = torch.randn(shape).to(dtype)
    if len(shape) > 3:
        x = x.contiguous(memory_format=memory_format)
    c = shape[1] if len(shape) > 1 else 0

    def param() -> Tensor:
        return torch.ones(c, dtype=param_dtype)

    head = [x, param(), param(), param(), param()]
    residual = torch.randn_like(x)
    added = [residual, 1, 0.0, True]
    if op == "train":
        counter = torch.zeros((), dtype=torch.int64)
        return [*head, counter, 0.1, 1e-5, *added]
    if op == "inference":
        return [*head, 1e-5, *added]
    if op == "moments":
        return [x, 1e-5]
    if op == "join":
        joined = [torch.ones(2, 3, c, dtype=f64), torch.ones(2, dtype=f64)]
        return [x, *joined, param(), param(), torch.zeros((), dtype=torch.int64), 0.1, 1e-5]
    stats = torch.ones(3, c, dtype=f64)
    if op == "apply":
        return [*head[:3], stats, *added]
    if op in ("backward_sums", "backward_apply"):
        means = [torch.ones(2, c, dtype=f64)] if op == "backward_apply" else []
        flags = [True, True] if op == "backward_apply" else []
        return [torch.randn_like(x), x, param(), stats, *means, param(), residual, mask_of(x), 1,
                0.0, *flags]  # fmt: skip
    save_stats = None if frozen else stats
    running = [param(), param()] if frozen else [None, None]
    saved = [torch.randn_like(x), x, param(), save_stats, 1e-5, *running, param(), residual,
             mask_of(x), 1, 0.0]  # fmt: skip
    if op == "backward":
        return [*saved, True, True, True, True]
    grads = [torch.randn_like(x), param(), param(), torch.randn_like(x)]
    return [*grads, *saved, True, True, True]


def other_device(t: Tensor) -> Tensor:
    return t.to("meta" if t.device.type == "cpu" else "cpu")


def strided(t: Tensor) -> Tensor:
    """The same shape, its memory with gaps."""
    return t.new_zeros([*t.shape, 2])[..., 0]


MUTATIONS: dict[str, Callable[[Tensor], Tensor | None]] = {
    "absent": lambda t: None,
    **{
        str(dtype): lambda t, dtype=dtype: torch.empty_like(t, dtype=dtype)
        for dtype in (torch.int64, torch.int16, torch.uint8, torch.bool, torch.complex64,
                      torch.float8_e4m3fn, torch.uint16, torch.uint4, torch.bits8, f16, f32, f64,
                      bf16)
    },
    "on another device": other_device,
    "scalar": lambda t: t.new_zeros(()),
    "1-D": lambda t: t.new_zeros(5),
    "one value": lambda t: t.new_zeros(1),
    "flat": lambda t: t.reshape(-1),
    "[1, ...]": lambda t: t.unsqueeze(0),
    "[..., 1]": lambda t: t.unsqueeze(-1),
    "one more": lambda t: t.new_zeros([s + 1 for s in t.shape]),
    "one fewer": lambda t: t.new_zeros([max(s - 1, 0) for s in t.shape]),
    "one more channel": lambda t: t.new_zeros([s + (d == 1) for d, s in enumerate(t.shape)]),
    "without rows": lambda t: t[:0] if t.dim() else t,
    "strided": strided,
    "expanded": lambda t: t.new_zeros([1] * t.dim()).expand(t.shape),
    "other order": lambda t: t.new_zeros(t.shape[::-1]).permute(list(range(t.dim()))[::-1]),
    "[2, 3] of 6": lambda t: t.new_zeros(2, 3),
    "[2, 3] of 6, other order": lambda t: t.new_zeros(3, 2).t(),
    "[1, C] with gaps": lambda t: t.new_zeros(1, 2 * t.numel())[:, ::2],
}  # fmt: skip


def mutated(args: Args, rng: random.Random) -> tuple[str, int, Args]:
    """One argument changed: by what, which, the arguments."""
    args = list(args)
    while True:
        i = rng.randrange(len(args))
        if isinstance(args[i], Tensor):
            how = rng.choice(list(MUTATIONS))
            args[i] = MUTATIONS[how](args[i])
            return how, i, args
        if isinstance(args[i], bool):
            args[i] = not args[i]
            return "flag", i, args
        if isinstance(args[i], int):
            args[i] = rng.choice([-1, 0, 2, 4, 99])
            return f"kind {args[i]}", i, args


def described(result: object) -> object:
    tensors = result if isinstance(result, tuple) else (result,)
    return [
        None if t is None else (t.dtype, tuple(t.shape), t.stride() if t.numel() else None)
        for t in tensors
    ]


def outcome(op: object, args: Args) -> object:
    try:
        return described(op(*args))
    except Exception as error:
        return type(error), str(error)


def verdicts(op: object, args: Args) -> Iterator[tuple[str, object]]:
    """What the op says of the arguments as they are, fake, and on the meta device."""
    yield "real", outcome(op, args)
    with MODE:
        fakes = [MODE.from_tensor(a) if isinstance(a, Tensor) else a for a in args]
        yield "fake", outcome(op, fakes)
    if all(a.is_cpu for a in args if isinstance(a, Tensor)):
        yield "meta", outcome(op, to_meta(args))


def to_meta(args: Args) -> Args:
    return [
        torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device="meta")
        if isinstance(a, Tensor) else a
        for a in args
    ]  # fmt: skip


def check(op: object, args: Args, where: str) -> object:
    (_, real), *others = verdicts(op, args)
    for name, other in others:
        if not (isinstance(other, list) and has_the_mask_of_another_format(op, args, real)):
            assert other == real, f"{where}\n{name}: {other}\nreal: {real}"
    return real


def has_the_mask_of_another_format(op: object, args: Args, real: object) -> bool:
    """What a tensor without memory accepts on purpose: Inductor asks in the wrong format first."""
    if not (isinstance(real, tuple) and "mask: expected contiguous Byte" in real[1]):
        return False
    places = {"backward": 9, "double_backward": 13, "backward_sums": 6, "backward_apply": 7}
    name = next(name for name in places if OPS[name] is op)
    x, mask = args[5 if name == "double_backward" else 1], args[places[name]]
    assert isinstance(x, Tensor) and isinstance(mask, Tensor)
    n, c, hw = x.shape[0], x.shape[1], math.prod(x.shape[2:])
    sizes = {n * c * masks.row_bytes_of(c, hw, False), n * hw * masks.row_bytes_of(c, hw, True)}
    return x.dim() > 3 and mask.dtype == torch.uint8 and mask.numel() in sizes


OP_KINDS = [("train", False), ("inference", False), ("backward", False), ("backward", True),
            ("double_backward", False), ("double_backward", True), ("moments", False),
            ("join", False), ("apply", False), ("backward_sums", False),
            ("backward_apply", False)]  # fmt: skip


@pytest.mark.parametrize(("op", "frozen"), OP_KINDS)
@pytest.mark.parametrize("name", INPUTS)
def test_a_right_call_is_accepted_everywhere(name, op, frozen) -> None:
    result = check(OPS[op], arguments(name, op, frozen), name)
    assert isinstance(result, list), result


@pytest.mark.parametrize(("op", "frozen"), OP_KINDS)
@pytest.mark.parametrize("name", ["nhwc", "empty"])
def test_each_argument_changed_in_each_way(name, op, frozen) -> None:
    right = arguments(name, op, frozen)
    refused = 0
    for i, argument in enumerate(right):
        if not isinstance(argument, Tensor):
            continue
        for how, change in MUTATIONS.items():
            args = list(right)
            args[i] = change(argument)
            if not any(isinstance(a, Tensor) for a in args):
                continue  # the dispatcher does not know whom to ask
            result = check(OPS[op], args, f"{op} of {name}, argument {i} {how}")
            refused += isinstance(result, tuple)
    assert refused > (5 if op == "moments" else 20), "most changes are refused"


@pytest.mark.parametrize(("op", "frozen"), [kind for kind in OP_KINDS if kind[0] != "moments"])
def test_several_arguments_changed_at_random(op, frozen) -> None:
    rng = random.Random(3)
    for _ in range(80):
        name = rng.choice(list(INPUTS))
        args = arguments(name, op, frozen)
        hows = []
        for _ in range(rng.randint(1, 3)):
            how, i, args = mutated(args, rng)
            hows.append((i, how))
        check(OPS[op], args, f"{op} of {name}, {hows}")


def call_all(x: Tensor, param: Tensor) -> tuple[Tensor, Tensor]:
    """Training and its derivatives, one from the other."""
    y, save_stats, mask = OPS["train"](
        x, param, param, None, None, None, 0.1, 1e-5, x, 1, 0.0, True
    )
    saved = (y, x, param, save_stats, 1e-5, None, None, param, None, mask, 1, 0.0)
    OPS["backward"](*saved, True, True, True, True)
    OPS["double_backward"](y, None, None, None, *saved, True, True, True)
    given = (param, None, mask, 1, 0.0)
    OPS["moments"](x, 1e-5)
    OPS["apply"](x, param, param, save_stats, x, 1, 0.0, True)
    sums = OPS["backward_sums"](y, x, param, save_stats, *given)
    OPS["backward_apply"](y, x, param, save_stats, sums, *given, True, True)
    return y, mask


@pytest.mark.parametrize("dims", [2, 3, 4, 5])
@pytest.mark.parametrize("last", [False, True], ids=["", "channels_last"])
def test_symbolic_sizes_are_not_guarded(last, dims) -> None:
    """What is compiled for one batch serves the next."""
    x = torch.randn(4, 8, 5, 6, 7)[(slice(None),) * dims + (0,) * (5 - dims)].contiguous()
    if last:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    env = ShapeEnv()
    with FakeTensorMode(shape_env=env) as mode:
        sizes = [DimDynamic.STATIC if d == 1 else DimDynamic.DYNAMIC for d in range(dims)]
        fake = mode.from_tensor(x, symbolic_context=StatelessSymbolicContext(sizes))
        static = StatelessSymbolicContext([DimDynamic.STATIC])
        y, _ = call_all(fake, mode.from_tensor(torch.ones(8), symbolic_context=static))
        assert y.shape == fake.shape
        assert not env.guards


def test_sizes_that_are_not_known_are_checked_when_the_graph_runs() -> None:
    env = ShapeEnv()
    with FakeTensorMode(shape_env=env):
        n, h = env.create_unbacked_symint(), env.create_unbacked_symint()
        torch._check(n >= 2)
        torch._check(h >= 2)
        contiguous = torch.empty(n, 8, h, h + 1)
        y, mask = call_all(contiguous, torch.ones(8))
        assert y.stride() == contiguous.stride() and mask.shape[0] == n * 8
        channels_last = torch.empty_strided((n, 8, h, h), (8 * h * h, 1, 8 * h, 8))
        y, mask = call_all(channels_last, torch.ones(8))
        assert y.stride()[1] == 1 and mask.shape == (n * h * h, 1)
        OPS["train"](
            torch.empty(2, 8, 3), torch.empty(n), None, None, None, None, 0.1, 1e-5
        )  # fmt: skip
        deferred = [str(a.expr) for found in env.deferred_runtime_asserts.values() for a in found]
        assert "Eq(u0, 8)" in deferred


@pytest.mark.parametrize("how", ["aot_eager", "export"])
def test_a_wrong_channel_count_is_refused_when_traced(how) -> None:
    class Norm(torch.nn.Module):
        def forward(self, x: Tensor, weight: Tensor) -> Tensor:
            output: Tensor = OPS["train"](x, weight, None, None, None, None, 0.1, 1e-5)[0]
            return output

    args = torch.randn(4, 3, 5), torch.ones(4)
    with pytest.raises(Exception, match="weight should contain 3 elements not 4"):
        if how == "export":
            torch.export.export(Norm(), args)
        else:
            torch.compile(Norm(), backend="aot_eager", fullgraph=True)(*args)
