"""Instructions per element of the CUDA kernels' hot loops, read from their machine code: no GPU."""

import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import ninja

import setup
from benchmarks import report
from benchmarks.arguments import BadArgumentError

ROOT = Path(__file__).resolve().parents[1]
CUDA = ROOT / "csrc" / "cuda"
FLAGS = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-fmad=false", "-cubin",
         "-Werror", "all-warnings"]  # fmt: skip
# The architecture whose instructions are counted.
ARCH = "sm_90"
# Kernels of all activations have loops of many branches; those of one are counted in its name.
ALONE = "silu"
# Fused::kAny and Gate::kAny, last or before whether there is a residual or frozen statistics.
SWITCHING = r"forward_kernel<.*, 2, \w+>|backward_kernel<.*, 3(, \w+)?>"
ELEMENT_BYTES = {"double": 8, "float": 4, "__half": 2, "__nv_bfloat16": 2}
WIDTH = {"": 32, "64": 64, "128": 128, "U8": 8, "S8": 8, "U16": 16, "S16": 16}
# Tiles of a reduction between two flushes of its floats to double (kTilesToFlush in sums.cuh).
TILES_TO_FLUSH = 4
FP64 = {"DADD", "DFMA", "DMUL", "DSETP"}
CONVERSIONS = {"F2F", "I2F", "F2I"}  # packed ones, F2FP, are as quick as other instructions


class MissingToolError(Exception):
    """A program that this needs is not there; the message says which."""


@dataclass(frozen=True)
class Kernel:
    """One kernel of one architecture; counts are per element, of hot loops at full tiles."""

    arch: str
    kernel: str  # as in C++, without namespaces
    copy: float
    reduce: float
    apply: float
    total: float
    fp64: float
    conversions: float
    widths: str  # bits of the hot loops' accesses to memory
    registers: int
    warps: int  # of an SM, as far as registers go
    local: int  # LDL and STL anywhere in the kernel
    stack: int  # bytes of a thread
    shared: int  # static bytes of a block


def objects() -> dict[str, tuple[Path, str]]:
    """Object name -> source and flags, of each file and dtype."""
    found = {
        file.stem + variant: (file, flags)
        for file in sorted(CUDA.glob("*.cu"))
        for variant, flags in setup.cuda_variants(file).items()
    }
    for name in ("launch_forward.bfloat16", "launch_backward.bfloat16"):
        file, flags = found[name]
        found[f"{name}.{ALONE}"] = file, f"{flags} -DBNEXT_ONLY_ACT=k{ALONE.capitalize()}"
    return found


def compile_kernels(wanted: list[tuple[str, str]]) -> Path:
    """Brings build/nvcc up to date, for pairs of an architecture and an object.

    <object>.<arch> is a cubin. What the extension has is not compiled again.
    """
    cuda = setup.probe_cuda()
    if cuda.missing:
        raise MissingToolError(cuda.missing)
    folder = ROOT / "build" / "nvcc"
    folder.mkdir(parents=True, exist_ok=True)
    wanted = [(arch, name) for arch, name in wanted if not _take_built(arch, name, folder)]
    if not wanted:
        return folder
    flags = shlex.join(FLAGS + setup.host_compiler())
    lines = [
        "rule nvcc",
        f"  command = {shlex.quote(str(cuda.nvcc))} {flags} $more -arch=$arch -MD -MF $out.d $in "
        "-o $out > $out.log 2>&1 || { cat $out.log; exit 1; }",
        "  depfile = $out.d",
        "  deps = gcc",
    ]
    for arch, name in wanted:
        file, more = objects()[name]
        lines += [f"build {name}.{arch}: nvcc {file}", f"  arch = {arch}", f"  more = {more}"]
    manifest = folder / f"{'-'.join(dict.fromkeys(arch for arch, _ in wanted))}.ninja"
    manifest.write_text("\n".join(lines) + "\n")
    command = [Path(ninja.BIN_DIR) / "ninja", "-C", folder, "-f", manifest.name, "-k", "0",
               "-j", setup.max_jobs()]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(result.stdout[-10000:])
    return folder


def _take_built(arch: str, name: str, folder: Path) -> bool:
    """Copies the machine code of an object of the extension, if that is up to date."""
    file, _ = objects()[name]
    build = setup.build_folder()
    target = f"cuda/{file.name}{name.removeprefix(file.stem)}.o"
    built, manifest = build / target, build / "build.ninja"
    # What the last build left out is a file like any other to ninja: nothing to do.
    if not (built.exists() and f"build {target}:" in manifest.read_text()):
        return False
    ask = [Path(ninja.BIN_DIR) / "ninja", "-C", build, "-n", target]
    answer = subprocess.run(ask, capture_output=True, text=True, check=False)
    if "no work to do" not in answer.stdout:
        return False
    with tempfile.TemporaryDirectory() as there:
        command = [_tool("cuobjdump"), "-xelf", f".{arch}.cubin", str(built)]
        subprocess.run(command, cwd=there, capture_output=True, check=False)
        for cubin in Path(there).iterdir():
            shutil.move(cubin, folder / f"{name}.{arch}")
            return True
    return False


