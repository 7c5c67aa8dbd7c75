"""Methods that decide which frames of a video are encoded at all, one file each."""
