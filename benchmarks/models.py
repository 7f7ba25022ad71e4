"""Other libraries' models: what convert(fuse=True) reaches, whether it is right, what it saves."""

import copy
import re
import statistics
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import bnext
from benchmarks import cpu_clock, report
from benchmarks.arguments import BadArgumentError

# The largest difference of a tensor, relative to its largest value: a pass in float32, and three
# steps in float64. Where a network amplifies roundings more, so it does eager's own: 10 times that,
# and nothing that would show no mistake.
# In DETR's evaluation eager is 1.7e-5 from float64, bnext 1.0e-5.
EVAL_TOLERANCE, TRAIN_TOLERANCE, TIMES_EAGERS, MOST = 4e-5, 1e-8, 10, 1e-2
STEPS = 3
NOISE = 1e-6  # what is smaller is so by cancellation, as a bias before a batch norm
SIZE = 96  # of the square images
LARGER = {"inception_v3": 160, "inception_v4": 160}  # their last maps would be one pixel

Made = tuple[nn.Module, tuple[int, ...]]  # a model, and the shape of an input


def _timm(name: str) -> Made:
    import timm

    model = timm.create_model(name)
    fixed = model.pretrained_cfg.get("fixed_input_size")
    size = model.pretrained_cfg["input_size"][-1] if fixed else LARGER.get(name, SIZE)
    return model, (4, 3, size, size)


def _torchvision(name: str) -> Made:
    from torchvision.models import get_model

    arguments: dict[str, Any] = {}
    if name in ("googlenet", "inception_v3"):
        arguments = {"init_weights": False, "aux_logits": False}
    if "deeplab" in name or "fcn" in name or "lraspp" in name:
        arguments = {"weights_backbone": None}
    size = LARGER.get(name, SIZE)
    shape = (4, 3, 8, 56, 56) if name in _VIDEO else (4, 3, size, size)
    return get_model(name, weights=None, **arguments), shape


def _transformers(name: str) -> Made:
    from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

    if name == "detr":  # frozen batch norms
        backbone = AutoConfig.for_model("resnet", depths=[3, 4, 6, 3], out_features=["stage4"])
        config = AutoConfig.for_model(name, use_timm_backbone=False, backbone_config=backbone)
        return AutoModel.from_config(config), (4, 3, SIZE, SIZE)
    small = {"width_coefficient": 1.0, "depth_coefficient": 1.0, "hidden_dim": 1280}  # B0, not B7
    config = AutoConfig.for_model(name, **(small if name == "efficientnet" else {}))
    return AutoModelForImageClassification.from_config(config), (4, 3, SIZE, SIZE)


def _ultralytics(name: str) -> Made:
    from ultralytics.nn.tasks import ClassificationModel, DetectionModel, SegmentationModel

    kinds = {"cls": ClassificationModel, "seg": SegmentationModel}
    kind = kinds.get(name.rpartition("-")[2], DetectionModel)
    return kind(f"{name}.yaml", verbose=False), (4, 3, SIZE, SIZE)


_VIDEO = ("r3d_18", "mc3_18", "r2plus1d_18")
# Each library's function and models, the first of which --quick takes.
LIBRARIES: dict[str, tuple[Callable[[str], Made], str]] = {
    "timm": (_timm, """
        resnet18 resnet50 resnext50_32x4d res2net50_26w_4s seresnet50 hrnet_w18_small dla34
        densenet121 inception_v4 regnety_004 regnetx_004 efficientnet_b0
        tf_efficientnetv2_b0 mobilenetv2_100 mobilenetv3_large_100 mobilenetv4_conv_small mixnet_s
        ghostnet_100 lcnet_050 levit_128s efficientvit_b0 repvit_m1 fastvit_t8 cspdarknet53
        tresnet_m ese_vovnet19b_dw selecsls42b coatnet_rmlp_nano_rw_224 mobilevit_s rexnet_100
        xception41 resnet26d resnet10t ecaresnet26t skresnet18 resnest14d dpn48b mnasnet_100
        fbnetc_100 spnasnet_100 semnasnet_100 hardcorenas_a mobileone_s0 cs3darknet_s darknet53
        efficientformer_l1 vgg11_bn gernet_s repvgg_a0 visformer_tiny starnet_s1 tinynet_e
        tf_efficientnet_b0 resnetblur18
    """),
    "torchvision": (_torchvision, """
        mobilenet_v2 resnet50 resnet18 resnext50_32x4d wide_resnet50_2 densenet121 googlenet
        inception_v3 mobilenet_v3_large mobilenet_v3_small mnasnet1_0 shufflenet_v2_x1_0
        efficientnet_b0 regnet_y_400mf vgg11_bn deeplabv3_resnet50 lraspp_mobilenet_v3_large
        r3d_18 r2plus1d_18
    """),
    "transformers": (_transformers, """
        resnet regnet mobilenet_v1 mobilenet_v2 efficientnet mobilevit cvt detr
    """),
    "ultralytics": (_ultralytics, "yolov8n yolo11n yolov5n yolov10n yolov8n-seg yolov8n-cls"),
}  # fmt: skip


