"""Methods that keep the whole cache and read a part of it in each decode step; one file each."""
