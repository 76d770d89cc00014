"""Any timm architecture as a ReLU network that trains with a surrogate gradient (SUGAR, arXiv 2505.22074).

Importing this package registers a `<name>_sugar` model in timm for every timm architecture `<name>`.
"""

from timm_sugar.activation import SUGAR, sugar
from timm_sugar.diagnostics import diagnose
from timm_sugar.models import sugar as models
from timm_sugar.surgery import sugarize, to_relu
from timm_sugar.surrogate import list_surrogates, register_surrogate
from timm_sugar.version import __version__

__all__ = [
    "SUGAR",
    "__version__",
    "diagnose",
    "list_surrogates",
    "models",
    "register_surrogate",
    "sugar",
    "sugarize",
    "to_relu",
]
