"""Methods that store keys and values in a smaller form; one file each."""
