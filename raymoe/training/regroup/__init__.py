"""Regrouping in training: the clusterer, its clients, the recorder of statistics, and the application of plans."""
