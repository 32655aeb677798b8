"""`opdlm trace`: the denoising steps of a run's student in one HTML page.

`command.py` decodes and scores the prompts, `record.py` observes each step, and `page.py` puts the result and the files
in `templates/` together.
"""
