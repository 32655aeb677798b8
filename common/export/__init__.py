"""Writes students as folders that other programs load.

`export` writes one in a public layout of `LAYOUTS`: weights, config and tokenizer, the code of the model
(`templates/`) where the layout needs it, and a model card. `engine_warnings` says where a student differs from what
serving engines assume.
"""

from __future__ import annotations

from opdlm.common.lazy import lazy_exports

__getattr__, __all__ = lazy_exports(
    __name__,
    {
        "card": ["Card", "write_card"],
        "layouts": ["engine_warnings", "export"],
        "names": ["LAYOUTS", "TEMPLATES", "Layout", "LayoutName"],
    },
)
