"""`sugar()` and the `SUGAR` module: ReLU forward, a surrogate's derivative backward."""

from typing import Any

from torch import Tensor, nn

from timm_sugar._operator import apply
from timm_sugar.surrogate import Surrogate, get_surrogate


def sugar(x: Tensor, surrogate: str | Surrogate = "bsilu", **parameters: float) -> Tensor:
    """relu(x), whose gradient is that of the surrogate: grad * surrogate'(x) (SUGAR, arXiv 2505.22074, eq. 4).

    x: any shape, elementwise, real floating point. Bit-equal to `F.relu(x)` in value. `parameters` are the surrogate's,
    e.g. alpha. Raises TypeError for another dtype or an unknown parameter, ValueError for an unknown surrogate or a
    parameter that is not finite and positive.
    """
    chosen = get_surrogate(surrogate, **parameters)
    return apply(x, chosen.name, chosen.values, chosen.formula)


class SUGAR(nn.Module):
    """`sugar` as a module, for any place that takes an activation layer.

    `inplace` comes first and is accepted because timm and torchvision pass it; it has no effect, as the backward pass
    needs the pre-activation. Raises as `sugar` does, and TypeError for a surrogate's name in its place.
    """

    values: list[float]  # TorchScript reads the type here (so no `from __future__ import annotations` in this file)

    def __init__(self, inplace: bool = False, *, surrogate: str | Surrogate = "bsilu", **parameters: float) -> None:
        super().__init__()
        if not isinstance(inplace, bool):
            raise TypeError(f"inplace must be True or False, not {inplace!r}; a surrogate is a keyword argument")
        chosen = get_surrogate(surrogate, **parameters)
        self.surrogate, self.values, self.formula = chosen.name, chosen.values, chosen.formula
        self.overwrites = False  # whether its value is written into its input, as an in-place ReLU's is

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({"overwrites": False, **state})
        self.formula = get_surrogate(self.surrogate).formula  # today's, whatever it was when the module was pickled

    def forward(self, input: Tensor) -> Tensor:
        """relu(input), any shape."""
        if self.overwrites:
            return input.copy_(apply(input.clone(), self.surrogate, self.values, self.formula))
        return apply(input, self.surrogate, self.values, self.formula)

    def extra_repr(self) -> str:
        parameters = zip(get_surrogate(self.surrogate).parameters, self.values, strict=True)
        return ", ".join([f"surrogate={self.surrogate!r}", *(f"{key}={value:g}" for key, value in parameters)])


class FunctionalSUGAR(SUGAR):
    """SUGAR in the place of a function such as `F.gelu` that a model keeps as an attribute, and called like that."""

    def forward(
        self,
        input: Tensor,
        a: float = 0.0,
        b: float = 0.0,
        c: bool = False,
        d: bool = False,
        inplace: bool = False,
        alpha: float = 0.0,
        negative_slope: float = 0.0,
        lower: float = 0.0,
        upper: float = 0.0,
        training: bool = False,
        approximate: str = "none",
    ) -> Tensor:
        """relu(input), any shape; what else torch's activation functions take has no effect."""
        return apply(input, self.surrogate, self.values, self.formula)
