"""HiDe (arXiv 2510.00054): find what a question mentions by its attention, and look again at that alone."""
