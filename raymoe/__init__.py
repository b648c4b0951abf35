"""raymoe: train Mixture-of-Experts language models whose experts share weights in clusters.

The words
    expert       a logical expert, 0…E−1 per layer, stable for life (never a slot on a device)
    cluster      a group of experts that share a base (machines are nodes)
    base         the weights that a cluster's experts share
    residual     an expert's low-rank difference from its base
    width        the low rank of a residual ("rank" is a process)
    assignment   expert -> cluster, one vector per layer
    placement    cluster -> expert-parallel ranks
    plan         the next assignment, and the step from which it holds (a remap applies it)
    ghost        a moving expert in the cluster that it leaves, for as long as it fades
    trunk        everything but the clusters: embeddings, attention, norms, stage-1 routers
    worker       a Ray Train process
    grain        a micro-batch: the unit in which a global batch is split over workers

Shape suffixes
    B batch   S sequence   T = B·S tokens   D model   F expert hidden   V vocabulary
    E experts   C clusters   K experts per token   P clusters per token   N routed (row, expert) pairs
    W residual width   R rows at a cluster; lower case e, c: those held by this process

    x_TD, base_gate_CDF, gate_in_EDW

The rooms import one way: config, metrics <- data, model, clustering <- parallel, storage <- training, serving.
"""

__version__ = "0.1.0"
