"""FGVC-Aircraft 2013b (Maji et al. 2013), 2.8 GB. Non-commercial research; the photographs stay their owners'.

Fetches the official archive, goes on where an earlier attempt broke off, and checks it by its published digest. The
banner of 20 rows at the bottom of each photograph is cut off when packing.

    python data_scripts/aircraft.py --pack 224
"""

import sys

from _images import main

if __name__ == "__main__":
    sys.exit(main("aircraft", __doc__))
