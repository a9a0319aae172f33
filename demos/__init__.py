"""Demos: `python -m demos` lists them, `python -m demos NAME --help` shows the options of one."""
