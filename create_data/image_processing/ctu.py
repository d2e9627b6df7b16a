"""CTU, first step: the archive's series to plots and tables. A thin caller of `verl.timeseries.build`.

python create_data/image_processing/ctu.py [--l7_dir ./ori_data/Computers] [--output_dir ./data/ctu_image]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from verl.timeseries import build


def main(arguments: list[str] | None = None) -> int:
    """Exit code of the data step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--l7_dir", default="./ori_data/Computers", help="folder with Computers_TRAIN.arff and _TEST")
    parser.add_argument("--output_dir", default="./data/ctu_image", help="where plots, Arrow and parquet files go")
    given = parser.parse_args(arguments)
    return build.main(["task=ctu", f"source={given.l7_dir}", f"output={given.output_dir}"])


if __name__ == "__main__":
    sys.exit(main())
