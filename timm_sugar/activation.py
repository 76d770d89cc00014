"""`sugar()` and the `SUGAR` module: ReLU forward, a surrogate's derivative backward."""

from torch import Tensor, nn

from timm_sugar._operator import apply
from timm_sugar.surrogate import get_surrogate, resolve_parameters


def sugar(x: Tensor, surrogate: str = "bsilu", **parameters: float) -> Tensor:
    """relu(x), whose gradient is that of the surrogate: grad * surrogate'(x) (SUGAR, arXiv 2505.22074, eq. 4).

    x: any shape, elementwise, real floating point. Bit-equal to `F.relu(x)` in value. `parameters` are the surrogate's,
    e.g. alpha. Raises TypeError for another dtype or an unknown parameter, ValueError for an unknown surrogate or a
    parameter that is not finite and positive.
    """
    return apply(x, surrogate, resolve_parameters(surrogate, parameters), get_surrogate(surrogate).formula)


class SUGAR(nn.Module):
    """`sugar` as a module, for any place that takes an activation layer.

    `inplace` comes first and is accepted because timm and torchvision pass it; it has no effect, as the backward pass
    needs the pre-activation. Raises as `sugar` does, and TypeError for a surrogate's name in its place.
    """

    values: list[float]  # TorchScript reads the type here (so no `from __future__ import annotations` in this file)

    def __init__(self, inplace: bool = False, *, surrogate: str = "bsilu", **parameters: float) -> None:
        super().__init__()
        if isinstance(inplace, str):
            raise TypeError(f"the surrogate is a keyword argument: SUGAR(surrogate={inplace!r})")
        self.surrogate = surrogate
        self.values = resolve_parameters(surrogate, parameters)
        self.formula = get_surrogate(surrogate).formula

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self.formula = get_surrogate(self.surrogate).formula  # today's, whatever it was when the module was pickled

    def forward(self, x: Tensor) -> Tensor:
        """relu(x), any shape."""
        return apply(x, self.surrogate, self.values, self.formula)

    def extra_repr(self) -> str:
        parameters = zip(get_surrogate(self.surrogate).parameters, self.values, strict=True)
        return ", ".join([f"surrogate={self.surrogate!r}", *(f"{key}={value:g}" for key, value in parameters)])


class FunctionalSUGAR(SUGAR):
    """SUGAR in the place of a function such as `F.gelu` that a model keeps as an attribute, and called like that."""

    def forward(self, x: Tensor, inplace: bool = False) -> Tensor:
        """relu(x), any shape; `inplace` has no effect."""
        return apply(x, self.surrogate, self.values, self.formula)
