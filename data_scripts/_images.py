"""What the scripts of the image data sets share: fetch, verify, pack to a resized uint8 edition, accept an own one."""

import argparse
import importlib
import sys

from fairtuning import FairtuningError, datasets
from fairtuning.datasets import files, images


def main(name: str, doc: str) -> int:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--verify", action="store_true", help="fetch nothing, only check the files already here")
    parser.add_argument("--pack", metavar="SIZE", help="also decode all images at this size, e.g. 224 or 80x64")
    parser.add_argument("--crop", default="center", help=f"with --pack: {' or '.join(images.CROPS)}")
    parser.add_argument("--skip-faulty", action="store_true", help="with --pack: leave faulty images out, counted")
    parser.add_argument("--accept", metavar="EDITION", help="take the files here for this edition")
    arguments = parser.parse_args()
    try:
        if arguments.accept:
            files.accept(importlib.import_module(f"fairtuning.datasets.{name}").RECIPE, arguments.accept)
        if not arguments.verify and not arguments.pack:  # packing fetches what it needs, and nothing when it is done
            datasets.fetch(name)
        if arguments.pack:
            faulty = "skip" if arguments.skip_faulty else "refuse"
            data = datasets.pack(name, size=arguments.pack, crop=arguments.crop, faulty=faulty)
            parts = ", ".join(f"{part} {len(data.part(part))}" for part in data.split_names)
            print(f"{name}: {data.edition}, digest {data.digest[:12]}: {parts}")
        print(*datasets.verify(name), sep="\n")
    except FairtuningError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
