"""The model: config, checkpoint, tokenizer and chat template, rotary embedding, step contract, and the reference."""
