"""Command line: the kernel benchmark by default (on a GPU if there is one), others by name."""

import argparse
import sys
from pathlib import Path

import torch

import bnext
from benchmarks import (
    cases,
    claims,
    dram,
    gpu,
    gpu_clock,
    kernels,
    models,
    overhead,
    predict,
    resnet50,
    sass,
    sync,
    train,
)

DEFAULT_MODES = ["cold graph", "warm graph", "warm eager"]


def _parser() -> argparse.ArgumentParser:
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument(
        "--out", type=Path, default=Path("build/benchmarks"), help="folder to write"
    )
    shared.add_argument("--quick", action="store_true", help="smoke test, its figures mean nothing")
    shared.add_argument("--threads", type=int, help="of torch's pool")

    parser = argparse.ArgumentParser(
        "python -m benchmarks",
        description="Without a command: gpu where there is one, else kernels. All have --help.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    kernel = commands.add_parser("kernels", parents=[shared], help=kernels.__doc__)
    kernel.add_argument("--batch", type=int, help="images (default 32; 4 with --quick)")
    dtypes = ["float32", "bfloat16"]
    kernel.add_argument("--dtype", nargs="+", default=dtypes, choices=cases.DTYPES)
    kernel.add_argument("--layout", nargs="+", default=cases.LAYOUTS, choices=cases.LAYOUTS)
    kinds = [name for name in cases.VARIANTS if name != "frozen"]
    kernel.add_argument("--variant", nargs="+", default=kinds, choices=cases.VARIANTS)
    kernel.add_argument("--filter", default="", help="regular expression, as in '64x56.*bfloat16'")
    kernel.add_argument("--budget", type=float, help="seconds per case, direction and allocator")
    kernel.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    on_gpu = commands.add_parser("gpu", parents=[shared], help=gpu.__doc__)
    on_gpu.add_argument("--device", default="cuda", help="cuda, cuda:1, ...; cpu: a smoke test")
    on_gpu.add_argument("--filter", default="", help="regular expression, as in '^64x.*bfloat16'")
    on_gpu.add_argument("--mode", nargs="+", default=DEFAULT_MODES, choices=gpu_clock.MODES)
    on_gpu.add_argument("--budget", type=float, help="milliseconds per measurement")
    on_gpu.add_argument("--minutes", type=float, default=6.0, help="for everything (%(default)s)")
    on_gpu.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    network = commands.add_parser("resnet50", parents=[shared], help=resnet50.__doc__)
    network.add_argument("--device", default="cuda", help="cuda, cuda:1, ..., cpu (default cuda)")
    network.add_argument("--batch", type=int, help="images (default 256; 8 on a CPU)")
    network.add_argument(
        "--size", type=int, help="of the square images (default 224; 128 on a CPU)"
    )
    network.add_argument("--minutes", type=float, default=9.0, help="for all (%(default)s)")
    network.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    others = commands.add_parser("models", parents=[shared], help=models.__doc__)
    others.add_argument("--filter", default="", help="regular expression, as in '^timm res'")
    others.add_argument("--budget", type=float, help="seconds of training steps per model")
    traffic = commands.add_parser("dram", parents=[shared], help=dram.__doc__)
    traffic.add_argument("--workload", action="store_true", help="what ncu is to look at")
    training = commands.add_parser("train", parents=[shared], help=train.__doc__)
    training.add_argument("--epochs", type=int, help="passes over the training set (default 15)")
    counted = commands.add_parser("sass", parents=[shared], help=sass.__doc__)
    counted.add_argument("--arch", nargs="+", default=[sass.ARCH], help="as for nvcc")
    counted.add_argument("--filter", default="", help="regular expression of kernels to print")
    processes = commands.add_parser("sync", parents=[shared], help=sync.__doc__)
    processes.add_argument("--batch", type=int, help="images of each process (default 8)")
    commands.add_parser("predict", parents=[shared], help=predict.__doc__)
    commands.add_parser("overhead", parents=[shared], help=overhead.__doc__)
    paper = commands.add_parser("claims", parents=[shared], help=claims.__doc__)
    names = [*claims.EXPERIMENTS]
    paper.add_argument("--only", nargs="+", default=names, choices=names, help="some of them")
    paper.add_argument(
        "--data", type=Path, help="folder of MNIST or CIFAR-10 (default: scikit-learn's digits)"
    )
    paper.add_argument("--seeds", type=int, help="runs of each kind (default 5; 2 with --quick)")
    return parser


def main(argv: list[str]) -> int:
    if not argv or (argv[0].startswith("-") and argv[0] not in ("-h", "--help")):
        has_gpu = bnext.build_info()["cuda"] and torch.cuda.is_available()
        argv = ["gpu" if has_gpu else "kernels", *argv]
    args = _parser().parse_args(argv)
    # The small network's step on 8x8 images takes 3 ms on one thread, but 20 ms on two threads of
    # two busy cores, which wait for each other.
    if args.threads or args.command in ("overhead", "claims"):
        torch.set_num_threads(args.threads or 1)
    if args.command == "train":
        return train.run(args.out, epochs=args.epochs or (2 if args.quick else 15))
    if args.command == "overhead":
        return overhead.run(args.out, *((11, 20) if args.quick else (101, 300)))
    if args.command == "claims":
        seeds = (2 if args.quick else 5) if args.seeds is None else args.seeds
        return claims.run(args.out, args.only, args.data, seeds, args.quick)
    if args.command == "resnet50":
        device = torch.device(args.device)
        on_gpu = device.type == "cuda"
        batch = args.batch or (4 if args.quick else 256 if on_gpu else 8)
        size = args.size or (64 if args.quick else 224 if on_gpu else 128)
        network = resnet50.Settings(
            device, batch, size, 5 if on_gpu else 1, 0 if args.quick else 20
        )
        return resnet50.run(args.out, network, args.minutes, not args.no_compile)
    if args.command == "models":
        budget_s = (0.0 if args.quick else 3.0) if args.budget is None else args.budget
        return models.run(args.out, args.filter, args.quick, budget_s)
    if args.command == "sass":
        return sass.run(args.out, args.arch, args.filter)
    if args.command == "sync":
        return sync.run(args.out, args.batch or (2 if args.quick else 8), args.quick)
    if args.command == "predict":
        return predict.run(args.out)
    if args.command == "dram":
        return dram.workload() if args.workload else dram.run(args.out)
    if args.command == "gpu":
        some = cases.matching(cases.quick() if args.quick else cases.full(), args.filter)
        modes = [gpu_clock.MODES[name] for name in args.mode]
        budget_s = (args.budget or (1.0 if args.quick else 6.0)) / 1e3
        return gpu.run(
            some, args.out, torch.device(args.device), modes, budget_s, args.minutes,
            not args.no_compile,
        )  # fmt: skip
    shapes = cases.QUICK if args.quick else cases.RESNET50
    batch = args.batch or (4 if args.quick else 32)
    every = cases.resnet50((batch,), args.dtype, args.variant, args.layout, shapes)
    budget_s = args.budget or (0.05 if args.quick else 0.3)
    some = cases.matching(every, args.filter)
    return kernels.run(some, args.out, budget_s, with_compile=not args.no_compile)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
