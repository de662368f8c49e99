"""LFW, deep-funneled (Huang et al. 2007, 2012), 0.1 GB, with attributes (Kumar et al. 2009). For research.

Nothing is fetched: news photographs whose owners keep their copyright, without a general licence. Find the
deep-funneled images and the hand-checked lists of gender by way of http://vis-www.cs.umass.edu/lfw, the attribute
values at https://www.cs.columbia.edu/CAVE/databases/pubfig, and put lfw-deepfunneled.tgz, lfw_attributes.txt,
male_names.txt and female_names.txt into data/lfw/. Only of the images a digest is published: after a look at the lists,
python data_scripts/lfw.py --accept official keeps theirs in data/MANIFEST.json. A folder named in FAIRTUNING_MIRROR may
hold lfw/lfw-deepfunneled.tar.gz, an edition whose attributes are booleans with a higher bar.

    python data_scripts/lfw.py --pack 80
"""

import sys

from _images import main

if __name__ == "__main__":
    sys.exit(main("lfw", __doc__))
