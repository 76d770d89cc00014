"""The `_sugar` models in timm's registry. Importing this package registers them."""

from timm_sugar.models.sugar import ALIASES, LEFT_OUT, SUFFIX, SUGAR_TAGS, is_left_out, list_sugar_models

__all__ = ["ALIASES", "LEFT_OUT", "SUFFIX", "SUGAR_TAGS", "is_left_out", "list_sugar_models"]
