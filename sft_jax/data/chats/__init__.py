"""Conversations to texts with supervised spans, and to tokens, through a chat template."""
