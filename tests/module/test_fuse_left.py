"""What convert(model, fuse=True) may not fuse: something else could see it. Each has its reason."""

import copy

import pytest
import torch
import torch.nn.functional as F
from test_fuse import Sample
from torch import Tensor, nn

import bnext


class UsedTwice(Sample):
    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(x)
        return y.relu() + y


class ModeDependent(Sample):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.bn(x).relu(), 0.5, self.training)


class Counting(Sample):
    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.bn(x).relu()


class Branching(Sample):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn(x).relu() if x.sum() > 0 else self.bn(x)


class ChangesTheOther(Sample):
    def forward(self, x: Tensor) -> Tensor:
        y = x * 1
        z = y[0]
        y += self.bn(x)
        return y.relu() + z


class ChangesItsInput(Sample):
    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        y = self.bn(x)
        with_more = x.add_(1)
        return y.relu() + with_more


class ChangesItsInputThroughAView(Sample):
    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        view = x[0]
        y = self.bn(x)
        view.add_(1)
        return y.relu() + x


class ChangesTheBatchNorm(Sample):
    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(x)
        self.bn.bias.detach().add_(1)
        return y.relu()


class Scaled(Sample):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(torch.add(self.bn(x), x, alpha=2))


class PlusNumber(Sample):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(x) + 1)


class Itself(Sample):
    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(x)
        return torch.relu(y + y)


class OtherActivation(Sample):
    def forward(self, x: Tensor) -> Tensor:
        return F.softplus(self.bn(x))


class OtherActivationModule(Sample):
    def __init__(self) -> None:
        super().__init__()
        self.prelu = nn.PReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.prelu(self.bn(x))


class Clamped(Sample):
    """Not hardtanh: at the limits its gradient passes."""

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(x).clamp(0, 6)


class ReturnedWithOthers(Sample):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.bn(x), x


class Unused(Sample):
    def forward(self, x: Tensor) -> Tensor:
        self.bn(x)
        return x


class TakesTheStatistics(Sample):
    """In between they have moved, and a batch norm that waited would not have moved them."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(x)
        return (y + self.bn.running_mean.reshape(3, 1, 1).expand_as(x)).relu()


class ChangesTheResidual(Sample):
    def forward(self, x: Tensor) -> Tensor:
        other = x * 1
        y = self.bn(x) + other
        other.add_(1)
        return y.relu()


class ChangesTheResidualThroughABuffer(Sample):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.zeros(3, 1, 1))
        self.register_buffer("view", self.shift[:])

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(x) + self.shift
        self.view.add_(1)
        return y.relu()


class CalledInBetween(Sample):
    """The order of two calls shows in the running statistics."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(x)
        z = self.bn(x * 2)
        return (y + z.neg()).relu()


class ChildChangesItsInput(Sample):
    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(3, 3, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        y = self.bn(x)
        return (y + self.branch(x)).relu()


REASONS = {
    UsedTwice: "used more than once", ModeDependent: "training and eval",
    Counting: "changes the module", Branching: "cannot be traced",
    ChangesTheOther: "something else may read", ChangesItsInput: "add_ may change what it reads",
    ChangesItsInputThroughAView: "add_ may change", ChangesTheBatchNorm: "detach takes what it",
    Scaled: "scaled", PlusNumber: "no other tensor", Itself: "no other tensor",
    OtherActivation: "function softplus takes", OtherActivationModule: "PReLU prelu takes",
    Clamped: "method clamp takes", ReturnedWithOthers: "forward returns it",
    Unused: "nothing uses", ChangesTheResidual: "add_ may change what it reads",
    ChangesTheResidualThroughABuffer: "add_ may change what it reads",
    TakesTheStatistics: "reshape takes what it holds", CalledInBetween: "method neg takes",
    ChildChangesItsInput: "Sequential branch may change",
}  # fmt: skip


@pytest.mark.parametrize("kind", REASONS, ids=lambda k: k.__name__)
def test_what_may_not_be_fused_is_left_and_reported(kind) -> None:
    original = kind()
    model = bnext.convert(copy.deepcopy(original), fuse=True)
    assert type(model) is kind and type(model.bn) is bnext.BatchNorm2d
    assert vars(model).keys() == vars(original).keys() and model.calls == 0
    report = bnext.conversion_report(model, fuse=True)
    assert REASONS[kind] in report.unfused["bn"]
    assert report.unfused["bn"] in str(report)
    x = torch.randn(2, 3, 4, 4)
    for mode in (True, False):
        torch.manual_seed(0)
        y = model.train(mode)(x)
        torch.manual_seed(0)
        torch.testing.assert_close(y, original.train(mode)(x))
