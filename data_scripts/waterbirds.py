"""Waterbirds v1.0 (Sagawa et al. 2020; WILDS), 0.5 GB. Built from CUB-200-2011 and Places: non-commercial research.

Fetches WILDS' bundle, or else the archive of the group DRO paper (no digest is published for either: that of what
arrives is kept in data/MANIFEST.json, and later readings are checked against it). By hand or from a mirror: put
waterbirds_v1.0.tar.gz into data/waterbirds/, or name the folder above waterbirds/ in FAIRTUNING_MIRROR.

    python data_scripts/waterbirds.py --pack 224
"""

import sys

from _images import main

if __name__ == "__main__":
    sys.exit(main("waterbirds", __doc__))
