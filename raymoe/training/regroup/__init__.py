"""The workers' side of regrouping and the clustering actor: messages, and application of plans."""
