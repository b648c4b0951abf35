"""Expert parallelism over torch.distributed: who holds what, how rows get there, how gradients come together."""
