"""`sixfold bench peers`: Sixfold and other engines, same prompts, same machine, rounds interleaved.

`workloads` says what is sent, `known.toml` and `launchers` who is measured, `processes` runs their
servers, `rounds` measures, `summary` reduces, `report` and `plot` write, `compare` is the whole.
"""
