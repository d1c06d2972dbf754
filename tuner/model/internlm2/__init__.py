"""InternLM2 native: configuration, network, reward model and tokenizer, with the published names."""
