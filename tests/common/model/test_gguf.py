"""GGUF files become model folders, or are refused in one line. `pytest tests/common/model/test_gguf.py`"""

from __future__ import annotations

import importlib.util
import json

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from opdlm.common.errors import OpdlmError
from opdlm.common.model import gguf_convert
from opdlm.common.model.convert import convert_checkpoint
from opdlm.common.model.facts import read_facts
from opdlm.common.model.gguf_convert import convert_gguf
from opdlm.common.model.gguf_file import is_gguf
from opdlm.common.model.load import load_model
from opdlm.common.model.tokenizer import load_tokenizer
from tests.gguf_files import END, TEMPLATE, TOKENS, TURN, save_gguf
from tests.tiny import LLAMA3_ROPE, tiny_model

Q8 = gguf.GGMLQuantizationType.Q8_0


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_folder_is_the_model_in_the_file(tmp_path, architecture, tied) -> None:
    sizes = {"vocab_size": len(TOKENS), "hidden_size": 32, "head_dim": 16, "tied": tied}
    source = save_gguf(tmp_path / "m.gguf", architecture, tiny_model(5, family=architecture, **sizes))
    convert_gguf(tmp_path / "m.gguf", tmp_path / "ar", "float32")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "ar")
    assert type(plain) is type(source)
    assert plain.dtype == torch.float32
    assert plain.config.tie_word_embeddings is tied
    ids = torch.arange(20, 40)[None]
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, source(ids).logits)

    mask_id = convert_checkpoint(tmp_path / "ar", tmp_path / "student", 4, "absolute")
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / "student")(ids).logits[..., :mask_id], source(ids).logits)


def test_quantised_numbers_become_what_llama_cpp_computes_with(tmp_path) -> None:
    source = save_gguf(tmp_path / "m.gguf", kind=Q8)
    convert_gguf(tmp_path / "m.gguf", tmp_path / "exact", "float32")
    convert_gguf(tmp_path / "m.gguf", tmp_path / "short")
    down = source.model.layers[1].mlp.down_proj.weight.detach().numpy()
    expected = torch.from_numpy(gguf.dequantize(gguf.quantize(down, Q8), Q8))
    exact, short = load_model(tmp_path / "exact", "auto"), load_model(tmp_path / "short", "auto")
    assert torch.equal(exact.model.layers[1].mlp.down_proj.weight, expected)
    assert torch.equal(short.model.layers[1].mlp.down_proj.weight, expected.to(torch.bfloat16))


def test_large_models_are_written_in_parts(tmp_path, monkeypatch) -> None:
    source = save_gguf(tmp_path / "m.gguf")
    monkeypatch.setattr(gguf_convert, "_SHARD_BYTES", 20_000)
    told = []
    convert_gguf(tmp_path / "m.gguf", tmp_path / "ar", "float32", lambda done, total: told.append((done, total)))
    index = json.loads((tmp_path / "ar" / "model.safetensors.index.json").read_text())
    parameters = dict(source.named_parameters())
    assert index["weight_map"].keys() == parameters.keys()
    assert index["metadata"]["total_size"] == sum(p.numel() * 4 for p in parameters.values())
    assert len(set(index["weight_map"].values())) > 2
    assert told == [(i + 1, len(parameters)) for i in range(len(parameters))]
    for name, weight in load_model(tmp_path / "ar").named_parameters():
        assert torch.equal(weight, parameters[name]), name


def test_tokenizer_template_and_end_tokens_come_along(tmp_path) -> None:
    save_gguf(tmp_path / "m.gguf", change=lambda out: out.add_add_bos_token(False))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "ab", "tokenizer_class": "NoSuchTokenizer"}')
    convert_gguf(tmp_path / "m.gguf", tmp_path / "ar")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "ar")
    names = tokenizer.convert_ids_to_tokens
    assert names(tokenizer("ab a<|turn|>")["input_ids"]) == ["ab", "Ġa", TURN]
    assert tokenizer.eos_token == END
    assert tokenizer.chat_template == TEMPLATE
    assert read_facts(tmp_path / "ar").eos_ids == (TOKENS.index(END), TOKENS.index(TURN))


def test_text_is_split_as_the_file_says(tmp_path) -> None:
    """GPT-2 keeps one space before a number. `smollm` splits digits first, so both spaces are together."""
    pieces = {}
    for pre in ("gpt-2", "smollm"):
        save_gguf(tmp_path / f"{pre}.gguf", pre=pre)
        convert_gguf(tmp_path / f"{pre}.gguf", tmp_path / pre)
        words = load_tokenizer(tmp_path / pre).backend_tokenizer.pre_tokenizer.pre_tokenize_str("a  12")
        pieces[pre] = [piece for piece, _ in words]
    assert pieces == {"gpt-2": ["a", "Ġ", "Ġ12"], "smollm": ["a", "ĠĠ", "1", "2"]}


