"""Trained parts that do more to a model than replace its visual tokens, to build and train with.

No plan reaches them yet: what they need of a language model goes beyond what a method is given.
"""
