"""UTKFace, aligned and cropped faces (Zhang, Song, Qi, CVPR 2017), 0.1 GB. Non-commercial research only.

Nothing is fetched from the official source: read the terms at https://susanqq.github.io/UTKFace, download
UTKFace.tar.gz there in a browser and put it into data/utkface/. No digest is published: after a look at the file,
python data_scripts/utkface.py --accept official keeps its digest in data/MANIFEST.json.

    python data_scripts/utkface.py --pack 80
"""

import sys

from _images import main

if __name__ == "__main__":
    sys.exit(main("utkface", __doc__))
