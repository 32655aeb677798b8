"""Reads a GGUF file (llama.cpp's format of one file) without its weights: which tensors, config and tokenizer it has.

The package `gguf` parses the file, and transformers' own GGUF code builds the tokenizer and undoes what llama.cpp's
converter did to the weights (`gguf_convert.py`). Whatever these two would leave out without a word is an error here: a
setting of the rotation, a tensor without a parameter, a split of text into words that they do not know.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from opdlm.common.errors import OpdlmError

FAMILIES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""`general.architecture` -> model family. llama.cpp writes Mistral models as `llama`, whose network is the same."""
ROPE_FACTORS = "rope_freqs.weight"
"""Tensor with the factors of a llama3 rotation, one a pair of dimensions; it is a setting and no weight."""

_LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_WHOLE_TOKENS = ("llama3", "llama-v3", "llama-bpe", "falcon3", "tekken")
"""Names of `tokenizer.ggml.pre` where llama.cpp begins texts with the beginning token, and takes a piece of text that
is a token whole before it looks at merges."""
_SINGLE_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone")
"""Those that split digits first, and then as GPT-2 does. transformers knows neither these nor the next."""
_AS_GPT2 = ("gpt-2", "mpt", "olmo", "phi-2")
_ROLES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
"""Role of a token in transformers -> in `tokenizer.ggml.ROLE_token_id`."""
_ONE_ONLY = ("logit_scale", "attention.scale", "embedding_scale", "residual_scale", "rope.scale_linear")
"""Settings whose value must be 1, because no supported family has them."""


@dataclass(frozen=True, slots=True)
class GgufFile:
    """A GGUF file whose header was read and checked."""

    path: Path
    architecture: str
    fields: Mapping[str, Any]
    """Metadata; of a long list only its length."""
    tensors: tuple[Any, ...]
    """`gguf.ReaderTensor`: name, shape, tensor_type, data (a view into the file)."""

    def setting(self, name: str, default: Any = None) -> Any:
        """The setting `ARCHITECTURE.name`; without a default it must be there."""
        value = self.fields.get(f"{self.architecture}.{name}", default)
        if value is None:
            raise OpdlmError(f"{self.path}: no {self.architecture}.{name} in its metadata; the file is not whole")
        if isinstance(value, list):
            raise OpdlmError(f"{self.path}: {self.architecture}.{name} differs by layer, which is not supported")
        return value

    def tensor(self, name: str) -> Any | None:
        """The tensor of a name; None where the file has none."""
        return next((tensor for tensor in self.tensors if tensor.name == name), None)


def is_gguf(path: str | Path) -> bool:
    """Whether a path is a GGUF file, by its first bytes or its name."""
    path = Path(path)
    if not os.path.isfile(path):  # False for a name that is too long, too
        return False
    with path.open("rb") as stream:
        return stream.read(4) == b"GGUF" or path.suffix.lower() == ".gguf"


