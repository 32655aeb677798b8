"""Which token may be the mask token, and which one a converted model gets.

A mask token stands for a position that is not decoded yet, and the decoder never draws it. So a token that has another
role (ends a response, say), or that is a piece of ordinary text, cannot be the mask: the model could never write it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from opdlm.common.errors import OpdlmError
from opdlm.common.files import read_json

MASK_TOKEN = "<|MASK|>"
_ADVICE = f"give another one, such as {MASK_TOKEN} (opdlm convert --mask-token, or model.mask_token in a run file)"
_ROLES = {
    "eos_token": "an end-of-sequence token",
    "pad_token": "the padding token",
    "bos_token": "the beginning-of-sequence token",
    "unk_token": "the token for unknown text",
}
_LOOKS_SPECIAL = re.compile(r"\W*[<\[{(|].+[>\]})|]\W*", re.DOTALL)


def mask_problem(
    folder: Path, config: Any, tokenizer: PreTrainedTokenizerBase | None, mask_id: int, eos_ids: Sequence[int]
) -> str | None:
    """Says in a few words what a token is that cannot be the mask token; None if it can be.

    Args:
        folder: of the tokenizer.
        config: of the model.
        tokenizer: None where the folder has none.
        mask_id: the token's id.
        eos_ids: tokens that end a response.
    """
    if mask_id in eos_ids:
        return _ROLES["eos_token"]
    for role, words in _ROLES.items():
        if mask_id in (getattr(config, f"{role}_id", None), getattr(tokenizer, f"{role}_id", None)):
            return words
    if tokenizer is None or not (text := tokenizer.convert_ids_to_tokens([mask_id])[0]):
        return None  # a row that no token has
    raw = _tokenizer_file(folder, tokenizer)
    pieces = raw["model"].get("vocab", {})
    is_piece = text in (pieces if isinstance(pieces, dict) else {piece for piece, *_ in pieces})
    flags = {entry["id"]: entry["special"] for entry in raw.get("added_tokens", [])}
    in_memory = tokenizer.added_tokens_decoder.get(mask_id)
    special = in_memory is not None and in_memory.special
    plain = not _LOOKS_SPECIAL.fullmatch(text) and (is_piece or flags.get(mask_id) is False)
    return "ordinary text, not a special token" if plain or not special else None


def choose_mask(
    folder: Path, config: Any, tokenizer: PreTrainedTokenizerBase, eos_ids: Sequence[int], wanted: str | None
) -> int:
    """Makes a token the tokenizer's mask token, in memory, and returns its id.

    It is the token `wanted`; else the mask token that the model has; else `<|MASK|>`. A token that the tokenizer lacks
    is added to it and gets the next free id, whose row may be missing in the matrices.

    Args:
        folder: of the model.
        config: of the model.
        eos_ids: tokens that end a response.

    Raises:
        OpdlmError: the token cannot be the mask, or the model is a student with another one.
    """
    before = tokenizer.get_vocab()
    own = getattr(config, "mask_token_id", None)
    if own is not None:
        if wanted is not None and before.get(wanted) != own:
            raise OpdlmError(
                f"the mask token {wanted!r} was asked for, but {folder} is a student already, with mask token id "
                f"{own}; ask for none, or convert the autoregressive model"
            )
        token = next((text for text, i in before.items() if i == own), None)
    else:
        token = wanted if wanted is not None else tokenizer.mask_token or MASK_TOKEN
        if token not in before and not _LOOKS_SPECIAL.fullmatch(token):
            raise OpdlmError(
                f"the mask token {token!r} looks like ordinary text, and would be found in prompts; {_ADVICE}"
            )
    mask_id = own if own is not None else before.get(str(token))
    problem = None if mask_id is None else mask_problem(folder, config, tokenizer, mask_id, eos_ids)
    if problem is not None:
        raise OpdlmError(f"the mask token of {folder} would be {token!r} (id {mask_id}), which is {problem}; {_ADVICE}")
    if token is not None:
        tokenizer.add_special_tokens({"mask_token": token})
    if mask_id is None:
        mask_id = int(tokenizer.mask_token_id)
        if mask_id in before.values():
            raise OpdlmError(
                f"the tokenizer in {folder} leaves out ids, so that a new token would get the id {mask_id} of another "
                "one; add a mask token to its files"
            )
    return mask_id


def check_mask_row(mask_id: int, rows: int) -> None:
    """Checks that the mask token's row is in the matrices, or the next one, which conversion appends.

    Raises:
        OpdlmError: it lies further behind.
    """
    if mask_id > rows:
        raise OpdlmError(
            f"convert: the tokenizer gives the mask token id {mask_id}, but the embedding has {rows} rows; "
            "use the tokenizer that the model was trained with, which has no more tokens than that"
        )


def _tokenizer_file(folder: Path, tokenizer: Any) -> dict[str, Any]:
    """The tokenizer as tokenizer.json describes it, before transformers marks tokens as special."""
    file = folder / "tokenizer.json"
    found: dict[str, Any] = read_json(file) if file.is_file() else json.loads(tokenizer.backend_tokenizer.to_str())
    return found
