"""The formats that are fuzzed. A new one is a `Target` in a file of its own, and its name here."""

from tests.fuzz import checkpoints, idx, tables

TARGETS = {target.name: target for target in (idx.IDX, idx.FOLDER, tables.CSV, checkpoints.CHECKPOINT)}
