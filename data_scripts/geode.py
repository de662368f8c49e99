"""GeoDE (Ramaswamy et al. 2023), many GB, CC BY 4.0.

Fetches the official archive and goes on where an earlier attempt broke off (no digest is published: that of what
arrives is kept in data/MANIFEST.json, and later readings are checked against it).

    python data_scripts/geode.py --pack 224
"""

import sys

from _images import main

if __name__ == "__main__":
    sys.exit(main("geode", __doc__))
