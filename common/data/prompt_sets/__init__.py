"""Sets of prompts to train on: one that is made here, without network, and those of the recipes, from the hub.

`everyday.py` makes the built-in set from the words and templates of `everyday/`; `hub.py` reads the sets of `hub.yaml`;
`held_out.py` says which questions are kept for evaluation.
"""
