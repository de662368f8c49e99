"""Adult (census income), UCI Machine Learning Repository, doi 10.24432/C5XW20, CC BY 4.0.

Fetches adult.data and adult.test (6 MB) into data/adult/ and checks them by SHA-256. Without a network, name a folder
or base address that holds adult/adult.data and adult/adult.test in FAIRTUNING_MIRROR.

    python data_scripts/adult.py            fetch, then verify
    python data_scripts/adult.py --verify   only verify what is here
"""

import argparse
import sys

from fairtuning import FairtuningError, datasets


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--verify", action="store_true", help="fetch nothing, only check the files already here")
    arguments = parser.parse_args()
    try:
        if not arguments.verify:
            datasets.fetch("adult")
        print(*datasets.verify("adult"), sep="\n")
    except FairtuningError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
