"""From an artifact to answers: the engine that makes tokens, and the policy that says how many replicas a cluster needs."""
