"""Batch normalisation for Keras 3 on its torch backend: Keras' layer, computed by bnext."""

import math
from typing import Any

import torch
from torch import Tensor

from bnext._ops import _C, DEVICES
from bnext.functional import batch_norm

try:
    import keras
except ImportError as error:
    raise ImportError(
        f"bnext.keras needs Keras 3 ({error}): pip install keras, and set KERAS_BACKEND=torch"
    ) from error
if keras.backend.backend() != "torch":
    raise ImportError(
        "bnext.keras needs Keras' torch backend, but Keras runs on "
        f"{keras.backend.backend()}: set KERAS_BACKEND=torch before keras is imported"
    )

__all__ = ["BatchNormalization"]


@keras.saving.register_keras_serializable("bnext")
class BatchNormalization(keras.layers.BatchNormalization):
    r"""Batch normalisation: a drop-in for ``keras.layers.BatchNormalization``.

    Same constructor, weights, config and results; see there. bnext's op reads the activation
    once if it fits the cache, and sums :math:`(x - \mathrm{E}[x])^2`. Keras' torch backend
    composes elementwise operations and takes :math:`\mathrm{E}[x^2] - \mathrm{E}[x]^2`, where a
    large mean drowns the variance. As in Keras, :attr:`momentum` is the weight of the old
    moving statistics, and the moving variance is the biased one. (A float64 input is computed
    in float64; Keras casts it to float32.)

    Keras' own code runs what bnext does not compute: a call with a :attr:`mask`, ``renorm``,
    training on a single value per feature, and inputs without kernels (such as complex numbers).
    :meth:`explain` says whose code a call runs.

    Configs and weights fit both layers: ``keras.models.clone_model`` with a ``clone_function`` and
    ``set_weights`` exchange one for the other. A saved model names its own layer; without bnext,
    load it by ``keras.saving.load_model(path, custom_objects={"bnext>BatchNormalization":
    keras.layers.BatchNormalization})``.

    Args:
        axis, momentum, epsilon, ...: those of ``keras.layers.BatchNormalization``.

    Shape:
        - Input: any, with the features in :attr:`axis`
        - Output: as the input

    Raises:
        ImportError: on ``import bnext.keras``, without Keras or with another backend than torch.

    Example::

        >>> model = keras.Sequential([
        ...     keras.layers.Conv2D(16, 3),
        ...     keras.layers.Flatten(),
        ...     bnext.keras.BatchNormalization(),
        ...     keras.layers.Dense(10),
        ... ])
    """

    def call(self, inputs: Any, training: bool | None = None, mask: Any = None) -> Any:
        """Normalise a batch, and in training move the moving statistics.

        Args:
            inputs: whatever Keras converts to a tensor; integers become float32.
            training: normalise by the batch, if the layer is trainable; else, and by default, by
                the moving statistics.
            mask: which values count (``True``), or ``None`` for all.

        Returns:
            A tensor of the inputs' shape, in the layer's compute dtype.
        """
        x = keras.ops.convert_to_tensor(inputs)
        training = bool(training and self.trainable)
        if self._why_not(x, training, mask) is not None:
            return super().call(inputs, training=training, mask=mask)
        if not x.is_floating_point():
            x = x.to(torch.float32)
        # As in Keras the layer's dtype does not matter: 16-bit inputs have float32 parameters.
        dtype = "float64" if x.dtype is torch.float64 else "float32"
        gamma = keras.ops.cast(self.gamma, dtype) if self.scale else None
        beta = keras.ops.cast(self.beta, dtype) if self.center else None
        mean = keras.ops.cast(self.moving_mean, dtype)
        variance = keras.ops.cast(self.moving_variance, dtype)
        matrix = self._channels_second(x)
        if not training:
            output = batch_norm(matrix, mean, variance, gamma, beta, False, 0.0, self.epsilon)
        else:
            # With momentum 1 the running statistics of the op are the batch's.
            batch_mean, batch_var = torch.zeros_like(mean), torch.zeros_like(variance)
            output = batch_norm(matrix, batch_mean, batch_var, gamma, beta, True, 1.0, self.epsilon)
            count = matrix.numel() // matrix.shape[1]
            old, new = self.momentum, 1.0 - self.momentum
            self.moving_mean.assign(mean * old + batch_mean * new)
            biased = batch_var * ((count - 1) / count)
            self.moving_variance.assign(variance * old + biased * new)
        return keras.ops.cast(self._as_it_was(output, x), self.compute_dtype)

    def explain(self, inputs: Any, training: bool | None = None, mask: Any = None) -> str:
        """Say whose code :meth:`call` would run with these arguments, and why if not bnext's.

        Returns:
            ``"bnext"``, or ``"Keras: "`` and the reason.
        """
        x = keras.ops.convert_to_tensor(inputs)
        reason = self._why_not(x, bool(training and self.trainable), mask)
        return "bnext" if reason is None else f"Keras: {reason}"

    def _why_not(self, x: Tensor, training: bool, mask: Any) -> str | None:
        if mask is not None:
            return "a mask chooses the values that count"
        if getattr(self, "renorm", False):  # older Keras has none
            return "renorm corrects by the moving statistics"
        if x.dtype.is_complex:
            return f"bnext has no kernels for {x.dtype}"
        if x.device.type not in DEVICES:
            missing = _C.build_info()["cuda_missing"] if x.is_cuda else "it has no kernels there"
            return f"bnext does not run on {x.device}: {missing}"
        if x.dim() < 2:
            return "the input has features only, and no batch"
        if training and math.prod(x.shape) <= x.shape[self.axis]:
            return "there is at most one value per feature, which has no variance"
        if self.epsilon <= 0:
            return "epsilon is not positive"
        return None

    def _channels_second(self, x: Tensor) -> Tensor:
        """A view of x, if possible, as [N, C, *] with no more dimensions than bnext takes."""
        axis = self.axis % x.dim()
        if axis == x.dim() - 1 and x.is_contiguous():
            return x.flatten(0, -2)
        x = x.movedim(axis, 1)
        return x if x.dim() <= 5 else x.flatten(2)

    def _as_it_was(self, output: Tensor, x: Tensor) -> Tensor:
        """Undo `_channels_second`."""
        axis = self.axis % x.dim()
        if axis == x.dim() - 1 and x.is_contiguous():
            return output.reshape(x.shape)
        return output.reshape(x.movedim(axis, 1).shape).movedim(1, axis)
