"""Methods that decide before the language model reads the visual tokens; one file each."""
