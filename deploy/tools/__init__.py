"""Commands beside training.

`pretrain.py` trains a small AR teacher from scratch (`opdlm pretrain`), `generate.py` decodes prompts in the terminal
(`opdlm generate`), `prompts.py` writes files of prompts (`opdlm prompts`), and `trace/` shows each denoising step in a
web page (`opdlm trace`).
"""
