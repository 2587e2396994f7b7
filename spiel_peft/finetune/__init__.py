"""Fine-tuning a causal language model on a file of texts or chats: what `spiel-peft train` and the examples run."""
