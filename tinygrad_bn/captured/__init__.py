"""A step recorded once as a straight line of array operations, and run as that line from then on.

`capture` writes down what a step does below the seam (`backend`), while the step runs as always. What the host does
again in each step is written down as a call of the real function: the optimizer's step, running statistics, keys of
dropout, the arrays of parameters. So none of it can stand still. Python code of the step itself runs only while it is
recorded. If it does something that lasts, the step is not captured; if anything that it reads changes, the step is
recorded again. And a program runs only after it has been proven, bit for bit, on other data.

`capture` decides when a step is recorded, proven and run. `recorder` writes it down, with arguments that are `watched`.
`effects` and `reads` look at its Python code. `program` runs and prints it; `nests` holds what calls take and give.
"""

from tinygrad_bn.captured.capture import capture as capture
