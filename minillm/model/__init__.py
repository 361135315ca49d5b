"""The model: one decoder for the Llama family, its weights, its tokenizer, and how the embedded ones were trained."""