def test_llama3_texts_begin_with_the_beginning_token_and_keep_whole_tokens(tmp_path) -> None:
    """llama.cpp does both by the name of the split. No token of another model is added."""
    bos, own = TOKENS.index(TURN), TOKENS[:-1]
    save_gguf(
        tmp_path / "m.gguf", pre="llama-bpe", change=lambda out: out.add_bos_token_id(bos), merges=["Ġ a"], tokens=own
    )
    convert_gguf(tmp_path / "m.gguf", tmp_path / "ar")
    tokenizer = load_tokenizer(tmp_path / "ar")
    assert tokenizer("ab")["input_ids"] == [bos, TOKENS.index("ab")], "ab is a token that no merge makes"
    assert len(tokenizer) == len(own)


def test_the_rotation_of_llama3_is_read_from_its_factors(tmp_path) -> None:
    rope = LLAMA3_ROPE | {"original_max_position_embeddings": 8192, "rope_theta": 500000.0}
    sizes = {"vocab_size": len(TOKENS), "hidden_size": 32, "head_dim": 16}
    source = tiny_model(5, family="llama", rope_parameters=rope, **sizes)
    plain = tiny_model(5, family="llama", rope_parameters={"rope_type": "default", "rope_theta": 500000.0}, **sizes)
    factors = (plain.model.rotary_emb.inv_freq / source.model.rotary_emb.inv_freq).numpy().astype(np.float32)
    assert factors.max() > 7.9
    save_gguf(tmp_path / "m.gguf", model=source, tensors={"rope_freqs.weight": factors})
    convert_gguf(tmp_path / "m.gguf", tmp_path / "ar", "float32")
    assert load_model(tmp_path / "ar").config.rope_parameters == rope
    save_gguf(tmp_path / "odd.gguf", model=source, tensors={"rope_freqs.weight": factors[::-1].copy()})
    with pytest.raises(OpdlmError, match="factors of an unknown rotation"):
        convert_gguf(tmp_path / "odd.gguf", tmp_path / "other")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"architecture": "gemma2"}, "its architecture is 'gemma2'; supported in GGUF files: llama, qwen2, qwen3"),
        ({"leave_out": ("tokenizer",)}, "has no tokenizer"),
        ({"leave_out": ("blk.1.ffn_up.weight",)}, r"no tensor for model\.layers\.1\.mlp\.up_proj\.weight"),
        ({"leave_out": ("token_embd.weight",)}, r"has no token_embd\.weight"),
        ({"pre": "martian"}, r"tokenizer\.ggml\.pre is 'martian'"),
        ({"architecture": "qwen2", "pre": "llama-bpe"}, r"tokenizer\.ggml\.pre is 'llama-bpe', but transformers"),
        ({"pre": None}, r"tokenizer\.ggml\.pre is 'None'"),
        ({"change": lambda out: out.add_uint16("split.count", 3)}, "is one of 3 parts of a split file"),
        ({"change": lambda out: out.add_expert_count(8)}, "is a mixture of experts"),
        ({"change": lambda out: out.add_sliding_window(64)}, "sliding window"),
        ({"change": lambda out: out.add_rope_dimension_count(8)}, r"rope\.dimension_count is 8, but a head has 16"),
        ({"change": lambda out: out.add_logit_scale(0.5)}, r"logit_scale is 0\.5"),
        (
            {"change": lambda out: out.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)},
            r"rope\.scaling\.type is 'longrope'",
        ),
        ({"tensors": {"blk.0.odd.weight": np.ones((2, 2), np.float32)}}, "has no place in a llama model"),
        ({"tensors": {"blk.0.ffn_up.weight": np.ones((2, 2), np.float32)}}, r"ffn_up\.weight is \[2, 2\], but"),
        ({"tensors": {"odd": np.ones(4, np.int32)}}, "odd is stored as I32"),
        ({"tensors": {"output_norm.weight": np.full(32, np.nan, np.float32)}}, "output_norm.*NaN or infinite"),
    ],
)
def test_other_files_are_refused_in_one_line(tmp_path, settings, message) -> None:
    save_gguf(tmp_path / "m.gguf", **settings)
    with pytest.raises(OpdlmError, match=message) as refused:
        convert_gguf(tmp_path / "m.gguf", tmp_path / "ar")
    assert "\n" not in str(refused.value)
    assert str(tmp_path / "m.gguf") in str(refused.value)
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_damaged_files_are_refused_in_one_line(tmp_path) -> None:
    save_gguf(tmp_path / "whole.gguf")
    whole, file = (tmp_path / "whole.gguf").read_bytes(), tmp_path / "cut.gguf"
    for length in (4, 11, 24, 60, 500, 3000, len(whole) // 2, len(whole) - 300):
        file.write_bytes(whole[:length])
        assert is_gguf(file)
        with pytest.raises(OpdlmError, match="is damaged, cut short or of an unknown kind") as refused:
            convert_gguf(file, tmp_path / "ar")
        assert "\n" not in str(refused.value), length
    file.write_bytes(b"not a model")
    with pytest.raises(OpdlmError, match="is damaged, cut short or of an unknown kind"):
        convert_gguf(file, tmp_path / "ar")
    assert not (tmp_path / "ar").exists()


def test_without_the_package_the_line_says_how_to_get_it(tmp_path, monkeypatch) -> None:
    save_gguf(tmp_path / "m.gguf")
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else found(name))
    with pytest.raises(OpdlmError, match=r"needs the package gguf; pip install 'opdlm-ray\[gguf\]'"):
        convert_gguf(tmp_path / "m.gguf", tmp_path / "ar")
