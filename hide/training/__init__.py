"""Training of what methods want trained: Q-Zoom's branches, and the model behind them (arXiv 2604.06912).

`q_zoom` runs the stages, each a file: `labels` what the region branch learns from, `heads` whose attention that is,
`objectives` the losses, `routing` what the gate learns from. `loop` minimises, `checkpoint` writes, `released` reads
the published data. How the embedded model was made is another matter: the repository's folder `training`.
"""
