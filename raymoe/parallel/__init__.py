"""Expert parallelism over torch.distributed: placement of groups, exchange of rows, reduction of gradients."""
