"""Demos: `python -m demos` lists them, `python -m demos NAME --help` says what one can do."""