def _tool(name: str) -> str:
    """Nvdisasm or cuobjdump: the wheel's, or else PATH's."""
    for site in (sysconfig.get_path("purelib"), *sys.path):
        found = sorted(Path(site).glob(f"nvidia/*/bin/{name}"))
        if found:
            return str(found[-1])
    on_path = shutil.which(name)
    if on_path is None:
        raise MissingToolError(f"no {name}: pip install bnext[sass]")
    return on_path


def _output(*command: object) -> str:
    return subprocess.run(
        [str(c) for c in command], capture_output=True, text=True, check=True
    ).stdout


@dataclass
class _Loop:
    first: int
    last: int  # instructions, both in the loop
    parent: "_Loop | None" = None


def _operation(instruction: str) -> str:
    return re.sub(r"^@!?U?P\w+\s+", "", instruction).split()[0]


def _functions(text: str) -> dict[str, tuple[list[str], list[_Loop]]]:
    """Mangled name -> its instructions and its loops, from nvdisasm -c."""
    found = {}
    for section in re.split(r"\n\s*\.section\s+\.text\.", text)[1:]:
        name = section.split(",")[0].strip().strip('"')
        labels: dict[str, int] = {}
        code: list[str] = []
        for line in section.splitlines():
            if label := re.match(r"(\.L_x_\d+):", line):
                labels[label[1]] = len(code)
            elif match := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
                code.append(match[1].strip())
            elif re.match(r"\s*\.section", line):
                break
        loops = {}
        for i, instruction in enumerate(code):
            target = re.search(r"BRA\b.*?`\((\.L_x_\d+)\)", instruction)
            if target and labels.get(target[1], i + 1) < i:
                first = labels[target[1]]
                loops[first] = _Loop(first, max(i, loops[first].last if first in loops else 0))
        every = sorted(loops.values(), key=lambda loop: loop.last - loop.first)
        for i, loop in enumerate(every):
            loop.parent = next(
                (o for o in every[i + 1 :] if o.first <= loop.first and loop.last <= o.last), None
            )
        found[name] = code, every
    return found


def _accesses(code: list[str], operation: str, bits: int) -> int:
    """Accesses of that width."""
    count = 0
    for instruction in code:
        parts = _operation(instruction).split(".")
        if parts[0] == operation and not instruction.startswith("@!PT"):
            widths = [WIDTH[p] for p in parts[1:] if p in WIDTH]
            count += (widths[0] if widths else 32) == bits
    return count


def _count(code: list[str], operations: set[str]) -> int:
    return sum(_operation(i).split(".")[0] in operations for i in code)


def _hot_loops(
    code: list[str],
    loops: list[_Loop],
    bits: int,
    operands: int,
    loads_of_item: int,
    vector: int,
    letter: str,  # of the operations that compute: D for double
) -> dict[str, tuple[float, float, float, list[str]]]:
    """Copy, reduce, apply -> instructions, fp64 and conversions an element, and the loop's code.

    Of each kind the loop with the most items. An item is `operands` copies, and as many loads from
    shared memory or `loads_of_item` from global memory.
    """
    best: dict[str, tuple[float, float, float, float, list[str]]] = {}
    for loop in loops:
        if any(o is not loop and loop.first <= o.first and o.last <= loop.last for o in loops):
            continue
        body = code[loop.first : loop.last + 1]
        copies = _count(body, {"LDGSTS"})
        shared, loaded = _accesses(body, "LDS", bits), _accesses(body, "LDG", bits)
        items = loaded / loads_of_item if loaded >= loads_of_item else shared / operands
        floats = _count(body, {f"{letter}ADD", f"{letter}FMA"})
        floats += 2 * _count(body, {f"{letter}ADD2", f"{letter}FMA2"})
        computes = floats + _count(body, {f"{letter}MUL"}) + 2 * _count(body, {f"{letter}MUL2"})
        if copies:
            kind, items = "copy", copies / operands
        elif _accesses(body, "STG", bits) and computes >= vector * items > 0:
            kind = "apply"
            items = shared / operands if shared >= operands else items
        elif items >= 1 and floats >= 2 * vector * items:
            kind = "reduce"
        else:
            continue
        parts = [(body, 1.0)]
        if kind == "reduce" and loop.parent:
            outer = code[loop.parent.first : loop.first]
            outer = outer + code[loop.last + 1 : loop.parent.last + 1]
            if _count(outer, FP64):
                parts.append((outer, 1 / TILES_TO_FLUSH))
        numbers = [
            sum(count(c) * share for c, share in parts) / (items * vector)
            for count in (len, lambda c: _count(c, FP64), lambda c: _count(c, CONVERSIONS))
        ]
        if kind not in best or items > best[kind][0]:
            best[kind] = (items, numbers[0], numbers[1], numbers[2], body)
    return {kind: found[1:] for kind, found in best.items()}


