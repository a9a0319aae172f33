"""The formats that are fuzzed. A new one is a `Target` in a file of its own, and its name here."""

from importlib.util import find_spec

from tests.fuzz import checkpoints, idx, tables

TARGETS = {target.name: target for target in (idx.IDX, idx.FOLDER, tables.CSV, checkpoints.CHECKPOINT)}
if find_spec("onnx"):  # the extra `onnx`
    from tests.fuzz import models

    TARGETS[models.MODEL.name] = models.MODEL
