"""Command line: the kernel benchmark by default (on a GPU if there is one), others by name."""

import argparse
import sys
from pathlib import Path

try:
    import rich  # noqa: F401
except ModuleNotFoundError as missing:
    print(f"python -m benchmarks: {missing}: pip install 'bnext[bench]'", file=sys.stderr)
    sys.exit(2)
import torch

import bnext
from benchmarks import (
    accuracy,
    arguments,
    cases,
    claims,
    demo,
    dram,
    gpu,
    gpu_clock,
    kernels,
    models,
    overhead,
    predict,
    report,
    resnet50,
    sass,
    summary,
    sync,
    train,
)
from benchmarks.arguments import architecture, at_least, duration, regex
from bnext.verify import Parser, device_argument

DEFAULT_MODES = ["cold graph", "warm graph", "warm eager"]
DEVICE = "cuda" if bnext.build_info()["cuda"] and torch.cuda.is_available() else "cpu"
Facts = dict[str, str]


def _demo(args: argparse.Namespace, facts: Facts) -> int:
    return demo.run(args.out, facts, args.device, args.quick)


def _accuracy(args: argparse.Namespace, facts: Facts) -> int:
    return accuracy.run(args.out, facts, args.device)


def _kernels(args: argparse.Namespace, facts: Facts) -> int:
    shapes = cases.QUICK if args.quick else cases.RESNET50
    batch = args.batch or (4 if args.quick else 32)
    every = cases.resnet50((batch,), args.dtype, args.variant, args.layout, shapes)
    budget_s = (0.05 if args.quick else 0.3) if args.budget is None else args.budget
    some = cases.matching(every, args.filter)
    return kernels.run(args.out, facts, some, budget_s, with_compile=not args.no_compile)


def _gpu(args: argparse.Namespace, facts: Facts) -> int:
    some = cases.matching(cases.quick() if args.quick else cases.full(), args.filter)
    modes = [gpu_clock.MODES[name] for name in args.mode]
    budget_ms = (1.0 if args.quick else 6.0) if args.budget is None else args.budget
    return gpu.run(
        args.out, facts, some, args.device, modes, budget_ms / 1e3, args.minutes,
        not args.no_compile,
    )  # fmt: skip


def _resnet50(args: argparse.Namespace, facts: Facts) -> int:
    on_gpu = args.device.type == "cuda"
    batch = args.batch or (4 if args.quick else 256 if on_gpu else 8)
    size = args.size or (64 if args.quick else 224 if on_gpu else 128)
    budget_s = 0.0 if args.quick else 20.0
    network = resnet50.Settings(args.device, batch, size, 5 if on_gpu else 1, budget_s)
    return resnet50.run(args.out, facts, network, args.minutes, not args.no_compile)


def _models(args: argparse.Namespace, facts: Facts) -> int:
    budget_s = (0.0 if args.quick else 3.0) if args.budget is None else args.budget
    return models.run(args.out, facts, args.filter, args.quick, budget_s)


def _sync(args: argparse.Namespace, facts: Facts) -> int:
    return sync.run(args.out, facts, args.batch or (2 if args.quick else 8), args.quick)


def _dram(args: argparse.Namespace, facts: Facts) -> int:
    if args.workload:
        return dram.workload(args.device)
    return dram.run(args.out, facts, args.device)


def _overhead(args: argparse.Namespace, facts: Facts) -> int:
    return overhead.run(args.out, facts, *((11, 20) if args.quick else (101, 300)))


def _claims(args: argparse.Namespace, facts: Facts) -> int:
    seeds = args.seeds or (2 if args.quick else 5)
    return claims.run(args.out, facts, args.only, args.data, seeds, args.quick)


