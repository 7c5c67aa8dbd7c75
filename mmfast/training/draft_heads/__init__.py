"""Teaching drafters to foretell a model, from answers it writes itself."""
