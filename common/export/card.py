"""Writes the model card (README.md) of an exported student: what it is, how to decode with it, which run trained it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedTokenizerBase

from opdlm.common.files import read_json, read_yaml
from opdlm.common.model.adapters import NOISY_LORA
from opdlm.common.model.end_tokens import as_ids, token_names
from opdlm.common.model.facts import DECODING_ORDER
from opdlm.common.model.hub import hub_id
from opdlm.common.model.prompt_encoder import PromptEncoder

_PAPER = "https://arxiv.org/abs/2606.06712"
_PROMPT = "47+8-3="

_WITH_CODE = """\
from transformers import {auto}, AutoTokenizer

folder = "."  # this folder, or its id on the hub
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True, padding_side="left")
model = {auto}.from_pretrained(folder, trust_remote_code=True)
batch = tokenizer([{prompt}, return_tensors="pt", padding=True)
print(tokenizer.decode(model.generate(**batch, max_new_tokens=32{threshold})[0]))
"""
_LOSSLESS = """
This is a lossless student: `{base}` as it was, and adapters (`noisy_adapter/`) that act on masks alone. They draft,
`{base}` verifies, so `generate` writes what that writes, in fewer forwards: greedy the same tokens (in bfloat16 up to
ties that rounding decides), with `do_sample` from the same distribution. It takes batches that are padded on the left,
with their `attention_mask`, `max_new_tokens`, `do_sample`, `temperature`, `top_k` and `top_p`.
"""
_GENERATE = """
`generate` caches keys and values and takes batches that are padded on the left, with their `attention_mask`,
`max_new_tokens`, `do_sample`, `temperature`, `top_k`, `top_p` and `threshold`: a step decodes every token whose
probability is above it, and at least one: the most probable, or with `strategy="sequential_dynamic"` the first, as it
does by default where the decoding order is `sequential`. It refuses what else transformers' `generate` knows (beams,
penalties).
"""
_PIPELINE = """`pipeline("text-generation", model=folder, trust_remote_code=True)` works.
"""
_NO_PIPELINE = """`AutoModelForCausalLM`, and `pipeline("text-generation")` with it, refuse this folder in one line.
"""

_PLAIN = """\
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder, or its id on the hub
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)  # its generate() would write nonsense: see above
size, mask = model.config.block_size, model.config.mask_token_id
prompt = tokenizer({prompt}, return_tensors="pt")["input_ids"]
ends = torch.tensor(model.generation_config.eos_token_id)
length = prompt.shape[1]
offset = -length % size if model.config.block_grid == "response" else 0
tokens, start = prompt, length - (length + offset) % size
while start < length + 32 and not torch.isin(tokens[0, length:], ends).any():
    tokens = torch.nn.functional.pad(tokens, (0, start + size - tokens.shape[1]), value=mask)
    block = (torch.arange(start + size) + offset) // size
    seen = (block[None, :] <= block[:, None])[None, None]  # block-causal
    for _ in range(size - max(length - start, 0)):  # one token per step, {first} first
        with torch.no_grad():
            logits = model(input_ids=tokens, attention_mask=seen, use_cache=False).logits[0]
        logits[:, mask] = float("-inf")
        for spare in getattr(model.config, "spare_token_ids", []):  # rows that no token has
            logits[:, spare[0] : spare[1]] = float("-inf")
        confidence, token = logits.softmax(-1).max(-1)
        confidence[(tokens[0] != mask) | (torch.arange(start + size) < length)] = -1.0
        place = {place}
        tokens[0, place] = token[place]
    start += size
print(tokenizer.decode(tokens[0]))
"""

_PLAIN_WARNING = """\
**This folder is the plain network**, for programs that make attention masks of their own. Its `config.json` has the
names of an autoregressive model, so other programs load it as one, and their `generate()` then writes nonsense. For
anything else, use a layout with code: `opdlm export STUDENT FOLDER --layout a2d-...`.

"""


@dataclass(frozen=True, slots=True)
class Card:
    """What a card is written from."""

    checkpoint: Path
    """Folder of the student that is exported."""
    layout: str
    config: Any
    """The student's transformers config."""
    tokenizer: PreTrainedTokenizerBase
    auto_map: dict[str, str]
    """transformers' Auto class -> `file.Class` of the code in the exported folder; empty without code."""
    base_model: str | None
    """Hub id of the autoregressive model. None: the name of the run's teacher."""

    @property
    def is_lossless(self) -> bool:
        """Whether the student has adapters on noisy tokens, which draft in no order."""
        return getattr(self.config, NOISY_LORA, None) is not None

    @property
    def order(self) -> str:
        """The student's decoding order."""
        return getattr(self.config, DECODING_ORDER, "confidence")


def write_card(card: Card, warnings: list[str], file: Path) -> None:
    """Writes the card. It contains no path of this machine: of each path, only the last name is kept."""
    run, figures = _run_and_figures(card.checkpoint)
    teacher = run.get("model", {}).get("teacher")
    base = card.base_model or (_without_paths(teacher) if teacher else None)
    head: dict[str, Any] = {
        "library_name": "transformers",
        "tags": ["opdlm", "block-diffusion", "diffusion-language-model", "on-policy-distillation", card.layout],
    }
    if base:
        head["base_model"] = base
    if _has_pipeline(card):
        head["pipeline_tag"] = "text-generation"
    sections = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n",
        _description(card, base),
        _usage(card, base, warnings),
    ]
    if figures:
        sections.append(_table("Figures of the run", figures))
    if run:
        text = yaml.safe_dump(_without_paths(run), sort_keys=False)
        sections.append(f"## The run's resolved config\n\n```yaml\n{text}```\n")
    file.write_text("\n".join(sections))


