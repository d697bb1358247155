"""Engine directory to text: executors, KV memory, decoding, scheduling, and the servers."""
