"""python -m benchmarks claims: what is exact in it, and that its words follow its numbers."""

import csv
import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import bnext
from benchmarks import claims
from benchmarks.claims import (
    bias,
    covariate_shift,
    finding,
    formulas,
    initialisation,
    learning_rate,
    regularisation,
    training,
    whitening,
)
from benchmarks.claims.data import load
from benchmarks.claims.training import History
from bnext import reference

ROOT = Path(__file__).resolve().parents[2]
SEEDS = range(3)


@pytest.fixture(scope="module")
def digits():
    return load(None)


def setup(data) -> finding.Setup:
    return finding.Setup(data, SEEDS, True, lambda jobs: jobs)


# x = u + b


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", [n for n in bias.NORMALISATIONS if n != bias.OURS])
def test_kept_out_of_the_gradient_b_grows_without_bound_and_nothing_else_moves(digits, name, seed):
    run = bias.descend(bias.NORMALISATIONS[name], digits, seed, steps=50)
    assert run.sizes[1] > 1e-3
    for step, size in enumerate(run.sizes):
        assert size == pytest.approx(step * run.sizes[1], rel=1e-9)
    assert run.losses == pytest.approx([run.losses[0]] * 51, rel=1e-12)
    assert run.output_change < 1e-12


@pytest.mark.parametrize("seed", SEEDS)
def test_through_the_statistics_the_gradient_of_b_is_zero_to_rounding(digits, seed):
    run = bias.descend(bias.NORMALISATIONS[bias.OURS], digits, seed, steps=50)
    assert run.gradient < 1e-14 and run.sizes[-1] < 1e-12
    assert run.losses == pytest.approx([run.losses[0]] * 51, rel=1e-12)


def test_biases_before_batch_norm_have_no_gradient_and_are_the_ones_reported(digits):
    redundant = bnext.conversion_report(bias.Network(1), fuse=True).redundant_biases
    gradients = bias.bias_gradients(digits, seed=0)
    assert redundant == ("conv1", "conv2")
    for name, size in gradients.items():
        assert size < 1e-4 if name in redundant else size > 1e-2


# Whitening


@pytest.fixture
def features():
    """[N, C], correlated and of different variances."""
    x = torch.randn(500, 6, dtype=torch.float64) @ torch.randn(6, 6, dtype=torch.float64)
    return x * torch.tensor([0.1, 1.0, 2.0, 3.0, 4.0, 5.0]) + 7


def covariance(x: torch.Tensor) -> torch.Tensor:
    centred = x - x.mean(0)
    return centred.T @ centred / len(x)


def test_each_transform_leaves_the_covariance_that_it_is_named_after(features):
    before = covariance(features)
    identity = torch.eye(6, dtype=torch.float64)
    done = {name: covariance(f(features)) for name, f in whitening.TRANSFORMS.items()}
    assert torch.equal(done["as they are"], before)
    variances = before.diag()
    scale = (variances + whitening.EPS).rsqrt()
    assert torch.allclose(done[whitening.BNEXT], before * torch.outer(scale, scale), atol=1e-12)
    decorrelated = done["decorrelated (PCA)"]
    assert torch.allclose(decorrelated, decorrelated.diag().diag(), atol=1e-10)
    assert torch.allclose(decorrelated.diag(), torch.linalg.eigvalsh(before), atol=1e-10)
    assert torch.allclose(done[whitening.ZCA], identity, atol=1e-8)
    assert torch.allclose(done["coloured again"], before, atol=1e-8)


def test_whitening_is_zca_the_nearest_to_the_input(features):
    """Its matrix is symmetric, which that of no other whitening is."""
    centred = features - features.mean(0)
    matrix = torch.linalg.lstsq(centred, whitening.whiten(features)).solution
    assert torch.allclose(matrix, matrix.T, atol=1e-8)


