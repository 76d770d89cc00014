"""Any timm architecture as a ReLU network that trains with a surrogate gradient (SUGAR, arXiv 2505.22074).

Importing this package registers a `<name>_sugar` model in timm for every timm architecture `<name>`.
"""

from timm_sugar import models
from timm_sugar.activation import SUGAR, relu_gradient, sugar, warm_up
from timm_sugar.diagnostics import diagnose, track_activations
from timm_sugar.models import list_sugar_models as list_models
from timm_sugar.schedule import SurrogateSchedule, set_surrogate
from timm_sugar.surgery import list_activations, replace_activations, sugarize, sugarized, to_relu
from timm_sugar.surrogate import Surrogate, get_surrogate, list_surrogates, register_surrogate
from timm_sugar.version import __version__

__all__ = [
    "SUGAR",
    "Surrogate",
    "SurrogateSchedule",
    "__version__",
    "diagnose",
    "get_surrogate",
    "list_activations",
    "list_models",
    "list_surrogates",
    "models",
    "register_surrogate",
    "relu_gradient",
    "replace_activations",
    "set_surrogate",
    "sugar",
    "sugarize",
    "sugarized",
    "to_relu",
    "track_activations",
    "warm_up",
]
