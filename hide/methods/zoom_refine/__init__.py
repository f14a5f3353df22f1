"""Zoom-Refine (arXiv 2506.01663): the model names a box, sees it cut out, and checks its answer."""
