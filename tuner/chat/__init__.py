"""A terminal chat: the model's words are streamed, its calls are shown, and what answers them has limits."""