def test_standardised_is_bnexts(features):
    expected = reference.forward(features, eps=whitening.EPS).output
    assert torch.allclose(whitening.standardise(features), expected, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_gamma_and_beta_give_the_input_back(features, dtype, tolerance):
    assert whitening.identity_error(features.to(dtype)) < tolerance


def test_covariance_in_numbers():
    x = torch.tensor([[2.0, 1.0], [-2.0, -1.0], [2.0, 1.0], [-2.0, -1.0]])
    found = whitening.Covariance.of(x)
    assert found[1:] == pytest.approx((1.0, 4.0, 1.0, 3.0))


# The shift


def test_drift_is_in_standard_deviations():
    x = torch.randn(1000, 4)
    std, mean = torch.std_mean(x, 0)
    assert covariate_shift.drift(x, x) == 0
    assert covariate_shift.drift(x, x + 3 * std) == pytest.approx(3, rel=1e-4)
    assert covariate_shift.drift(x, mean + 1.5 * (x - mean)) == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize("norm", [False, True])
def test_sigmoids_inputs_are_those_of_training_and_nothing_is_counted(digits, norm):
    model = training.mlp(digits, norm, std=0.3).train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    images = digits.images[:50]
    found = covariate_shift.sigmoid_inputs(model, images)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    expected: list[torch.Tensor] = []
    for layer in model:
        if isinstance(layer, nn.Sigmoid):
            layer.register_forward_pre_hook(lambda _, args: expected.append(args[0].detach()))
    model(images)
    assert len(found) == 3
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


# Training


@pytest.mark.parametrize("make", [training.mlp, training.cnn])
def test_networks_have_bnexts_norms_and_no_redundant_bias(digits, make):
    for norm in (False, True):
        model = make(digits, norm)
        norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
        assert all(type(m).__module__ == "bnext.modules" for m in norms)
        assert len(norms) == (0 if not norm else 3 if make is training.mlp else 4)
        for layer, after in itertools.pairwise(model):
            if isinstance(layer, nn.Linear | nn.Conv2d):
                assert (layer.bias is None) == (after in norms)


def test_training_learns_and_is_the_same_for_the_same_seed(digits):
    histories = []
    for _ in range(2):
        torch.manual_seed(0)
        model = training.mlp(digits, True)
        histories.append(training.train(model, digits, 0.5, 60, seed=0, every=25))
    assert histories[0] == histories[1]
    assert histories[0].steps == [25, 50, 60] and histories[0].accuracies[-1] > 0.8


def test_a_run_that_diverges_stops_and_is_counted(digits):
    torch.manual_seed(0)
    model = training.mlp(digits, False, nn.ReLU, std=10.0)
    history = training.train(model, digits, 1.0, 500, seed=0, every=500)
    assert history.diverged and len(history.losses) < 500
    assert len(history.accuracies) == len(history.steps) == 1
    assert learning_rate.failed(history)


def test_steps_to_an_accuracy():
    history = History([1.0], [10, 20, 30], [0.5, 0.9, 0.8])
    assert history.steps_to(0.9) == 20 and history.steps_to(0.95) == math.inf


# The formulas


def test_every_formula_stands_beside_one_line_of_code():
    for formula in formulas.FORMULAS:
        assert formula.code in formula.line


def test_a_wrong_gradient_is_found(digits, monkeypatch):
    assert not formulas.run(setup(digits)).failures
    right = bnext.functional.batch_norm

    def wrong(x, *args, **kwargs):  # the statistics kept out of the gradient
        return right(x.detach(), *args, **kwargs) + 0 * x

    monkeypatch.setattr(bnext.functional, "batch_norm", wrong)
    found = formulas.run(setup(digits))
    assert found.failures and "is not confirmed" in found.sentence


# The sentences


def test_words():
    assert finding.spread([1.0, 2.0, 3.0], ".1f") == "2.0 ± 1.0"
    assert finding.spread([1.0, math.nan]) == "not finite in 1 of 2"
    assert finding.steps_words([10, 20, math.inf]) == "15 ± 7 (1 of 3 never)"
    assert finding.steps_words([10, math.inf]) == "10 (1 of 2 never)"
    assert finding.steps_words([math.inf] * 2) == "never"


def test_a_difference_counts_beyond_two_standard_errors():
    a, b = [1.0, 1.1, 1.2], [1.05, 1.15, 1.25]
    assert finding.judge(a, b) == finding.judge(b, a) == "is within the seeds' noise"
    far = [5.0, 5.1, 5.2]
    assert finding.judge(a, far) == "is confirmed"
    assert finding.judge(far, a) == "is not confirmed"
    assert finding.judge([1.0, 2.0], [math.inf, 2.0]) == "is confirmed"


def made_up(better: bool):
    """A `train` that finds networks with batch norm better, or worse."""

    def train(model, data, lr, steps, seed, every=50, **_):
        good = any(isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d) for m in model) is better
        jitter = 0.001 * seed
        if good:
            return History([0.1], [10, 20], [0.9 + jitter, 0.9 + jitter])
        return History([2.0], [10, 20], [0.3, 0.8 + jitter if lr < 1 else 0.1])

    return train


@pytest.mark.parametrize("better", [True, False])
def test_what_is_said_follows_from_the_numbers(digits, better, monkeypatch):
    for module in (learning_rate, initialisation, regularisation):
        monkeypatch.setattr(module, "train", made_up(better))
    monkeypatch.setattr(regularisation, "accuracy", lambda *_: 1.0)
    for module, claims_made in (
        (learning_rate, [f"the {n} takes higher learning rates {{}}" for n in ("MLP", "CNN")]),
        (initialisation, ["sensitivity {}"]),
        (regularisation, ["norm alone {}", "another regulariser {}"]),
    ):
        sentence = module.run(setup(digits)).sentence
        for claim in claims_made:
            said = claim.format("is confirmed" if better else "is not confirmed")
            assert said in sentence, sentence


# The command


def test_quick_run_writes_everything_and_says_where_it_is_from(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks", "claims", "--quick", "--out", tmp_path],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=300,
        env={**os.environ, "KERAS_BACKEND": "torch"},
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    names = [*claims.EXPERIMENTS]
    assert {p.name for p in tmp_path.iterdir()} == {
        "claims.md", *(f"claims-{n}.{kind}" for n in names for kind in ("csv", "png"))
    }  # fmt: skip
    page = (tmp_path / "claims.md").read_text()
    for name in names:
        with (tmp_path / f"claims-{name}.csv").open() as file:
            facts, rows = [], []
            for line in file:
                (facts if line.startswith("# ") else rows).append(line)
        head = dict(fact[2:].rstrip("\n").split(": ", 1) for fact in facts)
        assert {"date", "commit", "cpu", "torch", "data", "seeds", "finding"} <= head.keys()
        assert head["finding"] in page and f"claims-{name}.png" in page
        assert len([*csv.DictReader(rows)]) > 1
        assert head["finding"].split()[0] in result.stdout