def _description(card: Card, base: str | None) -> str:
    config, tokenizer = card.config, card.tokenizer
    made = f"converted from `{base}`" if base else "converted from an autoregressive model"
    facts = {
        "layout": card.layout,
        "network": config.model_type,
        "block size": f"{config.block_size} tokens",
        "block grid": config.block_grid,
        "mask token id": config.mask_token_id,
        "end tokens": token_names(as_ids(config.eos_token_id), tokenizer),
        "vocabulary": config.vocab_size,
        "context": f"{config.max_position_embeddings} tokens",
    }
    if not card.is_lossless:
        facts["decoding order"] = card.order
    sees = "A token sees all tokens of its own block and of earlier blocks"
    if config.context == "causal":
        sees = "A token sees the tokens before it and, in the block that is being decoded, that whole block"
    predicts = "i: there is no shift"
    if config.logit_shift:
        predicts = "i + 1, as in an autoregressive model"
    text = (
        f"# Block diffusion language model\n\nA block diffusion language model {made} by on-policy distillation\n"
        f"(OPDLM, [arXiv 2606.06712]({_PAPER})).\n{sees}, and\nthe logits at position i predict token {predicts}. "
        "A step decodes several tokens.\n\n"
    )
    return text + _table("", facts)


def _usage(card: Card, base: str | None, warnings: list[str]) -> str:
    auto = next((name for name in card.auto_map if name != "AutoConfig"), None)
    text, others = _prompt_code(card.tokenizer)
    prompt = f"{text}]{others}" if auto else f"{text}{others}"
    in_order = card.order == "sequential"
    snippet = (_WITH_CODE if auto else _PLAIN).format(
        auto=auto,
        prompt=prompt,
        threshold="" if card.is_lossless else ", threshold=0.9",
        first="the leftmost" if in_order else "the most confident",
        place="(confidence >= 0).nonzero()[0, 0]" if in_order else "confidence.argmax()",
    )
    text = "## How to decode\n\nWith opdlm-ray, which caches keys and values and decodes batches:\n\n"
    text += f"```\nopdlm generate THIS_FOLDER --prompt {_PROMPT!r} --trace\n```\n\n"
    text += _PLAIN_WARNING if auto is None else ""
    text += "With transformers alone, version 4.57 or later:\n\n"
    text += f"```python\n{snippet}```\n"
    if auto:
        text += _LOSSLESS.format(base=base or "the base model") if card.is_lossless else _GENERATE
        text += _PIPELINE if _has_pipeline(card) else _NO_PIPELINE
    if card.layout == "sdar":
        text += "\nSGLang and LMDeploy serve this architecture; this folder has not been tried with them."
        text += " Mind the differences:\n\n" if warnings else "\n"
        text += "".join(f"- {line}\n" for line in warnings)
    return text


def _has_pipeline(card: Card) -> bool:
    """Whether transformers' pipeline for text loads the folder, which it does through `AutoModelForCausalLM`."""
    return "AutoModelForCausalLM" in card.auto_map and "AutoModelForMaskedLM" not in card.auto_map


def _prompt_code(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """Code with which the tokenizer encodes the prompt as opdlm does: its beginning tokens, nothing behind it.

    Returns: the prompt as a string, and further arguments with the comma before them.
    """
    encode = PromptEncoder(tokenizer)
    if not encode.beginning:
        return repr(_PROMPT), ", add_special_tokens=False"
    if list(tokenizer(_PROMPT)["input_ids"]) == encode(_PROMPT):
        return repr(_PROMPT), ""
    beginning = "".join(tokenizer.convert_ids_to_tokens(encode.beginning))
    return repr(beginning + _PROMPT), ", add_special_tokens=False"


def _run_and_figures(checkpoint: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads the config and the figures of the run that trained this checkpoint.

    Both are empty unless the checkpoint is a run's `student`, the trained model that the run's figures describe.
    """
    folder = checkpoint.resolve()
    files = folder.parent / "config.yaml", folder.parent / "report.json"
    if folder.name != "student" or not files[0].is_file():
        return {}, {}
    run = read_yaml(files[0])
    run.pop("resources", None)  # the machines do not matter to the reader
    return run, read_json(files[1]) if files[1].is_file() else {}


def _without_paths(value: Any) -> Any:
    """Returns the value with each path and address replaced by its last name, or by its hub id in the hub's cache."""
    if isinstance(value, dict):
        return {key: _without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_paths(item) for item in value]
    if isinstance(value, str) and (value.startswith(("/", "~", "..")) or "://" in value):
        return hub_id(value) or Path(value).name
    return value


def _table(title: str, rows: dict[str, Any]) -> str:
    lines = [f"## {title}\n"] if title else []
    lines += ["| | |", "| --- | --- |"]
    lines += [f"| {name.replace('_', ' ')} | {_format(value)} |" for name, value in rows.items() if value is not None]
    return "\n".join(lines) + "\n"


def _format(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "\\|")  # `<|im_end|>`, say
