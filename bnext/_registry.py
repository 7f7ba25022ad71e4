"""Which class `convert` puts in the place of which, and `revert` back."""

from torch import nn

from bnext import modules
from bnext.distributed import SyncBatchNorm

__all__ = ["OURS", "THEIRS", "register"]

OURS: dict[type[nn.Module], type[nn.Module]] = {}
"""What :func:`bnext.convert` makes of each class."""
THEIRS: dict[type[nn.Module], type[nn.Module]] = {}
"""What :func:`bnext.revert` makes of it again."""


def register(theirs: type[nn.Module], ours: type[nn.Module]) -> None:
    """Let :func:`bnext.convert` turn modules of the class :attr:`theirs` into :attr:`ours`.

    It is for batch norms of other libraries. :func:`bnext.revert` turns them back, and
    :func:`bnext.conversion_report` counts them. The batch norms of torch.nn are registered, and so
    are timm's, torchvision's and transformers' (see :func:`bnext.convert`).

    Both change the class of a module and nothing else: ``__init__`` does not run. So :attr:`ours`
    has to compute what :attr:`theirs` does from the attributes that :attr:`theirs` sets. Only
    modules of exactly the class :attr:`theirs` are converted, not of its subclasses. Another
    registration of :attr:`theirs` replaces this one for modules that are converted from then on.

    Args:
        theirs: the class of another library.
        ours: a subclass of :attr:`theirs`. It may override methods, but not ``__init__``, and adds
            no ``__slots__``.

    Raises:
        TypeError: one of them is no class of modules, or :attr:`ours` cannot stand in for
            :attr:`theirs`.
        ValueError: :attr:`ours` is registered for another class, or one of them is registered in
            the other's role.

    Example::

        >>> class Frozen(detr.FrozenBatchNorm2d):
        ...     def forward(self, x):
        ...         statistics = self.running_mean, self.running_var
        ...         return bnext.functional.batch_norm(x, *statistics, self.weight, self.bias)
        >>> bnext.register(detr.FrozenBatchNorm2d, Frozen)
        >>> model = bnext.convert(detr.resnet50())
    """
    for argument, kind in (("theirs", theirs), ("ours", ours)):
        if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
            raise TypeError(f"{argument} must be a subclass of torch.nn.Module, but got {kind!r}")
    if not issubclass(ours, theirs) or ours is theirs:
        raise TypeError(
            f"ours must be a subclass of {_name(theirs)}, so that what looks for that finds it, "
            f"but got {_name(ours)}"
        )
    # Looked up on the class, which is what the swap leaves out.
    if ours.__init__ is not theirs.__init__:
        raise TypeError(
            f"ours must not have an __init__ of its own, since convert changes the class of a "
            f"module that exists, but {_name(ours)} has one"
        )
    try:
        object.__setattr__(object.__new__(theirs), "__class__", ours)
    except TypeError as error:
        raise TypeError(
            f"ours must have the layout of {_name(theirs)}, without __slots__ of its own, but "
            f"{_name(ours)} has not: {error}"
        ) from error
    if THEIRS.get(ours, theirs) is not theirs:
        raise ValueError(f"ours: {_name(ours)} already stands for {_name(THEIRS[ours])}")
    # Converting twice would go further than reverting goes back.
    if theirs in THEIRS:
        raise ValueError(f"theirs: {_name(theirs)} stands for {_name(THEIRS[theirs])} itself")
    if ours in OURS:
        raise ValueError(f"ours: {_name(ours)} becomes {_name(OURS[ours])} itself")
    OURS[theirs], THEIRS[ours] = ours, theirs


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


for _prefix in ("BatchNorm", "LazyBatchNorm"):
    for _dimensions in ("1d", "2d", "3d"):
        register(getattr(nn, _prefix + _dimensions), getattr(modules, _prefix + _dimensions))
# Not a subclass: see its docstring.
OURS[nn.SyncBatchNorm], THEIRS[SyncBatchNorm] = SyncBatchNorm, nn.SyncBatchNorm
