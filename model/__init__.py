"""What the network is: config, checkpoint, tokenizer, and the PyTorch reference."""
