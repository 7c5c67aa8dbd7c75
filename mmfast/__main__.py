"""``python -m mmfast``: the command line, for launchers that start modules."""

from mmfast.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
