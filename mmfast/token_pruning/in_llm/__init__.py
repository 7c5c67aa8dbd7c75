"""Methods that decide between two layers of the language model; one file each."""
