"""Fine-tune causal language models at long context, provably right."""

__version__ = "0.1.0"
