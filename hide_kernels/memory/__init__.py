"""Peak memory of any PyTorch code, stage by stage: measured by `profile`, predicted by `predict` without running it."""

from hide_kernels.memory.prediction import predict
from hide_kernels.memory.recorder import Recorder, current_stage, host_memory, profile, stage
from hide_kernels.memory.report import MemoryReport, Owner, Sample, Stage

__all__ = [
    "MemoryReport",
    "Owner",
    "Recorder",
    "Sample",
    "Stage",
    "current_stage",
    "host_memory",
    "predict",
    "profile",
    "stage",
]
