"""What our HTML pages share: how files become one page that loads nothing from outside, their look, and helpers.

`opdlm trace` (`deploy/tools/trace/`) and the page of a server (`deploy/serve/page.py`) are made of it.
"""
