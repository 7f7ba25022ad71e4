"""act= in all its spellings: a name, a module of torch.nn, its class, or none."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import Tensor, nn

import bnext
from bnext import reference
from bnext._activation import of_module
from bnext.functional import batch_norm_act

GIVEN = {  # act: and the name and parameter that it stands for
    nn.ReLU(inplace=True): ("relu", None), nn.ReLU6(): ("relu6", None),
    nn.Hardtanh(0.0, 6.0): ("relu6", None), nn.LeakyReLU(0.1): ("leaky_relu", 0.1),
    nn.SiLU(): ("silu", None), nn.Hardswish(): ("hardswish", None), nn.GELU(): ("gelu", None),
    nn.GELU("tanh"): ("gelu_tanh", None), nn.ELU(2): ("elu", 2.0), nn.Tanh(): ("tanh", None),
    nn.Sigmoid(): ("sigmoid", None), nn.Identity(): (None, None), nn.ReLU: ("relu", None),
    nn.ReLU6: ("relu6", None), nn.LeakyReLU: ("leaky_relu", None), nn.SiLU: ("silu", None),
    nn.Hardswish: ("hardswish", None), nn.GELU: ("gelu", None), nn.ELU: ("elu", None),
    nn.Tanh: ("tanh", None), nn.Sigmoid: ("sigmoid", None), nn.Identity: (None, None),
    None: (None, None), **{name: (name, None) for name in reference.ACTIVATIONS},
}  # fmt: skip
DEFAULTS = {"leaky_relu": 0.01, "elu": 1.0}


class Doubled(nn.SiLU):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


NONE = [  # no activation of ours
    nn.Softplus(), nn.Hardtanh(), nn.Hardtanh(-6, 6), nn.PReLU(), nn.Sequential(nn.ReLU()),
    Doubled(),
    nn.LeakyReLU(-1, inplace=True), nn.ELU(-1, inplace=True), nn.LeakyReLU(torch.tensor(0.1)),
]  # fmt: skip


def expected(x: Tensor, residual: Tensor | None, act: object) -> Tensor:
    name, param = GIVEN[act]
    param = DEFAULTS.get(name, 0.0) if param is None else param
    y: Tensor = reference.forward(
        x, torch.ones(3), torch.zeros(3), residual, act=name, act_param=param
    ).output
    return y


@pytest.mark.parametrize("residual", [False, True], ids=["", "add"])
@pytest.mark.parametrize("act", GIVEN, ids=str)
def test_module_and_function_compute_what_act_stands_for(act, residual) -> None:
    x, z = torch.randn(2, 4, 3, 5, 5, dtype=torch.float64) * 3
    r = z if residual else None
    module, plain = bnext.BatchNormAct2d(3, act=act).double(), nn.BatchNorm2d(3).double()
    assert (module.act, module.act_param) == GIVEN[act]
    assert module.state_dict().keys() == plain.state_dict().keys() and not [*module.children()]
    want = expected(x, r, act)
    torch.testing.assert_close(module(x, r), want, rtol=1e-9, atol=1e-9)
    y = batch_norm_act(x, None, None, residual=r, training=True, act=act)
    torch.testing.assert_close(y, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("make", [bnext.BatchNormAct1d, bnext.BatchNormAct3d, bnext.SyncBatchNorm])
def test_the_other_modules_take_them_too(make) -> None:
    module = make(3, act=nn.LeakyReLU(0.3))
    assert (module.act, module.act_param) == ("leaky_relu", 0.3)
    assert (make(3, act=nn.ELU, act_param=2).act_param) == 2
    assert "act='leaky_relu', act_param=0.3" in repr(module)


def test_a_later_change_of_the_given_module_is_not_seen() -> None:
    given = nn.LeakyReLU(0.1)
    module = bnext.BatchNormAct1d(3, act=given)
    given.negative_slope = 0.5
    assert module.act_param == 0.1


@pytest.mark.parametrize("residual", [False, True], ids=["", "add"])
@pytest.mark.parametrize("act", [nn.SiLU(), nn.LeakyReLU(0.2), nn.GELU("tanh"), None], ids=str)
def test_it_is_copied_pickled_scripted_traced_and_compiled(act, residual) -> None:
    x, z = torch.randn(2, 4, 3, 5, 5)
    arguments = (x, z) if residual else (x,)
    module = bnext.BatchNormAct2d(3, act=act, track_running_stats=False)
    want = module(*arguments)
    torch._dynamo.reset()
    twins = [
        copy.deepcopy(module), pickle.loads(pickle.dumps(module)),
        torch.compile(module, backend="aot_eager", fullgraph=True),
    ]  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of TorchScript
        twins += [torch.jit.script(module), torch.jit.trace(module, arguments)]
    for twin in twins:
        torch.testing.assert_close(twin(*arguments), want)


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.act = nn.LeakyReLU(0.2)

    def forward(self, x: Tensor) -> Tensor:
        return batch_norm_act(x, None, None, training=True, act=self.act)


def test_the_function_with_a_module_is_traced_and_compiled() -> None:
    model, x = Functional(), torch.randn(4, 3, 5)
    torch._dynamo.reset()
    want = model(x)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), want)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), want)


def test_explain_takes_them_too() -> None:
    explanation = bnext.explain((4, 3, 5), act=nn.Hardswish())
    assert str(explanation) == str(bnext.explain((4, 3, 5), act="hardswish"))
    with pytest.raises(ValueError, match=r"act must be one of .* but got Softplus"):
        bnext.explain((4, 3, 5), act=nn.Softplus())


@pytest.mark.parametrize("module", NONE, ids=str)
def test_what_computes_something_else_has_no_name(module) -> None:
    assert of_module(module) is None
