"""A small language model of one's own: its corpus, its tokenizer, its training."""
