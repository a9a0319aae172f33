"""Checks of gradients, for our ops and for yours.

`gradcheck` compares a function's gradient with a numerical derivative and its error estimate.
`check_op` runs all checks of the test-suite on an op: one line tests an op of yours.
"""

from tinygrad_bn.testing.check import OpReport, check_op
from tinygrad_bn.testing.gradients import GradcheckError, GradcheckReport, VacuousCheckError, gradcheck, gradgradcheck

__all__ = [
    "GradcheckError", "GradcheckReport", "OpReport", "VacuousCheckError", "check_op", "gradcheck", "gradgradcheck",
]  # fmt: skip
