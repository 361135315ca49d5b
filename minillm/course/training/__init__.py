"""How the embedded models were made: corpus, tokenizer, training loop, model card."""
