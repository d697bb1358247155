"""One engine as a worker of NVIDIA Dynamo: token ids in, token ids out. The frontend tokenises, routes and migrates."""