class Row(NamedTuple):
    """A line of the table and of the file; sizes in bytes of the batch norms' outputs."""

    library: str
    model: str
    input: str = ""
    batch_norms: int = 0
    converted: int = 0
    fused: int = 0
    bytes: int = 0
    fused_bytes: int = 0
    eval_error: float = 0.0
    train_error: float = 0.0
    eager_train_error: float = 0.0  # of an input off by one rounding; 0: not needed
    eager_ms: float = 0.0
    bnext_ms: float = 0.0
    time_over_eager: float = 0.0
    eager_saved_bytes: int = 0
    bnext_saved_bytes: int = 0
    reasons: tuple[tuple[str, int], ...] = ()  # not to convert or fuse, and for how many
    failure: str = ""

    @property
    def saved_less(self) -> float:
        return 1 - self.bnext_saved_bytes / max(self.eager_saved_bytes, 1)

    @property
    def is_wrong(self) -> bool:
        bound = min(max(TRAIN_TOLERANCE, TIMES_EAGERS * self.eager_train_error), MOST)
        right = self.eval_error <= EVAL_TOLERANCE and self.train_error <= bound
        return bool(self.failure) or not right


def names(pattern: str, quick: bool) -> Iterator[tuple[str, str]]:
    """The models of the installed libraries whose "library name" the expression matches."""
    for library, (_, models) in LIBRARIES.items():
        if _version(library) is not None:
            some = [m for m in models.split() if re.search(pattern, f"{library} {m}")]
            yield from ((library, m) for m in some[: 1 if quick else None])


def installed() -> list[str]:
    return [name for name in LIBRARIES if _version(name) is not None]


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def _is_batch_norm(module: nn.Module) -> bool:
    return "batchnorm" in type(module).__name__.lower()


def _randomise(model: nn.Module) -> None:
    """Makes every batch norm matter: a gain of zero hides the branch that it ends."""
    with torch.no_grad():
        for module in model.modules():
            if _is_batch_norm(module) and isinstance(module.weight, Tensor):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(std=0.1)  # type: ignore[operator]


def _tensors(output: object) -> list[Tensor]:
    return [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]


def _loss(model: nn.Module, x: Tensor) -> Tensor:
    torch.manual_seed(0)  # for dropout
    return torch.stack([t.square().mean() for t in _tensors(model(x))]).sum()


