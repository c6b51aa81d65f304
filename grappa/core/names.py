"""Names in result tables that several modules read; this module loads nothing, so that the command line may import it.

``MEAN`` stands in the column ``domain`` (or ``block``) for the mean over domains (blocks). ``GALLERIES``: an image is
searched among the images of its own domain, or among those of all domains. ``ORACLE`` is the best single
pseudo-granularity of each domain, chosen with labels.
"""

from __future__ import annotations

MEAN = "_mean"
GALLERIES = ("domain", "merged")
ORACLE = "oracle"
