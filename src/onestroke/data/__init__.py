"""Pictures with captions: the Source seam and its batches, the user's folders and tars, and the embedded comicset.

A Source gives captioned pictures by index; `batches` turns it into training batches by slot, the same ones whatever
the workers, from any slot on. `open_folder` opens the user's own pictures; `onestroke.data.comicset` draws the
embedded ones.
"""

from onestroke.data.folder import FolderSource, open_folder
from onestroke.data.loader import batches
from onestroke.data.plan import plan
from onestroke.data.source import Broken, BrokenPicture, Picture, Source

__all__ = ["Broken", "BrokenPicture", "FolderSource", "Picture", "Source", "batches", "open_folder", "plan"]
