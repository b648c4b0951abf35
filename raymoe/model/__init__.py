"""Pure torch in one process: the transformer, its routers, its experts and the dispatch of rows to them."""
