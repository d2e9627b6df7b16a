"""CTU, second step: the Arrow folder to parquet files. A thin caller of `verl.timeseries.from_arrow`.

    python create_data/multimodal_data_processing/ctu.py [--local_dir ./data/ctu_image] [--hdfs_dir DIR]

The first step has written the same files already; this one makes them anew from any copy of the Arrow folder.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from verl.timeseries import from_arrow


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0, 2 when the folder is not what the first step writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--local_dir", default="./data/ctu_image", help="folder that the first step wrote")
    parser.add_argument("--hdfs_dir", default=None, help="no effect: nothing is copied to HDFS")
    given = parser.parse_args(arguments)
    if given.hdfs_dir is not None:
        print(f"warning: --hdfs_dir={given.hdfs_dir} has no effect: nothing is copied to HDFS", file=sys.stderr)
    return from_arrow.main(["task=ctu", f"folder={given.local_dir}"])


if __name__ == "__main__":
    sys.exit(main())
