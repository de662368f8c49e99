"""CelebA, aligned images (Liu, Luo, Wang, Tang, ICCV 2015), 1.4 GB. Non-commercial research; no redistribution.

Nothing is fetched from the official source: read the agreement at https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html,
download img_align_celeba.zip, list_attr_celeba.txt and list_eval_partition.txt in a browser and put them into
data/celeba/ (Google Drive often answers with a quota page; such a page is recognised and refused). They are checked
against the published digests. A folder named in FAIRTUNING_MIRROR may hold celeba/celeba.tar.gz, an edition of 20,000
images; the numbers of these are committed, so that the official archive gives the same images:
datasets.load("celeba", subset="celeba-20000").

    python data_scripts/celeba.py --pack 80x64
"""

import sys

from _images import main

if __name__ == "__main__":
    sys.exit(main("celeba", __doc__))
