"""Pure torch, one process: the transformer, its routers, its experts and how rows reach them."""
