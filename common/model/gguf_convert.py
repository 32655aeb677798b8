"""Writes the model in a GGUF file as an ordinary model folder: numbers instead of quantised blocks, tensor by tensor.

A quantised weight becomes the number that llama.cpp computes with, so the folder is the model as the file has it; what
quantisation lost stays lost. Memory: one output file (`_SHARD_BYTES`) and one tensor in float32.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from opdlm.common.errors import OpdlmError
from opdlm.common.files import atomic_folder, check_new_folder
from opdlm.common.model.folder import own_layout, write_all_but_weights
from opdlm.common.model.gguf_file import ROPE_FACTORS, GgufFile, gguf_config, gguf_tokenizer, open_gguf, readable
from opdlm.common.model.shards import INDEX_FILE, SINGLE_FILE, require_finite

_SHARD_BYTES = 2 << 30

NumberFormat = Literal["bfloat16", "float32"]
Progress = Callable[[int, int], None]
"""Gets the number of tensors that are written, and of all."""


def convert_gguf(
    source: str | Path, destination: Path, dtype: NumberFormat = "bfloat16", progress: Progress | None = None
) -> None:
    """Writes the autoregressive model of a GGUF file as a folder, with tokenizer, chat template and end tokens.

    Args:
        destination: a folder that does not exist yet; it appears whole or not at all.
        dtype: number format of the weights. float32 keeps every number of the file.

    Raises:
        OpdlmError: the file cannot be used, or the destination exists.
    """
    check_new_folder("convert", destination)
    file = open_gguf(source)
    config, (tokenizer, eos_ids) = gguf_config(file), gguf_tokenizer(file)
    if len(tokenizer) > config.vocab_size or max(eos_ids) >= config.vocab_size:
        raise OpdlmError(
            f"{file.path}: its tokenizer has {len(tokenizer)} tokens, but the embedding {config.vocab_size} rows"
        )
    config.dtype = getattr(torch, dtype)
    names = _parameter_names(file, config)
    with atomic_folder(destination) as folder:
        _write_weights(file, config, names, folder, progress or (lambda done, total: None))
        write_all_but_weights(folder, config, tokenizer, eos_ids, own_layout(config))


def _parameter_names(file: GgufFile, config: Any) -> dict[str, str]:
    """GGUF name -> name of the model's parameter, of equal shape, for all tensors of the file and all parameters."""
    from transformers.modeling_gguf_pytorch_utils import get_gguf_hf_weights_map

    with torch.device("meta"):  # gives names and shapes, takes no memory
        model = AutoModelForCausalLM.from_config(config)
    known = get_gguf_hf_weights_map(model, _processor(file, config))
    parameters = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    names = {}
    for tensor in file.tensors:
        if tensor.name == ROPE_FACTORS:
            continue
        name, shape = known.get(tensor.name), tuple(int(size) for size in reversed(tensor.shape))
        if name not in parameters:
            raise OpdlmError(f"{file.path}: {tensor.name} has no place in a {config.model_type} model; not supported")
        if shape != parameters[name]:
            raise OpdlmError(
                f"{file.path}: {tensor.name} is {list(shape)}, but its settings make it {list(parameters[name])}"
            )
        names[tensor.name] = name
    if missing := sorted(parameters.keys() - set(names.values())):
        raise OpdlmError(f"{file.path}: no tensor for {missing[0]}; the file is not whole")
    return names


def _processor(file: GgufFile, config: Any) -> Any:
    """Transformers' undoing of what llama.cpp's converter did to an architecture's weights."""
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

    return TENSOR_PROCESSORS.get(file.architecture, TensorProcessor)(config=config.to_dict())


def _write_weights(file: GgufFile, config: Any, names: dict[str, str], folder: Path, progress: Progress) -> None:
    from gguf import dequantize

    processor, itemsize = _processor(file, config), config.dtype.itemsize
    shards = list(_shards([tensor for tensor in file.tensors if tensor.name in names], itemsize))
    file_of: dict[str, str] = {}
    done = size = 0
    for number, tensors in enumerate(shards, start=1):
        target = SINGLE_FILE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weights = {}
        for tensor in tensors:
            with readable(file.path):
                values = processor.process(
                    weights=dequantize(tensor.data, tensor.tensor_type), name=tensor.name
                ).weights
            weight = torch.from_numpy(np.array(values, dtype=np.float32)).to(config.dtype)
            require_finite(weight, tensor.name, file.path)
            weights[names[tensor.name]] = weight
            size += weight.numel() * itemsize
            done += 1
            progress(done, len(names))
        save_file(weights, folder / target, {"format": "pt"})
        file_of |= dict.fromkeys(weights, target)
    if len(shards) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(file_of.items()))}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def _shards(tensors: list[Any], itemsize: int) -> Iterator[list[Any]]:
    """The tensors in lists of at most `_SHARD_BYTES`, or of one tensor."""
    held: list[Any] = []
    size = 0
    for tensor in tensors:
        nbytes = int(tensor.n_elements) * itemsize
        if held and size + nbytes > _SHARD_BYTES:
            yield held
            held, size = [], 0
        held.append(tensor)
        size += nbytes
    yield held
