"""What both sides of a run share: actors and learner import this package, and it imports neither ray nor deepspeed.

config/                                   the schema of a run file; without torch
model/                                    checkpoints: reading, loading, converting
export/                                   students as folders that other programs load
data/                                     prompts, questions, answers, built-in tasks
grid.py, masks.py, curriculum.py          blocks, attention masks, limits that change with the rounds
types.py, samples.py, tensors.py          what the actors send to each other
token_ids.py                              which rows of a vocabulary are tokens
weights.py, weight_offer.py, checksum.py  packing, handing over and checking weights
checkpoint.py, files.py                   checkpoints, and files that appear whole or not at all
batches.py, retry.py, errors.py           cutting into groups, waiting for room in the object store, errors
"""