def _parser() -> argparse.ArgumentParser:
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument(
        "--out", type=Path, default=Path("build/benchmarks"), help="folder to write (%(default)s)"
    )
    shared.add_argument("--quick", action="store_true", help="smoke test, its figures mean nothing")
    shared.add_argument("--threads", type=at_least(1), help="of torch's pool")

    parser = Parser(
        "python -m benchmarks",
        description="Without a command: gpu where there is one, else kernels. All have --help.",
    )
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, module: object, run: object) -> argparse.ArgumentParser:
        added = commands.add_parser(name, parents=[shared], help=module.__doc__)
        added.set_defaults(run=run)
        return added

    shown = command("demo", demo, _demo)
    exact = command("accuracy", accuracy, _accuracy)
    for each in shown, exact:
        each.add_argument("--device", type=device_argument, default=DEVICE, help="(%(default)s)")
    kernel = command("kernels", kernels, _kernels)
    kernel.add_argument("--batch", type=at_least(1), help="images (default 32; 4 with --quick)")
    dtypes = ["float32", "bfloat16"]
    kernel.add_argument("--dtype", nargs="+", default=dtypes, choices=cases.DTYPES)
    kernel.add_argument("--layout", nargs="+", default=cases.LAYOUTS, choices=cases.LAYOUTS)
    kinds = [name for name in cases.VARIANTS if name != "frozen"]
    kernel.add_argument("--variant", nargs="+", default=kinds, choices=cases.VARIANTS)
    kernel.add_argument(
        "--filter", type=regex, default="", help="regular expression, as in '64x56.*bfloat16'"
    )
    kernel.add_argument("--budget", type=duration, help="seconds per case, direction and allocator")
    kernel.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    tables = command("summary", summary, lambda args, facts: summary.run(args.out, args.file))
    tables.add_argument("file", type=Path, help="a kernels.csv")
    on_gpu = command("gpu", gpu, _gpu)
    on_gpu.add_argument(
        "--device", type=device_argument, default="cuda", help="cuda, cuda:1; cpu: a smoke test"
    )
    on_gpu.add_argument(
        "--filter", type=regex, default="", help="regular expression, as in '^64x.*bfloat16'"
    )
    on_gpu.add_argument("--mode", nargs="+", default=DEFAULT_MODES, choices=gpu_clock.MODES)
    on_gpu.add_argument("--budget", type=duration, help="milliseconds per measurement")
    on_gpu.add_argument(
        "--minutes", type=duration, default=6.0, help="for everything (%(default)s)"
    )
    on_gpu.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    network = command("resnet50", resnet50, _resnet50)
    network.add_argument(
        "--device", type=device_argument, default="cuda", help="or cpu, cuda:1 (%(default)s)"
    )
    network.add_argument("--batch", type=at_least(1), help="images (default 256; 8 on a CPU)")
    network.add_argument(
        "--size", type=at_least(1), help="of the square images (default 224; 128 on a CPU)"
    )
    network.add_argument("--minutes", type=duration, default=9.0, help="for all (%(default)s)")
    network.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    others = command("models", models, _models)
    others.add_argument(
        "--filter", type=regex, default="", help="regular expression, as in '^timm res'"
    )
    others.add_argument("--budget", type=duration, help="seconds of training steps per model")
    traffic = command("dram", dram, _dram)
    traffic.add_argument("--device", type=device_argument, default="cuda", help="(%(default)s)")
    traffic.add_argument("--workload", action="store_true", help="what ncu is to look at")
    training = command(
        "train", train,
        lambda args, facts: train.run(args.out, facts, args.epochs or (2 if args.quick else 15)),
    )  # fmt: skip
    training.add_argument(
        "--epochs", type=at_least(1), help="passes over the training set (default 15)"
    )
    counted = command("sass", sass, lambda args, facts: sass.run(args.out, args.arch, args.filter))
    counted.add_argument("--arch", nargs="+", type=architecture, default=[sass.ARCH])
    counted.add_argument(
        "--filter", type=regex, default="", help="regular expression of kernels to print"
    )
    processes = command("sync", sync, _sync)
    processes.add_argument("--batch", type=at_least(1), help="images of each process (default 8)")
    command("predict", predict, lambda args, facts: predict.run(args.out))
    command("overhead", overhead, _overhead)
    paper = command("claims", claims, _claims)
    names = [*claims.EXPERIMENTS]
    paper.add_argument("--only", nargs="+", default=names, choices=names, help="some of them")
    paper.add_argument(
        "--data", type=Path, help="folder of MNIST or CIFAR-10 (default: scikit-learn's digits)"
    )
    paper.add_argument(
        "--seeds", type=at_least(2), help="runs of each kind (default 5; 2 with --quick)"
    )
    return parser


def main(argv: list[str]) -> int:
    if not argv or (argv[0].startswith("-") and argv[0] not in ("-h", "--help")):
        argv = ["gpu" if DEVICE == "cuda" else "kernels", *argv]
    args = _parser().parse_args(argv)
    # The small network's step on 8x8 images takes 3 ms on one thread, but 20 ms on two threads of
    # two busy cores, which wait for each other.
    if args.threads or args.command in ("overhead", "claims"):
        torch.set_num_threads(args.threads or 1)
    try:
        arguments.check_writable(args.out)
        status: int = args.run(args, report.provenance(args.quick))
    except arguments.BadArgumentError as error:
        print(f"python -m benchmarks {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nInterrupted. What was measured is in {args.out}.", file=sys.stderr)
        return 130
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
