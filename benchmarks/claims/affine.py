"""BatchNorm1d(100) with and without gamma and beta, as in torch.nn's documentation."""

import statistics

import torch
from matplotlib.figure import Figure
from torch import nn

import bnext
from benchmarks.claims.finding import Finding, Setup, draw, judge, spread
from benchmarks.claims.training import History, mlp, train

STATEMENT = "BatchNorm1d(100) with and without gamma and beta"
FEATURES, STEPS, LEARNING_RATE, EVERY = 100, 1000, 0.5, 20
KINDS = {"affine=True": True, "affine=False": False}


def run(setup: Setup) -> Finding:
    runs: dict[str, list[tuple[History, nn.Sequential]]] = {name: [] for name in KINDS}
    for name, seed in setup.track([(name, seed) for name in KINDS for seed in setup.seeds]):
        torch.manual_seed(seed)
        model = mlp(setup.data, True, width=FEATURES, affine=KINDS[name])
        steps = setup.steps(STEPS)
        runs[name].append((train(model, setup.data, LEARNING_RATE, steps, seed, EVERY), model))

    off = max(_off_standard(seed) for seed in setup.seeds)
    final = {name: [h.accuracies[-1] for h, _ in each] for name, each in runs.items()}
    losses = {
        name: [statistics.mean(h.losses[-50:]) for h, _ in each] for name, each in runs.items()
    }
    norms = [m for _, model in runs["affine=True"] for m in model if isinstance(m, nn.BatchNorm1d)]
    gammas, betas = (torch.cat([getattr(m, n).detach() for m in norms]) for n in ("weight", "bias"))
    sentence = (
        f"m = bnext.BatchNorm1d({FEATURES}, affine=False) has no parameters, and its outputs have "
        f"mean 0 and variance 1 to {off:.0e}. That gamma and beta help before a sigmoid "
        f"{judge(*losses.values())}: training ends at a loss of "
        f"{spread(losses['affine=True'], '.4f')} with them, "
        f"{spread(losses['affine=False'], '.4f')} without, the test accuracy is "
        f"{spread(final['affine=True'])} and {spread(final['affine=False'])}; they end between "
        f"{gammas.min():.2f} and {gammas.max():.2f} (gamma), {betas.min():.2f} and "
        f"{betas.max():.2f} (beta)."
    )
    cells = [
        (
            f"BatchNorm1d({FEATURES}, {name})",
            str(_parameters(affine)),
            spread(losses[name], ".4f"),
            spread(final[name]),
        )
        for name, affine in KINDS.items()
    ]
    rows = [
        {"kind": name, "seed": seed, "step": step, "test_accuracy": f"{accuracy:.4f}"}
        for name, each in runs.items()
        for seed, (history, _) in zip(setup.seeds, each, strict=True)
        for step, accuracy in zip(history.steps, history.accuracies, strict=True)
    ]
    note = (
        "Without them a sigmoid's inputs stay about zero, where it is all but linear: the paper's "
        "section 3."
    )
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, each in runs.items():
        draw(left, each[0][0].steps, [h.accuracies for h, _ in each], label=name)
    left.set(title="3 x 100 sigmoid units", xlabel="step", ylabel="test accuracy")
    right.hist([gammas.numpy(), betas.numpy()], bins=40, label=["gamma", "beta"], stacked=False)
    right.set(title="after training, all layers and seeds", xlabel="value", ylabel="units")
    for axis in (left, right):
        axis.legend(fontsize=8)
    header = ["", "parameters", "training loss", "test accuracy"]
    return Finding(sentence, header, cells, rows, figure, [note])


def _parameters(affine: bool) -> int:
    return sum(p.numel() for p in bnext.BatchNorm1d(FEATURES, affine=affine).parameters())


def _off_standard(seed: int) -> float:
    """How far the outputs' means and variances are from 0 and 1."""
    m = bnext.BatchNorm1d(FEATURES, affine=False)
    output = m(torch.randn(20, FEATURES, generator=torch.Generator().manual_seed(seed)))
    var, mean = torch.var_mean(output.double(), 0, correction=0)
    return max(mean.abs().max().item(), (var - 1).abs().max().item())
