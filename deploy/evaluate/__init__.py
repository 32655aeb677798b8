"""How good a checkpoint is, and how fast.

questions.py, held_out.py          prompts with known answers: a file, or held-out problems of a built-in task
decoders.py, actor_decoder.py      checkpoints that answer, in this process or over Ray actors
generation.py                      text in, text out: `opdlm.load(folder).generate([...])`
commands.py, sweep.py, options.py  `opdlm eval`, `opdlm sweep`, and the options that they share
lm_eval.py, lm_eval_model.py       tasks of lm-eval
during_run.py, background.py       the evaluations of a training run
"""
