"""raymoe: train Mixture-of-Experts language models whose experts form clusters.

    raymoe.train(config, *overrides)    train a model on Ray
    raymoe.load(name)                   load an exported model, for .generate(prompt)

Glossary
    expert      one of the E experts of a layer, numbered 0 to E-1; its number never changes
    cluster     a group of experts of a layer, chosen as one in stage 1 of the routing (a machine is a node)
    base        weights that all experts of a cluster share; private experts may have none
    residual    the low-rank difference of an expert from its base
    private     of an expert: a narrow feed-forward network of its own instead of a residual
    width       the rank of a residual, or the hidden size of a private expert (a rank alone is a process)
    assignment  expert -> cluster, one vector per layer
    placement   cluster -> ranks that hold its experts
    plan        a new assignment, and the step at which it is applied
    version     the number of plans that were applied
    remap       the application of a plan
    fold        the conversion of independent experts to bases and residuals
    forced      a choice that a router makes because of its selection bias, outside the top k without it
    ghost       a moving expert in the cluster that it leaves, while its weight fades to zero
    trunk       all weights outside the clusters: embeddings, attention, norms and routers
    resident    a cluster whose weights a trunk replica has in its own process
    worker      a process of Ray Train
    replica     a process of Ray Serve
    grain       a micro-batch: the unit by which a global batch is divided among workers

Shape suffixes
    B batch   S sequence   T = B*S tokens   D model   F expert hidden   V vocabulary
    E experts   C clusters   K experts per token   P clusters per token   N routed (row, expert) pairs
    W width   R rows at a cluster; lower case e, c: those of this process

    x_TD, base_gate_CDF, gate_in_EDW

Imports between packages go down the floors that tests/test_architecture.py lists.
"""

from __future__ import annotations

__version__ = "0.1.0"

_API = ("load", "train")


def __getattr__(name: str) -> object:
    """Import the Python API at the first use, so that `import raymoe` stays fast."""
    if name in _API:
        from raymoe import python_api

        return getattr(python_api, name)
    raise AttributeError(f"module 'raymoe' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_API})
