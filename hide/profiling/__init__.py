"""Where the memory of whole flows goes (`hide profile`): eager attention, published HiDe, and ours.

`models` builds a model from its configuration alone, `workload` makes pictures and prompts, `flows` has the flows with
their stages, `runs` predicts and measures them and finds what fits on a card, `output` writes it. The profiler itself,
`hide_kernels.memory`, knows nothing of these.
"""
