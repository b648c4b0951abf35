"""Token generation in one process: engine, trunk, clusters, KV cache, sampling. No network, no Ray."""
