"""The sample files that come with the package; data/samples/ATTRIBUTION.md names authors and licences."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path

from mmfast.media.errors import MediaError

_FOLDER = Path(__file__).parents[1] / "data" / "samples"


def sample(name: str) -> Path:
    """Find a sample file by its name.

    Args:
        name: ``"bigbuckbunny.mp4"``, ``"coffee.jpg"``, or ``"folder/file"`` for what lies in a folder.

    Returns:
        The path of the file inside the package.

    Raises:
        MediaError: if there is no such sample; the message lists near matches and all names.

    Example:
        >>> sample("coffee.jpg").name
        'coffee.jpg'
        >>> sample("cofee.png")
        Traceback (most recent call last):
        mmfast.media.errors.MediaError: no sample is named 'cofee.png'; did you mean coffee.jpg?
        There are: bigbuckbunny.mp4, coffee.jpg...
    """
    files = (path for path in _FOLDER.rglob("*") if path.is_file() and path.suffix != ".md")
    names = sorted(path.relative_to(_FOLDER).as_posix() for path in files)
    if name in names:
        return _FOLDER / name
    # Compared without suffixes: "cofee.png" is near to "coffee.jpg".
    stems = {known.rpartition(".")[0]: known for known in names}
    near = [stems[stem] for stem in get_close_matches(name.rpartition(".")[0] or name, stems)]
    hint = f"; did you mean {' or '.join(near)}?" if near else "."
    shown = sorted({f"{known.partition('/')[0]}/" if "/" in known else known for known in names})
    raise MediaError(f"no sample is named {name!r}{hint} There are: {', '.join(shown)}")
