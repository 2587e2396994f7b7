"""Fine-tunes a causal language model on a file of pairs, chats or texts, for the command `spiel-peft train`."""
