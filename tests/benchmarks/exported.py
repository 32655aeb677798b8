"""Exported `generate` beside our decoder: the same prompts, batches of 8, the same tokens, one process.

    python -m tests.benchmarks.exported --threads 1 [--student FOLDER] [--response 128] [--repetitions 5]

Each repetition measures both, one after the other, on prompts of 10 to 40 random tokens; no response ends before its
limit. The figures are CPU seconds of this process, which on one thread do not depend on what else the machine does.
Without --student: random weights, hidden 256, 8 layers, 4,096 rows, float32, blocks of 4. `static` reveals a token per
step, `dynamic` what is above a low threshold.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, Qwen3Config

from opdlm.actors.rollout.decoder import BlockDecoder
from opdlm.actors.rollout.settings import DecodeSettings
from opdlm.common.export import export
from opdlm.common.model.char_tokenizer import build_char_tokenizer
from opdlm.common.model.convert import convert_checkpoint
from opdlm.common.model.facts import read_facts
from opdlm.common.model.folder import save_model
from opdlm.common.model.load import load_model
from opdlm.common.types import RolloutRequest
from tests.benchmarks.measure import Ratio, parser, write_json

BATCH = 8
ARMS = {"static": 1.0, "dynamic": 0.1}


def small_student(root: Path) -> Path:
    """A random student, of a size at which a forward takes longer than Python around it."""
    tokenizer = build_char_tokenizer("0123456789+-=;")
    shape = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8, "head_dim": 32}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4}
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    torch.manual_seed(0)
    config = Qwen3Config(vocab_size=4096, max_position_embeddings=4096, initializer_range=0.1, **shape, **heads, **ids)
    save_model(AutoModelForCausalLM.from_config(config), tokenizer, root / "teacher", [tokenizer.eos_token_id])
    convert_checkpoint(root / "teacher", root / "student", 4, "absolute")
    return root / "student"


def compare(folder: Path, exported: Path, response: int, repetitions: int) -> list[dict[str, Any]]:
    """Times both on the same prompts; the tokens must be the same."""
    ours, facts = load_model(folder), read_facts(folder)
    theirs = AutoModelForMaskedLM.from_pretrained(exported, trust_remote_code=True, dtype=torch.float32).eval()
    rng = np.random.default_rng(0)
    prompts = [rng.integers(2, 17, int(length)).astype(np.int32) for length in rng.integers(10, 41, BATCH)]
    width = max(map(len, prompts))
    batch = {
        "input_ids": torch.tensor([[0] * (width - len(ids)) + ids.tolist() for ids in prompts]),
        "attention_mask": torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts]),
    }
    requests = [RolloutRequest(i, str(i), ids, response, seed=i) for i, ids in enumerate(prompts)]
    rows = []
    for name, threshold in ARMS.items():
        how = DecodeSettings(facts.block_size, facts.block_grid, "low_confidence_dynamic", threshold, ignore_eos=True)
        decoder = BlockDecoder(ours, how, facts.mask_id, facts.eos_ids, BATCH, tokens=facts.tokens, form=facts.form)
        seconds: list[tuple[float, float]] = []
        for _ in range(repetitions + 1):  # the first warms up
            started = time.process_time()
            trajectories, stats = decoder.decode(requests)
            between = time.process_time()
            found = theirs.generate(**batch, max_new_tokens=response, threshold=threshold, eos_token_id=[])
            seconds.append((between - started, time.process_time() - between))
        same = np.mean([(row[width:] == t.response).mean() for row, t in zip(found.numpy(), trajectories, strict=True)])
        rows.append(
            {
                "arm": name,
                "tokens_per_step": BATCH * response / stats.denoising_steps,
                "same_tokens": float(same),
                "our_seconds": Ratio([a for a, _ in seconds[1:]]),
                "exported_seconds": Ratio([b for _, b in seconds[1:]]),
                "times": Ratio([b / a for a, b in seconds[1:]]),
            }
        )
    return rows


def main() -> None:
    """Prints the table and writes `exported.json`."""
    options = parser(__doc__)
    options.add_argument("--student", type=Path)
    options.add_argument("--response", type=int, default=128)
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        folder = args.student or small_student(root)
        layout: Any = f"a2d-{load_model(folder).config.model_type}"
        export(folder, root / "exported", layout)
        rows = compare(folder, root / "exported", args.response, args.repetitions)
    table = Table("", "tokens per step", "same tokens", "our decoder, CPU s", "exported, CPU s", "times")
    for row in rows:
        figures = [f"{row['tokens_per_step']:.2f}", f"{row['same_tokens']:.4f}"]
        table.add_row(row["arm"], *figures, *(str(row[key]) for key in ("our_seconds", "exported_seconds", "times")))
    Console().print(table)
    write_json("exported", [{k: v.values if isinstance(v, Ratio) else v for k, v in row.items()} for row in rows])


if __name__ == "__main__":
    main()
