"""KV memory on the host: the pool of slots, and the prefix cache."""
