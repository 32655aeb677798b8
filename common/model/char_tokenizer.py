"""A tokenizer with one token per character, in transformers' format, for teachers that are trained from scratch."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAD, EOS, UNKNOWN = "<|pad|>", "<|endoftext|>", "<|unk|>"


def build_char_tokenizer(alphabet: str) -> PreTrainedTokenizerFast:
    """Returns a tokenizer with a token for each character of `alphabet`, and for padding, end of sequence and unknown.

    It has no mask token.
    """
    vocabulary = {token: i for i, token in enumerate([PAD, EOS, UNKNOWN, *sorted(set(alphabet))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
    )
