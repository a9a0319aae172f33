"""What is going on in a network: `lint` looks for faults, `detect_anomaly` for the origin of a NaN, and recorders, as
callbacks of `fit`, keep what the layers do over time."""

from tinygrad_bn.diagnose.anomaly import Anomaly, AnomalyError, Watch, detect_anomaly
from tinygrad_bn.diagnose.findings import Finding, Findings
from tinygrad_bn.diagnose.lint import lint
from tinygrad_bn.diagnose.recorders import LayerHistograms, StatisticsGaps, UpdateRatios

__all__ = [
    "Anomaly", "AnomalyError", "Finding", "Findings", "LayerHistograms", "StatisticsGaps", "UpdateRatios", "Watch",
    "detect_anomaly", "lint",
]  # fmt: skip