def open_gguf(path: str | Path) -> GgufFile:
    """Reads the header of a GGUF file and checks that this file can become a model folder.

    Raises:
        OpdlmError: the package `gguf` is missing; the file is damaged, cut short, a part of a split file, or has no
            tokenizer; or its architecture or a number format is not supported.
    """
    path = Path(path)
    if importlib.util.find_spec("gguf") is None:
        raise OpdlmError(f"{path}: reading a GGUF file needs the package gguf; pip install 'opdlm-ray[gguf]'")
    import gguf

    with readable(path):
        reader = gguf.GGUFReader(path)
        fields = {
            name: len(field.data) if len(field.data) > 1000 else field.contents()
            for name, field in reader.fields.items()
        }
        tensors = tuple(reader.tensors)
    if fields.get("split.count", 0) > 1:
        raise OpdlmError(
            f"{path}: is one of {fields['split.count']} parts of a split file; join them first: "
            "llama-gguf-split --merge FIRST_PART WHOLE.gguf"
        )
    architecture = str(fields.get("general.architecture"))
    if architecture not in FAMILIES:
        raise OpdlmError(
            f"{path}: its architecture is {architecture!r}; supported in GGUF files: {', '.join(FAMILIES)} "
            "(Mistral models are `llama` there); take the model's own folder or hub id instead"
        )
    _check_formats(path, tensors)
    found = GgufFile(path, architecture, fields, tensors)
    if fields.get(f"{architecture}.expert_count", 0):
        raise OpdlmError(f"{path}: is a mixture of experts, which is not supported")
    if "tokenizer.ggml.tokens" not in fields:
        raise OpdlmError(f"{path}: has no tokenizer (tokenizer.ggml.tokens); a model folder needs one")
    return found


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turns the errors of the package `gguf`, which are of many classes, into one line."""
    try:
        yield
    except OSError as error:
        raise OpdlmError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise OpdlmError(f"{path}: the GGUF file is damaged, cut short or of an unknown kind: {reason}") from None


def _check_formats(path: Path, tensors: tuple[Any, ...]) -> None:
    from gguf import GGML_QUANT_SIZES, dequantize

    for kind in {tensor.tensor_type for tensor in tensors}:
        try:
            dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), dtype=np.uint8), kind)
        except (NotImplementedError, KeyError):
            name = next(tensor.name for tensor in tensors if tensor.tensor_type == kind)
            raise OpdlmError(
                f"{path}: {name} is stored as {kind.name}, which the package gguf cannot turn into numbers; take a "
                "file in another quantisation, such as Q8_0 or F16"
            ) from None


def gguf_config(file: GgufFile) -> Any:
    """The transformers config of a GGUF file. Every setting comes from the file, none from a class's defaults.

    Raises:
        OpdlmError: a setting is missing or not supported.
    """
    embedding = file.tensor("token_embd.weight")
    if embedding is None:
        raise OpdlmError(f"{file.path}: has no token_embd.weight; expected a language model")
    for name in _ONE_ONLY:
        if file.setting(name, 1.0) not in (0, 1):
            raise OpdlmError(f"{file.path}: {file.architecture}.{name} is {file.setting(name)}, which is not supported")
    width, heads = file.setting("embedding_length"), file.setting("attention.head_count")
    head_dim = file.setting("attention.key_length", width // heads)
    for name in ("attention.value_length", "rope.dimension_count"):
        if file.setting(name, head_dim) != head_dim:
            raise OpdlmError(
                f"{file.path}: {file.architecture}.{name} is {file.setting(name)}, but a head has {head_dim} "
                "dimensions; not supported"
            )
    context = file.setting("context_length")
    if 0 < file.setting("attention.sliding_window", 0) < context:
        raise OpdlmError(f"{file.path}: attends through a sliding window, which block-causal masks do not keep")
    family = FAMILIES[file.architecture]
    bias = file.tensor("blk.0.attn_q.bias") is not None
    return AutoConfig.for_model(
        family,
        vocab_size=int(embedding.shape[1]),
        hidden_size=width,
        intermediate_size=file.setting("feed_forward_length"),
        num_hidden_layers=file.setting("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=file.setting("attention.head_count_kv", heads),
        head_dim=head_dim,
        max_position_embeddings=context,
        rms_norm_eps=_short(file.setting("attention.layer_norm_rms_epsilon")),
        rope_parameters=_rope(file, head_dim),
        tie_word_embeddings=file.tensor("output.weight") is None,
        bos_token_id=file.fields.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=file.fields.get("tokenizer.ggml.eos_token_id"),
        pad_token_id=file.fields.get("tokenizer.ggml.padding_token_id"),
        **({} if family == "qwen2" else {"attention_bias": bias}),
    )


def _rope(file: GgufFile, head_dim: int) -> dict[str, Any]:
    theta, kind = _short(file.setting("rope.freq_base", 10000.0)), file.setting("rope.scaling.type", "none")
    factors = file.tensor(ROPE_FACTORS)
    if factors is not None:
        return _llama3_rope(file, np.asarray(factors.data, dtype=np.float64).reshape(-1), theta, head_dim)
    if kind == "none":
        return {"rope_type": "default", "rope_theta": theta}
    if kind not in ("linear", "yarn"):
        raise OpdlmError(f"{file.path}: rope.scaling.type is {kind!r}; supported: none, linear, yarn")
    rope = {"rope_type": kind, "rope_theta": theta, "factor": _short(file.setting("rope.scaling.factor"))}
    if kind == "yarn":
        rope["original_max_position_embeddings"] = file.setting("rope.scaling.original_context_length")
    return rope


def _llama3_rope(file: GgufFile, factors: np.ndarray, theta: float, head_dim: int) -> dict[str, Any]:
    """llama3 settings that give the file's factors. It does not hold them; all of Meta's models but for `factor` agree.

    Args:
        factors: `[head_dim / 2]`, by which the rotation of each pair of dimensions is slower.
    """
    factor = _short(factors.max())
    low, high, original = _LLAMA3_ROPE.values()
    turns = original * theta ** (-np.arange(0, head_dim, 2) / head_dim) / (2 * math.pi)  # in the original context
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-3):
        raise OpdlmError(f"{file.path}: {ROPE_FACTORS} holds factors of an unknown rotation; only Llama 3's are known")
    return {"rope_type": "llama3", "rope_theta": theta, "factor": factor, **_LLAMA3_ROPE}


def gguf_tokenizer(file: GgufFile) -> tuple[PreTrainedTokenizerBase, tuple[int, ...]]:
    """The tokenizer of a GGUF file with its chat template, and the ids of all tokens that end a response, rising.

    Raises:
        OpdlmError: the tokenizer is of an unknown kind, or names no end-of-sequence token.
    """
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    kind, pre = (str(file.fields.get(f"tokenizer.ggml.{name}")) for name in ("model", "pre"))
    if kind not in ("gpt2", "llama"):
        raise OpdlmError(f"{file.path}: its tokenizer is of kind {kind!r}; supported: gpt2, llama")
    known = {*GGUF_PRE_TOKENIZER_SPLITS, *_SINGLE_DIGITS, *_AS_GPT2}
    if kind == "gpt2" and pre not in known:
        raise OpdlmError(
            f"{file.path}: tokenizer.ggml.pre is {pre!r}, a way to split text that is not known here, so prompts would "
            f"get other tokens than in training; known: {', '.join(sorted(known))}"
        )
    if file.architecture == "qwen2" and GGUF_PRE_TOKENIZER_SPLITS.get(pre) != GGUF_PRE_TOKENIZER_SPLITS["qwen2"]:
        raise OpdlmError(
            f"{file.path}: tokenizer.ggml.pre is {pre!r}, but transformers splits text as `qwen2` for every Qwen2 model"
        )
    if kind == "llama" and file.fields.get("tokenizer.ggml.add_space_prefix") is False:
        raise OpdlmError(f"{file.path}: its tokenizer puts no space before a text, which transformers' reader ignores")
    ends = [file.fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    if ends[0] is None:
        raise OpdlmError(f"{file.path}: names no end-of-sequence token (tokenizer.ggml.eos_token_id)")
    with tempfile.TemporaryDirectory() as alone, readable(file.path):  # settings beside the file are not its own
        Path(alone, "model.gguf").symlink_to(file.path.resolve())
        tokenizer = AutoTokenizer.from_pretrained(alone, gguf_file="model.gguf", trust_remote_code=False)
    backend = _own_tokens(tokenizer.backend_tokenizer, file)
    ids = {role: file.fields.get(f"tokenizer.ggml.{key}_token_id") for role, key in _ROLES.items()}
    special = {role: backend.id_to_token(i) for role, i in ids.items() if i is not None}
    if pre in _SINGLE_DIGITS:
        split = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        backend.pre_tokenizer = pre_tokenizers.Sequence(split)
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    if kind == "gpt2" and pre in _WHOLE_TOKENS:
        backend.model.ignore_merges = True
        if "tokenizer.ggml.add_bos_token" not in file.fields and "bos_token" in special:
            bos = special["bos_token"]
            backend.post_processor = processors.TemplateProcessing(
                single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, ids["bos_token"])]
            )
    template = file.fields.get("tokenizer.chat_template")
    whole = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **special)
    return whole, tuple(sorted({int(i) for i in ends if i is not None}))


def _own_tokens(backend: Tokenizer, file: GgufFile) -> Tokenizer:
    """A tokenizer without tokens that the file does not have: transformers adds `<|endoftext|>` to all of them."""
    held = file.fields["tokenizer.ggml.tokens"]
    count = held if isinstance(held, int) else len(held)
    state = json.loads(backend.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < count]
    return Tokenizer.from_str(json.dumps(state))


def _short(value: float) -> float:
    """The shortest number that is the same in float32: 1e-06 for 9.99999997e-07."""
    return float(str(np.float32(value)))
