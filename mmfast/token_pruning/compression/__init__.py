"""Methods whose tokens learn to stand for an image, one file per method, named as in the registry."""
