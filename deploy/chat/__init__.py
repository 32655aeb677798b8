"""`opdlm chat`: a conversation in the terminal, with a checkpoint in this process or a server."""
