"""Data sets, metrics and runners, imported as ``mmfast.eval``: the only room that knows data."""
