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
# Loops of all activations have many branches; those of one are counted in its name.
ANY, ALONE = "any", "silu"
ELEMENT_BYTES = {"double": 8, "float": 4, "__half": 2, "__nv_bfloat16": 2}
WIDTH = {"": 32, "64": 64, "128": 128, "U8": 8, "S8": 8, "U16": 16, "S16": 16}
# Items of a reduction's tile, and of those between two flushes of its floats to double: kTile and
# kTilesToFlush in sums.cuh.
TILE, FLUSHED = 4, 4 * 4
FP64 = {"DADD", "DFMA", "DMUL", "DSETP"}
CONVERSIONS = {"F2F", "I2F", "F2I"}  # packed ones, F2FP, are as quick as other instructions


class MissingToolError(Exception):
    """A program that this needs is not there; the message says which."""


@dataclass(frozen=True)
class Kernel:
    """A kernel and what is fused; counts are per element, of its hot loops at full tiles."""

    arch: str
    kernel: str  # as in C++, without namespaces
    fused: str  # forward: none, add, relu, add relu; backward: none, sign, mask, +frozen; both: any
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
            elif re.match(r"\s*\.section\s", line):  # not Ampere's .sectioninfo
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


@dataclass(frozen=True)
class _HotLoop:
    kind: str  # copy, reduce or apply
    fused: str
    items: float  # of a turn
    body: list[str]
    numbers: tuple[float, float, float]  # instructions, fp64 and conversions an element


def _fused(kernel: str, body: list[str], residuals: bool) -> str:
    """What a loop is compiled for, told by its operations: see Fused and Gate in csrc/cuda.

    `residuals`: it loads one, or stores the gradient of one.
    """
    if _count(body, {"MUFU"}):
        return ANY
    if "forward" in kernel:
        relu = any(".RELU" in _operation(i) for i in body) or _count(body, {"FMNMX"})
        return " ".join(["add"] * residuals + ["relu"] * bool(relu)) or "none"
    if residuals or _accesses(body, "LDG", 8):
        return "mask"
    return "sign" if _count(body, {"FSET", "FSETP", "HSET2", "HSETP2"}) else "none"


def _hot_loop(
    kernel: str, code: list[str], loop: _Loop, bits: int, vector: int, letter: str
) -> _HotLoop | None:
    """`letter`: of the operations that compute, D for double."""
    body = code[loop.first : loop.last + 1]
    operands = 3 if "double" in kernel else 2 if "backward" in kernel else 1
    copies, stores = _count(body, {"LDGSTS"}), _accesses(body, "STG", bits)
    shared, loaded = _accesses(body, "LDS", bits), _accesses(body, "LDG", bits)
    floats = _count(body, {f"{letter}ADD", f"{letter}FMA"})
    floats += 2 * _count(body, {f"{letter}ADD2", f"{letter}FMA2"})
    computes = floats + _count(body, {f"{letter}MUL"}) + 2 * _count(body, {f"{letter}MUL2"})
    fused = ""
    if copies:
        kind, items = "copy", copies / operands
    elif stores and computes >= vector:
        kind = "apply"
        if "double" in kernel:
            items = 1.0
        elif "forward" in kernel:
            items = stores
            fused = _fused(kernel, body, loaded > (0 if "resident" in kernel else items))
        else:
            items = shared / operands if "resident" in kernel else stores
            fused = _fused(kernel, body, stores > items > 0)
            if fused == "mask" and "resident" not in kernel:
                items /= 2  # stores of two gradients
    else:
        kind, items = "reduce", (shared if "resident" in kernel else loaded) / operands
        # Sums that are taken again are no hot loop; a double backward takes all in double.
        is_again = letter == "F" and "double" not in kernel and _count(body, FP64)
        if items < 1 or floats < 2 * vector * items or is_again:
            return None
        if "forward" not in kernel and "double" not in kernel:
            fused = _fused(kernel, body, False)
    if fused == ANY and "backward" in kernel:
        items = 1.0  # by its code, which loads a residual or not
    if items <= 0 or (kind == "apply" and computes < vector * items):
        return None
    # What a kernel is not for, as doubles' exchange, which looks like a loop of double's items.
    if re.search("reduce_(forward|double)" if kind == "apply" else "_apply_", kernel):
        return None
    parts = [(body, items)]
    if kind == "reduce" or "reduce" in kernel:
        inner, outer = loop, loop.parent
        while outer:
            around = code[outer.first : inner.first] + code[inner.last + 1 : outer.last + 1]
            if _count(around, FP64):
                parts.append((around, FLUSHED))
                break
            parts.append((around, TILE))
            inner, outer = outer, outer.parent
        else:
            del parts[1:]
    if kind == "apply" and "reduce" in kernel:
        fused += " frozen"
    numbers = tuple(
        sum(count(c) / (of * vector) for c, of in parts)
        for count in (len, lambda c: _count(c, FP64), lambda c: _count(c, CONVERSIONS))
    )
    return _HotLoop(kind, fused, items, body, numbers)


def _hot_loops(
    kernel: str, code: list[str], loops: list[_Loop], bits: int, vector: int, letter: str
) -> dict[str, dict[str, _HotLoop]]:
    """What is fused -> kind -> loop: of each the one with the most items."""
    found: dict[tuple[str, str], _HotLoop] = {}
    for loop in loops:
        if any(o is not loop and loop.first <= o.first and o.last <= loop.last for o in loops):
            continue
        hot = _hot_loop(kernel, code, loop, bits, vector, letter)
        if hot and hot.items > getattr(found.get((hot.fused, hot.kind)), "items", 0):
            found[hot.fused, hot.kind] = hot
    together: dict[str, dict[str, _HotLoop]] = {}
    common = {kind: hot for (fused, kind), hot in found.items() if not fused}
    for fused in dict.fromkeys(fused for fused, _ in found if fused) or [""]:
        together[fused] = common | {k: hot for (f, k), hot in found.items() if f == fused}
    if "resident_backward" in kernel and "sign" in together:
        together["sign"]["apply"] = found["none", "apply"]  # dy has passed the sign already
    return together


def measure(folder: Path, arch: str, name: str) -> list[Kernel]:
    """All kernels of an object; of one activation alone, what others have a switch in."""
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
        if not shape:
            continue
        vector = int(shape[2])
        bits = 8 * ELEMENT_BYTES[shape[1]] * vector
        letter = "D" if shape[1] == "double" else "F"
        of = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", usage[mangled])}
        for fused, hot in _hot_loops(short, code, loops, bits, vector, letter).items():
            if alone and ANY not in fused:
                continue
            widths: Counter[int] = Counter()
            for loop in hot.values():
                for operation in ("LDG", "STG", "LDS", "STS", "LDGSTS"):
                    for width in set(WIDTH.values()):
                        widths[width] += _accesses(loop.body, operation, width)
            numbers = [hot[k].numbers[0] if k in hot else 0.0 for k in ("copy", "reduce", "apply")]
            kernels.append(
                Kernel(
                    arch, short, fused.replace(ANY, ALONE) if alone else fused, *numbers,
                    *(sum(loop.numbers[n] for loop in hot.values()) for n in range(3)),
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
    shown = [k for k in kernels if re.search(pattern, f"{k.kernel} {k.fused}")]
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
            f"{k.conversions:5.2f} {k.registers:4} {k.warps:5} {k.local:5}  "
            f"{k.arch} {k.kernel} {k.fused}"
        )
    print(f"{len(kernels)} kernels in {out / 'sass.csv'}")
    return 0
