"""What the network is: config, checkpoint, tokenizer and template, rotary embedding, step contract."""
