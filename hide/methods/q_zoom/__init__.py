"""Q-Zoom (arXiv 2604.06912): a trained gate decides whether to look closer, a trained branch says where."""