def _norm_bytes(model: nn.Module, x: Tensor) -> dict[str, int]:
    """The bytes that each batch norm writes in a training pass, by name."""
    written: dict[str, int] = {}

    def count(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        def hook(module: nn.Module, inputs: object, output: Tensor) -> None:
            written[name] = written.get(name, 0) + output.nbytes

        return hook

    norms = {name: m for name, m in model.named_modules() if _is_batch_norm(m)}
    handles = [m.register_forward_hook(count(name)) for name, m in norms.items()]
    _loss(model.train(), x)
    for handle in handles:
        handle.remove()
    return {name: written.get(name, 0) for name in norms}


def _saved_bytes(model: nn.Module, x: Tensor) -> int:
    """What forward keeps for backward besides the parameters, every storage once."""
    kept: dict[int, torch.UntypedStorage] = {}  # alive, or an address would be given to another

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage()
        return t.detach()  # an output itself would hold the graph that holds it

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = _loss(model, x)
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    del loss
    return sum(storage.nbytes() for address, storage in kept.items() if address not in own)


def _difference(found: list[Tensor], expected: list[Tensor]) -> float:
    assert len(found) == len(expected) > 0
    worst = [
        (a - b).abs().max() / b.abs().max().clamp_min(NOISE)
        for a, b in zip(found, expected, strict=True) if b.numel()
    ]  # fmt: skip
    return float(torch.stack(worst).max())  # NaN if one is


def _trained(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The losses of a few steps in float64, and the state after them."""
    model, losses = copy.deepcopy(model).double().train(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = _loss(model, x)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return [torch.stack(losses), *_tensors(model.state_dict())]


def _step(model: nn.Module, x: Tensor) -> Callable[[], None]:
    def step() -> None:
        model.zero_grad()
        _loss(model, x).backward()

    return step


def _reasons(found: bnext.ConversionReport, norms: dict[str, int]) -> tuple[tuple[str, int], ...]:
    why = {**found.unfused, **found.left_alone}
    # Without the names of modules, so that they can be counted.
    names = r"(?<=forward) of (the model|\S+)|(?<=\w) \S+(?= takes its output)"
    plain = (re.sub(names, "", why[n]) for n in norms if n in why)
    return tuple(Counter(plain).most_common())


def measure(library: str, name: str, budget_s: float) -> Row:
    torch.manual_seed(0)
    eager, shape = LIBRARIES[library][0](name)
    x = torch.randn(shape)
    _randomise(eager)
    norms = _norm_bytes(eager, x)  # which also moves the running statistics
    model = bnext.convert(copy.deepcopy(eager), fuse=True)
    found = bnext.conversion_report(model, fuse=True)
    with torch.no_grad():
        outputs = [_tensors(m.eval()(x)) for m in (model, eager)]
    expected = _trained(eager, x.double())
    errors = [_difference(_trained(model, x.double()), expected), 0.0]
    if not errors[0] <= TRAIN_TOLERANCE:
        nearby = x.double() * (1 + torch.finfo(torch.float64).eps)
        errors[1] = _difference(_trained(eager, nearby), expected)
    models = {"eager": eager.train(), "bnext": model.train()}
    saved = {key: _saved_bytes(m, x) for key, m in models.items()}
    timed = cpu_clock.alternate({key: _step(m, x) for key, m in models.items()}, budget_s)
    pairs = zip(timed["bnext"].seconds, timed["eager"].seconds, strict=True)
    return Row(
        library, name, "x".join(map(str, shape)),
        len(norms), len(found.bnext), len(found.fused),
        sum(norms.values()), sum(norms[name] for name in found.fused),
        _difference(*outputs), *errors,
        timed["eager"].ms, timed["bnext"].ms, statistics.median(a / b for a, b in pairs),
        saved["eager"], saved["bnext"], _reasons(found, norms),
    )  # fmt: skip


def _attempt(library: str, name: str, budget_s: float) -> Row:
    try:
        return measure(library, name, budget_s)
    except Exception as error:  # one model must not end the run
        where = traceback.extract_tb(error.__traceback__)[-1]
        text = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        return Row(library, name, failure=f"{text} ({Path(where.filename).name}:{where.lineno})")


def _written(row: Row) -> dict[str, Any]:
    plain = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row._asdict().items()}
    return plain | {"reasons": "; ".join(f"{count}x {reason}" for reason, count in row.reasons)}


def _cells(row: Row) -> list[str]:
    return [
        str(row.batch_norms), str(row.converted), str(row.fused),
        f"{row.fused_bytes / max(row.bytes, 1):.0%}", f"{row.eval_error:.0e}",
        f"{row.train_error:.0e}{' wrong' if row.is_wrong else ''}",
        f"{row.time_over_eager:.2f}", f"{row.saved_less:.0%}",
    ]  # fmt: skip


def run(out: Path, facts: dict[str, str], pattern: str, quick: bool, budget_s: float) -> int:
    console = Console(width=110)
    some = [*names(pattern, quick)]
    if not some:
        raise BadArgumentError(
            f"argument --filter: {pattern!r} matches no model of {', '.join(installed())}"
            if installed()
            else f"none of {', '.join(LIBRARIES)} is installed: pip install 'bnext[models]'"
        )
    facts = facts | {name: v for name in LIBRARIES if (v := _version(name)) is not None}
    console.print(report.facts_table(facts))
    rows: list[Row] = []
    with Progress(console=console) as progress:
        task = progress.add_task("", total=len(some))
        for library, name in some:
            progress.update(task, description=f"{library} {name}")
            rows.append(_attempt(library, name, budget_s))
            report.write_csv(out / "models.csv", facts, map(_written, rows))
            progress.advance(task)
    table = report.numbers_table(
        "convert(fuse=True) beside eager; time of a training step, bytes kept for backward",
        ["model"],
        ["norms", "conv.", "fused", "of bytes", "eval", "train", "time", "saved"],
    )
    for row in rows:
        if row.failure:
            failure = f"{row.library} {row.model}: {row.failure}"
            console.print(failure, style="red", highlight=False, markup=False)
        else:
            table.add_row(f"{row.library} {row.model}", *_cells(row))
    console.print(table)
    console.print(_why_not(rows))
    console.print(_summary([row for row in rows if not row.failure]), highlight=False)
    console.print(f"Written to {out}/models.csv", highlight=False)
    return int(any(row.is_wrong for row in rows))


def _why_not(rows: list[Row]) -> Table:
    total: Counter[str] = Counter()
    for row in rows:
        total.update(dict(row.reasons))
    title = "batch norms that are not converted or not fused"
    table = Table(title=title, box=SIMPLE, padding=0, min_width=80)
    table.add_column("norms", justify="right")
    table.add_column("reason", overflow="fold")
    for text, number in total.most_common():
        table.add_row(str(number), escape(text))
    return table


def _summary(rows: list[Row]) -> str:
    if not rows:
        return "no model ran"
    norms, bytes = sum(r.batch_norms for r in rows), sum(r.bytes for r in rows)
    time = statistics.geometric_mean([r.time_over_eager for r in rows])
    return (
        f"{len(rows)} models, {norms} batch norms: {sum(r.converted for r in rows)} converted, "
        f"{sum(r.fused for r in rows)} fused, which are "
        f"{sum(r.fused_bytes for r in rows) / max(bytes, 1):.0%} of their bytes; a step takes "
        f"{time:.3f} of eager's time (geometric mean)"
    )
