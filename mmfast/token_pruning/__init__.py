"""Methods that reduce the number of visual tokens, and the base classes they share."""
