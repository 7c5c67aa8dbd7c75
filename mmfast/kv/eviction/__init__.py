"""Methods that shorten the cache of a prompt once it has been read; one file each."""
