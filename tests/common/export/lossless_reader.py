"""A script that decodes with lossless folders in a process that cannot import our packages.

`python -I lossless_reader.py JOB.json` reads `{"folders": [...], "prompts": [[...]], "most": N, "forward": FILE,
"transformers": a folder to import it from or null, "out": FILE}`.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from bare_reader import OURS, Refuse, run_card


def read(path: str, prompts: list[list[int]], ids, most: int) -> dict:
    """Greedy responses to all prompts in a padded batch, sampled ones to one prompt, and logits."""
    import torch
    import transformers

    assert transformers.__version__.startswith("5." if job["transformers"] is None else "4.")
    model = transformers.AutoModelForMaskedLM.from_pretrained(path, trust_remote_code=True, dtype=torch.float32)
    width = max(map(len, prompts))
    batch = {
        "input_ids": torch.tensor([[0] * (width - len(row)) + row for row in prompts]),
        "attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts]),
    }
    model.prefill_tokens = 5
    found = {"greedy": model.generate(**batch, max_new_tokens=most)}
    torch.manual_seed(0)
    found["sampled"] = model.generate(
        torch.tensor(prompts[:1]).expand(4000, -1), max_new_tokens=2, do_sample=True, temperature=1.5, top_k=6
    )
    with torch.no_grad():
        found["masked"], found["clean"] = model(input_ids=ids).logits, model(input_ids=ids[:, :-3]).logits
        seen = torch.ones(1, 1, *ids.shape[1:] * 2).tril().bool()
        given = {"input_ids": ids, "attention_mask": seen.expand(len(ids), -1, -1, -1)}
        found["given"] = model(**given, noisy=torch.zeros_like(ids).bool()).logits
    for call in (lambda: model(**given), lambda: model.generate(**batch, threshold=0.5)):
        try:
            call()
        except ValueError:
            continue
        raise AssertionError("a call that says nothing of noisy tokens, or of a threshold, was taken")
    os.chdir(path)  # its code reads the folder that it is in
    run_card(Path(path))
    return found


if __name__ == "__main__":
    sys.meta_path.insert(0, Refuse())
    from safetensors.torch import load_file, save_file

    job, results = json.loads(Path(sys.argv[1]).read_text()), {}
    ids = load_file(job["forward"])["ids"]
    if job["transformers"] is not None:
        sys.path.insert(0, job["transformers"])
    for path in job["folders"]:
        results |= {f"{Path(path).name}/{k}": v for k, v in read(path, job["prompts"], ids, job["most"]).items()}
    assert not OURS & {name.partition(".")[0] for name in sys.modules}
    save_file({name: value.contiguous() for name, value in results.items()}, job["out"])
