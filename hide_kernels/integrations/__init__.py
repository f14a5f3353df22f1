"""Bridges from model frameworks to the operators; the only place in hide_kernels that knows a framework."""
