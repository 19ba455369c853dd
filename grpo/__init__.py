"""nsa-grpo: GRPO for language models with native sparse attention. Import the modules you need; nothing is loaded here."""

__version__ = "0.1.0"
