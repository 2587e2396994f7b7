"""Fine-tuning a causal language model on a file of pairs, chats or texts: what `spiel-peft train` runs."""