def measure(folder: Path, arch: str, name: str) -> list[Kernel]:
    """All kernels of an object; of one activation alone, those that others have a switch in."""
    cubin, alone = folder / f"{name}.{arch}", name.endswith(f".{ALONE}")
    functions = _functions(_output(_tool("nvdisasm"), "-c", cubin))
    usage = dict(re.findall(r"Function (\S+):\n\s*(REG:.*)", _output(
        _tool("cuobjdump"), "--dump-resource-usage", cubin)))  # fmt: skip
    names = _output("c++filt", *functions).splitlines() if functions else []
    kernels = []
    for (mangled, (code, loops)), name in zip(functions.items(), names, strict=True):
        short = re.sub(r"bnext::|\((?:int|bool)\)|^void |\(anonymous namespace\)::", "", name)
        short = re.sub(r"\((?:\w+)\)(\d)", r"\1", short.split(">(")[0] + ">" * (">(" in short))
        shape = re.search(r"<(\w+), (\d+)", short)
        if not shape or (alone and not re.search(SWITCHING, short)):
            continue
        vector = int(shape[2])
        bits = 8 * ELEMENT_BYTES[shape[1]] * vector
        operands = 3 if "double" in short else 2 if "backward" in short else 1
        loads = operands
        if "forward" in short and "apply" in short and short.endswith("true>"):
            loads += 1  # the residual
        if "apply_backward" in short and re.search(r", [02], true>$", short):
            loads -= 1  # frozen statistics, and no activation or a mask: x is not read
        letter = "D" if shape[1] == "double" else "F"
        hot = _hot_loops(code, loops, bits, operands, loads, vector, letter)
        numbers = [hot[k][0] if k in hot else 0.0 for k in ("copy", "reduce", "apply")]
        widths: Counter[int] = Counter()
        for *_, body in hot.values():
            for operation in ("LDG", "STG", "LDS", "STS", "LDGSTS"):
                for width in set(WIDTH.values()):
                    widths[width] += _accesses(body, operation, width)
        of = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", usage[mangled])}
        kernels.append(
            Kernel(
                arch, f"{short} {ALONE}" if alone else short, *numbers, sum(numbers),
                sum(h[1] for h in hot.values()), sum(h[2] for h in hot.values()),
                " ".join(str(w) for w in sorted(widths) if widths[w]), of["REG"],
                min(64, 65536 // (-(-of["REG"] // 8) * 8 * 32)),
                _count(code, {"LDL", "STL"}), of["STACK"], of["SHARED"],
            )
        )  # fmt: skip
    return kernels


def run(out: Path, archs: list[str], pattern: str) -> int:
    """Compiles, counts, prints, and writes sass.csv."""
    try:
        wanted = [(arch, name) for arch in archs for name in objects()]
        folder = compile_kernels(wanted)
        kernels = [k for arch, name in wanted for k in measure(folder, arch, name)]
    except MissingToolError as error:
        print(f"sass: not counted: {error}", file=sys.stderr)
        return 1
    shown = [k for k in kernels if re.search(pattern, k.kernel)]
    if not shown:
        raise BadArgumentError(f"argument --filter: {pattern!r} matches no kernel")
    facts = {key: report.provenance()[key] for key in ("date", "commit", "bnext")}
    facts |= {"nvcc": setup.probe_cuda().version, "counted": "instructions an element"}
    report.write_csv(out / "sass.csv", facts, ({
        name: f"{value:.2f}" if isinstance(value, float) else value
        for name, value in asdict(k).items()
    } for k in kernels))  # fmt: skip
    print(
        f"{'copy':>5} {'reduce':>6} {'apply':>6} {'all':>6} {'fp64':>5} {'conv':>5} "
        "regs warps local"
    )
    for k in shown:
        print(
            f"{k.copy:5.2f} {k.reduce:6.2f} {k.apply:6.2f} {k.total:6.2f} {k.fp64:5.2f} "
            f"{k.conversions:5.2f} {k.registers:4} {k.warps:5} {k.local:5}  {k.arch} {k.kernel}"
        )
    print(f"{len(kernels)} kernels in {out / 'sass.csv'}")
    return 0
