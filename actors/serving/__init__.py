"""Serving: requests that come, stream and are cancelled one by one. Imports no ray.

engine.py          takes requests from any thread, and one thread of its own decodes them
decoder.py         students: the continuous block decoder
autoregressive.py  models that are not converted: static batches of transformers' `generate`
"""
