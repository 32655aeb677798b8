"""Students as folders that other programs load: weights, config, tokenizer, modeling code, model card."""

from opdlm.common.export.layouts import LAYOUTS, LayoutName, export

__all__ = ["LAYOUTS", "LayoutName", "export"]
