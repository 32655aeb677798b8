"""Reward actors: they read finished responses and say what each is worth (METHOD.md section 7)."""
