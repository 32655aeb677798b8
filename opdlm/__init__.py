"""opdlm: autoregressive language models into diffusion language models, by on-policy distillation."""

__version__ = "0.1.0"
