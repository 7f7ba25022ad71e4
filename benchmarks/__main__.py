"""Command line: the kernel benchmark by default, `train` and `overhead` by name."""

import argparse
import sys
from pathlib import Path

import torch

from benchmarks import kernels, overhead, providers, train


def _parser() -> argparse.ArgumentParser:
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument(
        "--out", type=Path, default=Path("build/benchmarks"), help="folder to write"
    )
    shared.add_argument("--quick", action="store_true", help="smoke test, its figures mean nothing")
    shared.add_argument("--threads", type=int, help="of torch's pool")

    parser = argparse.ArgumentParser(
        "python -m benchmarks",
        description="Without a command: kernels. Each has its own --help.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    kernel = commands.add_parser("kernels", parents=[shared], help=kernels.__doc__)
    kernel.add_argument("--batch", type=int, help="images (default 32; 4 with --quick)")
    kernel.add_argument("--dtype", nargs="+", default=[*providers.DTYPES], choices=providers.DTYPES)
    kernel.add_argument(
        "--layout", nargs="+", default=[*providers.LAYOUTS], choices=providers.LAYOUTS
    )
    kernel.add_argument("--filter", default="", help="regular expression, as in '64x56.*bfloat16'")
    kernel.add_argument("--budget", type=float, help="seconds per case, direction and allocator")
    kernel.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    training = commands.add_parser("train", parents=[shared], help=train.__doc__)
    training.add_argument("--epochs", type=int, help="passes over the training set (default 15)")
    commands.add_parser("overhead", parents=[shared], help=overhead.__doc__)
    return parser


def main(argv: list[str]) -> int:
    if not argv or (argv[0].startswith("-") and argv[0] not in ("-h", "--help")):
        argv = ["kernels", *argv]
    args = _parser().parse_args(argv)
    if args.threads or args.command == "overhead":
        torch.set_num_threads(args.threads or 1)
    if args.command == "train":
        return train.run(args.out, epochs=args.epochs or (2 if args.quick else 15))
    if args.command == "overhead":
        return overhead.run(args.out, *((11, 20) if args.quick else (101, 300)))
    shapes = kernels.QUICK if args.quick else kernels.RESNET50
    batch = args.batch or (4 if args.quick else 32)
    cases = kernels.cases(shapes, batch, args.dtype, args.layout, args.filter)
    budget_s = args.budget or (0.05 if args.quick else 1.0)
    return kernels.run(cases, args.out, budget_s, with_compile=not args.no_compile)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
