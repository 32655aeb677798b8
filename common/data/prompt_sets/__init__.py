"""Sets of prompts to train on: one that is made here, without network, and those of the recipes, from the hub."""
