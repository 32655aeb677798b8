"""Autoregressive model folders with the tokenizers and rotations that real ones have, tiny and with random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from tests.tiny import LLAMA3_ROPE, YARN_ROPE, save_teacher, tiny_model

TEXT = ["hello world the answer is 42 , is it ? 5 - 3 = 2 don't"] * 20
TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
NAMED_TEMPLATE = "{{ image_token }}{{ eos_token }}" + TEMPLATE
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|image|>"]


def byte_level(with_bos: bool = False, prefix_space: bool = False) -> Tokenizer:
    """A byte-level BPE tokenizer, as those of Qwen and Llama 3; `with_bos` puts `<|endoftext|>` in front of text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False),
    )
    if with_bos:
        bpe.post_processor = processors.TemplateProcessing(
            single="<|endoftext|> $A", pair="<|endoftext|> $A $B", special_tokens=[("<|endoftext|>", 0)]
        )
    return bpe


def sentencepiece_like() -> Tokenizer:
    """A BPE tokenizer with byte fallback and `▁` for a space, as Llama 2's."""
    special = ["<unk>", "<s>", "</s>", *SPECIAL[1:]]
    bpe = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    bpe.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    bpe.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=330, special_tokens=[*special, *bytes_], show_progress=False)
    )
    held = json.loads(bpe.to_str())
    held["added_tokens"] = [token for token in held["added_tokens"] if token["content"] not in bytes_]
    bpe = Tokenizer.from_str(json.dumps(held))
    bpe.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return bpe


def write(folder: Path, tokenizer: Tokenizer, settings: dict[str, Any], spare_rows: int = 8, **model: Any) -> Path:
    """A model folder. `settings`: tokenizer_config.json; its `chat_template.jinja` becomes a file of that name."""
    made = tiny_model(vocab_size=tokenizer.get_vocab_size() + spare_rows, context=256, **model)
    made.generation_config.eos_token_id = [2, 0]
    made.save_pretrained(folder)
    generation = json.loads((folder / "generation_config.json").read_text())
    generation |= {"do_sample": False, "temperature": 0.6}  # transformers loads this pair and refuses to save it
    (folder / "generation_config.json").write_text(json.dumps(generation))
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"} | settings
    if (template := settings.pop("chat_template.jinja", None)) is not None:
        (folder / "chat_template.jinja").write_text(template)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def write_sources(root: Path) -> list[Path]:
    """The folders: families, rotations and tokenizer classes in turn."""
    listed = {"additional_special_tokens": SPECIAL[1:3], "chat_template": TEMPLATE}
    named = {"extra_special_tokens": {"image_token": "<|image|>"}, "chat_template.jinja": NAMED_TEMPLATE}
    linear = {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0}
    llama3 = LLAMA3_ROPE | {"rope_theta": 5e5}
    made = [
        write(
            root / "qwen3",
            byte_level(),
            {"tokenizer_class": "Qwen2Tokenizer", **listed},
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        ),
        write(
            root / "qwen3-yarn",
            byte_level(prefix_space=True),
            {"tokenizer_class": "PreTrainedTokenizerFast", **named},
            rope_parameters=YARN_ROPE,
            tied=True,
            spare_rows=0,
        ),
        write(
            root / "qwen2",
            byte_level(),
            {"tokenizer_class": "Qwen2Tokenizer", **listed, "mask_token": "<|image|>"},
            family="qwen2",
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        ),
        write(
            root / "llama3",
            byte_level(with_bos=True),
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": "<|endoftext|>",
                "clean_up_tokenization_spaces": True,
                "chat_template": [
                    {"name": "default", "template": TEMPLATE},
                    {"name": "named", "template": "{{ bos_token }}" + TEMPLATE},
                ],
            },
            family="llama",
            rope_parameters=llama3,
        ),
        write(
            root / "llama-tied",
            byte_level(with_bos=True),
            {"tokenizer_class": "LlamaTokenizerFast", "bos_token": "<|endoftext|>", **listed},
            family="llama",
            rope_parameters=llama3,
            tied=True,
            spare_rows=0,
        ),
        write(
            root / "llama-spm",
            sentencepiece_like(),
            {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": False}
            | {"eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>", "pad_token": "</s>"}
            | {"chat_template.jinja": TEMPLATE},
            family="llama",
            rope_parameters=linear,
        ),
    ]
    save_teacher(root / "chain", context=256)  # the one-character tokenizer of `opdlm pretrain`
    return [*made, root / "chain"]
