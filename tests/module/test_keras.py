"""bnext.keras: Keras' layer, in everything but how it computes."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import train
from bnext import reference

ROOT = Path(__file__).resolve().parents[2]
EPS, MOMENTUM = 1e-3, 0.99  # Keras' defaults


@pytest.fixture(scope="module")
def keras():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KERAS_BACKEND", "torch")
        import keras

        yield keras


@pytest.fixture(scope="module")
def layer(keras):
    import bnext.keras

    return bnext.keras.BatchNormalization


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_weights(norm, shape):
    """Built, with weights that are not the initial ones."""
    norm.build(shape)
    for seed, variable in enumerate(norm.weights):
        variable.assign(random(*variable.shape, seed=seed + 1).abs() + 0.5)
    return norm


SHAPES = [
    ((8, 6), -1), ((8, 4, 6), -1), ((8, 6, 4), 1), ((8, 5, 5, 6), -1), ((8, 6, 5, 5), 1),
    ((2, 3, 4, 5, 6), 4), ((3, 2, 2, 2, 2, 5), -1), ((3, 5, 2, 2, 2, 2), 1), ((6, 3, 4), 0),
]  # fmt: skip
# The dtype of the layer, of its input, and the error that this makes unavoidable.
POLICIES = {
    "float32": (torch.float32, 1e-6), "float64": (torch.float64, 1e-12),
    "mixed_float16": (torch.float16, 2e-3), "mixed_bfloat16": (torch.bfloat16, 2e-2),
    "bfloat16": (torch.bfloat16, 2e-2),
}  # fmt: skip


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("shape", "axis", "policy"),
    [(*s, "float32") for s in SHAPES] + [(*s, p) for s in SHAPES[2:4] for p in [*POLICIES][1:]],
)
def test_values_and_gradients_are_those_of_the_formulas(layer, shape, axis, policy, training):
    dtype, tolerance = POLICIES[policy]
    norm = with_weights(layer(axis=axis, dtype=policy), shape)
    gamma, beta, mean, var = (w.value.detach().double().clone() for w in norm.weights)
    x = (3 * random(*shape) + 2).to(dtype).requires_grad_()
    dy = random(*shape, seed=1).to(dtype)
    assert norm.explain(x, training) == "bnext"
    output = norm(x, training=training)
    dx, dgamma, dbeta = torch.autograd.grad(output, (x, norm.gamma.value, norm.beta.value), dy)
    assert output.dtype is dtype and output.shape == x.shape and dx.dtype is dtype

    # The reference has the channels second, and any number of other dimensions.
    xc, dyc = x.detach().movedim(axis, 1), dy.movedim(axis, 1)
    stats = None if training else (mean, var)
    expected = {
        "output": reference.forward(xc, gamma, beta, stats=stats, eps=EPS).output.movedim(1, axis)
    }
    d = reference.backward(dyc, xc, gamma, stats, EPS)
    expected |= {"dx": d.input.movedim(1, axis), "dgamma": d.weight, "dbeta": d.bias}
    if training:
        batch_mean, batch_var = reference.batch_stats(xc)
        mean = mean * MOMENTUM + batch_mean * (1 - MOMENTUM)
        var = var * MOMENTUM + batch_var * (1 - MOMENTUM)
    expected |= {"moving mean": mean, "moving variance": var}
    results = output, dx, dgamma, dbeta, norm.moving_mean.value, norm.moving_variance.value
    for result, (name, exact) in zip(results, expected.items(), strict=True):
        error = (result.detach().double() - exact).abs().max() / exact.abs().max()
        assert error < tolerance, name


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(0, 6), (0, 5, 6), (4, 0, 6), (4, 0), (4, 5, 0)])
def test_empty_inputs_are_as_in_keras(layer, keras, shape, training):
    kinds = layer, keras.layers.BatchNormalization
    ours, theirs = (with_weights(kind(), shape) for kind in kinds)
    results = [n(torch.zeros(shape), training=training) for n in (ours, theirs)]
    assert results[0].shape == results[1].shape == shape
    for a, b in zip(ours.weights, theirs.weights, strict=True):
        assert torch.allclose(a.value, b.value, equal_nan=True)


@pytest.mark.parametrize("kwargs", [{"center": False}, {"scale": False}])
def test_without_gamma_or_beta(layer, kwargs):
    norm = with_weights(layer(**kwargs), (8, 6))
    x = random(8, 6).float()
    given = {"weight": norm.gamma, "bias": norm.beta}
    given = {k: None if v is None else v.value.detach() for k, v in given.items()}
    expected = reference.forward(x, **given, eps=EPS).output
    assert (norm(x, training=True).double() - expected).abs().max() < 1e-5


def test_integers_are_normalised_in_float32(layer):
    x = torch.arange(12).view(4, 3)
    output = layer()(x, training=True)
    assert output.dtype is torch.float32
    assert (output.double() - reference.forward(x, eps=EPS).output).abs().max() < 1e-6


def test_a_large_mean_costs_nothing_where_keras_loses_all(layer, keras):
    x = (random(512, 8) + 1e3).float()
    expected = reference.forward(x, eps=EPS).output
    errors = [
        (norm()(x, training=True).double() - expected).abs().max().item()
        for norm in (layer, keras.layers.BatchNormalization)
    ]
    assert errors[0] < 1e-5 < 1e-2 < errors[1]


def test_frozen_layers_are_in_inference_mode(layer):
    norm = with_weights(layer(), (8, 6))
    norm.trainable = False
    before = [w.numpy().copy() for w in norm.weights]
    gamma, beta, mean, var = (torch.tensor(w) for w in before)
    x = random(8, 6).float()
    expected = reference.forward(x, gamma, beta, stats=(mean, var), eps=EPS).output
    assert (norm(x, training=True).double() - expected).abs().max() < 1e-5
    assert all(np.array_equal(w.numpy(), b) for w, b in zip(norm.weights, before, strict=True))


MASK = torch.tensor([[True, True, False, True]] * 8)
LEFT_TO_KERAS = {
    "a mask": ((8, 4, 6), {}, {"mask": MASK}),
    "renorm": ((8, 6), {"renorm": True}, {}),
    "one value per feature": ((1, 6), {}, {}),
    "epsilon": ((8, 6), {"epsilon": 0.0}, {}),
}


@pytest.mark.parametrize("why", LEFT_TO_KERAS)
def test_the_rest_is_keras_own_and_said_to_be(layer, keras, why):
    shape, kwargs, call = LEFT_TO_KERAS[why]
    if why == "renorm" and why not in layer().get_config():
        pytest.skip("this Keras has no renorm")
    ours, theirs = (n(**kwargs) for n in (layer, keras.layers.BatchNormalization))
    x = random(*shape).float()
    said = ours.explain(x, training=True, **call)
    assert said.startswith("Keras: ") and why in said
    assert (ours.explain(x, training=False, **call) == "bnext") is (why == "one value per feature")
    if call:
        assert ours.explain(x, training=True) == "bnext"
    for training in (True, False):
        results = [n(x, training=training, **call) for n in (ours, theirs)]
        assert torch.allclose(*results, rtol=1e-6, atol=1e-6)
    for a, b in zip(ours.weights, theirs.weights, strict=True):
        assert torch.equal(a.value, b.value)


def test_a_mask_from_another_layer_counts(layer, keras):
    x = random(8, 4, 6).float()
    x[:, 2] = 0
    ours, theirs = (
        keras.Sequential([keras.layers.Masking(), n()])
        for n in (layer, keras.layers.BatchNormalization)
    )
    assert torch.equal(ours(x, training=True), theirs(x, training=True))
    assert torch.equal(*(m.layers[1].moving_mean.value for m in (ours, theirs)))


def network(keras, norm, **compiled):
    keras.utils.set_random_seed(7)
    model = keras.Sequential(
        [
            keras.layers.Input((8, 8, 1)),
            keras.layers.Conv2D(8, 3), norm(momentum=0.9, name="first"),
            keras.layers.Flatten(), norm(momentum=0.9, name="second"),
            keras.layers.Dense(10),
        ]
    )  # fmt: skip
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.01), loss, metrics=["accuracy"], **compiled)
    return model


def digits():
    images, labels, test_images, test_labels = train.digits()
    return [
        t.numpy() for t in (images.movedim(1, -1), labels, test_images.movedim(1, -1), test_labels)
    ]


def test_fit_on_the_digits_ends_where_keras_does(layer, keras):
    x, y, test_x, test_y = digits()
    kinds = layer, keras.layers.BatchNormalization
    models = [network(keras, norm) for norm in kinds]
    images = random(60, 8, 8, 1).float()
    assert models[0].get_layer("first").explain(models[0].layers[0](images)) == "bnext"
    histories = []
    for model in models:
        keras.utils.set_random_seed(7)
        histories.append(model.fit(x, y, 60, 3, verbose=0).history["loss"])
    assert np.allclose(*histories, rtol=1e-4)
    for a, b in zip(*(model.weights for model in models), strict=True):
        assert np.allclose(a.numpy(), b.numpy(), rtol=1e-3, atol=1e-4), a.path
    accuracies = [model.evaluate(test_x, test_y, verbose=0)[1] for model in models]
    assert abs(accuracies[0] - accuracies[1]) <= 1.01 / len(test_y) and accuracies[0] > 0.8
    assert np.allclose(*(model.predict(test_x, verbose=0) for model in models), atol=1e-2)


def test_saved_models_and_weights_go_both_ways(layer, keras, tmp_path):
    x, y, *_ = digits()
    theirs = keras.layers.BatchNormalization
    ours = network(keras, layer)
    ours.fit(x[:600], y[:600], 60, 1, verbose=0)
    expected = ours.predict(x, verbose=0)
    ours.save(tmp_path / "ours.keras")
    ours.save_weights(tmp_path / "ours.weights.h5")
    load = keras.saving.load_model
    result = run(  # where there is no bnext
        "import keras\n"
        "theirs = keras.layers.BatchNormalization\n"
        f"model = keras.saving.load_model({str(tmp_path / 'ours.keras')!r},\n"
        "    custom_objects={'bnext>BatchNormalization': theirs})\n"
        "assert type(model.get_layer('first')) is theirs\n"
        f"model.save({str(tmp_path / 'theirs.keras')!r})"
    )
    assert result.returncode == 0, result.stderr
    theirs_loaded = load(tmp_path / "theirs.keras")
    swap = {theirs: layer}
    back = keras.models.clone_model(
        theirs_loaded,
        clone_function=lambda old: swap.get(type(old), type(old)).from_config(old.get_config()),
    )
    back.set_weights(theirs_loaded.get_weights())
    other = network(keras, theirs)
    other.load_weights(tmp_path / "ours.weights.h5")
    other.save_weights(tmp_path / "theirs.weights.h5")
    again = network(keras, layer)
    again.load_weights(tmp_path / "theirs.weights.h5")
    loaded = load(tmp_path / "ours.keras")
    for model in (loaded, theirs_loaded, back, other, again):
        assert np.allclose(model.predict(x, verbose=0), expected, atol=1e-3)
    for model in (loaded, back):
        assert type(model.get_layer("first")) is type(model.get_layer("second")) is layer
    kwargs = {"axis": 1, "momentum": 0.5, "name": "norm"}
    assert layer(**kwargs).get_config() == theirs(**kwargs).get_config()


def test_a_model_of_ones_own_is_built_from_symbols(layer, keras):
    class Model(keras.Model):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = keras.layers.Conv2D(4, 3), layer()

        def call(self, x, training=None):
            return self.norm(self.conv(x), training=training)

    model = Model()
    assert model(keras.Input((8, 8, 1))).shape == (None, 6, 6, 4)
    before = model.norm.moving_mean.numpy().copy()
    assert np.array_equal(before, np.zeros(4))
    model(random(2, 8, 8, 1).float(), training=True)
    assert not np.array_equal(model.norm.moving_mean.numpy(), before)


def test_stateless_calls_change_nothing(layer):
    norm = with_weights(layer(), (8, 6))
    x = random(8, 6).float()
    given = [v.value.detach().clone() for v in norm.non_trainable_variables]
    _, (mean, var) = norm.stateless_call(norm.trainable_variables, given, x, training=True)
    batch_mean, batch_var = reference.batch_stats(x)
    for variable, old, new, batch in zip(
        norm.non_trainable_variables, given, (mean, var), (batch_mean, batch_var), strict=True
    ):
        assert torch.equal(variable.value, old)
        expected = old.double() * MOMENTUM + batch * (1 - MOMENTUM)
        assert (new.double() - expected).abs().max() < 1e-6


def test_compiled_calls_are_eagers(layer):
    # What a compiled `fit` comes to, at a tenth of its time.
    norms = [with_weights(layer(), (8, 6)) for _ in range(2)]
    calls = torch.compile(norms[0].call, backend="aot_eager"), norms[1].call
    x = random(8, 6).float().requires_grad_()
    results = []
    for norm, call in zip(norms, calls, strict=True):
        output = call(x, training=True)
        wanted = x, norm.gamma.value, norm.beta.value
        gradients = torch.autograd.grad(output, wanted, random(8, 6, seed=1).float())
        results.append([output, *gradients, *(w.value for w in norm.weights)])
    torch.compiler.reset()
    for compiled, eager in zip(*results, strict=True):
        assert torch.allclose(compiled, eager, rtol=1e-6, atol=1e-6)


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "KERAS_BACKEND": "torch"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_another_backend_is_refused():
    result = run(
        "import sys, types\n"
        "keras = sys.modules['keras'] = types.ModuleType('keras')\n"
        "keras.backend = types.SimpleNamespace(backend=lambda: 'tensorflow')\n"
        "import bnext.keras"
    )
    last = result.stderr.strip().splitlines()[-1]
    assert result.returncode == 1 and last.startswith("ImportError: ")
    assert "torch backend" in last and "tensorflow" in last and "KERAS_BACKEND=torch" in last


def test_without_keras_the_error_says_what_to_install():
    result = run("import sys; sys.modules['keras'] = None; import bnext; import bnext.keras")
    last = result.stderr.strip().splitlines()[-1]
    assert result.returncode == 1 and last.startswith("ImportError: ")
    assert "pip install keras" in last and "KERAS_BACKEND=torch" in last
