"""Trained parts that do more to a language model than replace its visual tokens: modules for training and use."""
