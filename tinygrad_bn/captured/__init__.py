"""A step recorded once as a straight line of array operations, and run as that line from then on.

Half of a small training step is Python between kernels. `capture` writes down what a step does below the seam
(`backend`), while the step runs as always. What the host does anew in each step is written down as a call of the real
function: the optimizer's step, running statistics, keys of dropout, the arrays of parameters. So none of it can stand
still. A program runs only after it has been proven: see `capture`.

Only `train.fit` uses it, for modules and losses of this package: Python of other code may have effects that are not
written down, such as another learning rate or mode, and these would stand still.
"""

from tinygrad_bn.captured.capture import capture as capture
