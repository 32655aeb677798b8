"""`opdlm serve`: a model behind an OpenAI-compatible HTTP API, on Ray Serve.

client ──HTTP──► Ray's proxy ──► Api: checks, prompts to tokens, tokens to text ──► EngineReplica ... (a pool)
                                 (one)                          ◄──blocks──         (their decoders)
"""
