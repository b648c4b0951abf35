"""Text in any form becomes packed token batches, a pure function of (seed, step)."""
