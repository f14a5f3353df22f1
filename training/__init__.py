"""How the embedded model was trained. In the repository and the source distribution, not in the installed package."""
