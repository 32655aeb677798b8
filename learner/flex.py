"""flex_attention in the learner: when it is used, and the block mask of a micro-batch.

Compiling takes many seconds on a GPU, and micro-batches differ in length and number of lines. So the function that
makes masks is compiled for all shapes at once; torch makes versions of its own for one line, and for lines of at most
128 tokens. flex_attention itself is compiled by transformers: for the first shape, then for all others, as here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention.flex_attention import create_block_mask

from opdlm.common.config import OpdlmConfig
from opdlm.common.masks import training_mask_mod
from opdlm.common.model.config import NARROWEST_FLEX_HEAD
from opdlm.learner.packing import MicroBatch

_MOST_VERSIONS = 32
"""Compiled versions of one function that torch may keep; its own limit is 8."""


def attention_for(config: OpdlmConfig, head: int) -> str:
    """The attention that `model.attention` means: `sdpa` or `flex_attention`.

    Args:
        head: numbers of a head's query.
    """
    if config.model.attention != "auto":
        return config.model.attention
    return "flex_attention" if config.learner.gpus_per_worker > 0 and head >= NARROWEST_FLEX_HEAD else "sdpa"


def block_mask(batch: MicroBatch, causal: bool) -> Any:
    """The `BlockMask` of a micro-batch, on its device: what `training_mask` says, a flag for each 128 x 128 pairs.

    Args:
        causal: as in `training_mask`.
    """
    lines, length = batch.blocks.shape
    mask_mod = training_mask_mod(batch.samples, batch.copies, batch.blocks, causal)
    return _compiled()(mask_mod, lines, None, length, length, device=str(batch.blocks.device))


@functools.cache
def _compiled() -> Callable[..., Any]:
    """`create_block_mask`, which would otherwise make several tensors of all pairs."""
    # Beyond the limit, torch would compute flex_attention without a kernel, with a tensor of all pairs in each layer.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MOST_VERSIONS)
    return torch.compile(create_block_mask, dynamic=True)
