"""Puts datasets one after the other into one, in constant memory.

    python tools/datasets/merge_datasets.py --input data/pile_shards --output-prefix data/pile_text_document
    python tools/datasets/merge_datasets.py --input data/a_text_document data/b_text_document --output-prefix data/ab

A folder's datasets are taken in the order of their names, which is that of the inputs for parts that
preprocess_data.py --shard has made; all of them must be there. Prefixes are taken in the order given. Writes a .bin, an
.idx and a manifest, with the hashes of every input; each part is compared with its manifest on the way.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from megatron_tokenformer import run_tool

from megatron.config.local_path import local_path
from megatron.data.dataset_format import dataset_file
from megatron.data.formats.mmap import data_file, index_file
from megatron.data.prepare.merge import merge_datasets, parts_in
from megatron.errors import DataError
from tools.command_line import progress_bar, tool_parser


def main(argv: Sequence[str]) -> int:
    """Merges the datasets and prints what came of them."""
    parser = tool_parser(__doc__)
    parser.add_argument(
        "--input", nargs="+", type=local_path, required=True, help="a folder of datasets, or their prefixes"
    )
    parser.add_argument("--key", help="of a folder, the datasets of this key alone")
    parser.add_argument("--output-prefix", type=local_path, required=True, help="path of the dataset, without endings")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing dataset")
    args = parser.parse_args(argv)
    prefixes: list[Path] = []
    for path in args.input:
        prefixes += parts_in(path, args.key) if path.is_dir() else [path]
    require_room(prefixes, args.output_prefix, overwrite=args.overwrite)
    with progress_bar() as bar:
        task = bar.add_task("merging", total=len(prefixes))
        manifest = merge_datasets(
            prefixes, args.output_prefix, lambda name: bar.update(task, advance=1, description=name)
        )
    print(f"{data_file(args.output_prefix)}: {manifest.documents:,} documents, {manifest.tokens:,} tokens")
    return 0


def require_room(prefixes: Sequence[Path], output: Path, *, overwrite: bool) -> None:
    """Raises DataError when the output is there already, is one of the inputs, or does not fit on the disk."""
    if output.absolute() in [prefix.absolute() for prefix in prefixes]:
        raise DataError(f"{output}: is one of the inputs. Name another --output-prefix.")
    if not overwrite and any(path.exists() for path in (data_file(output), index_file(output))):
        raise DataError(f"{output}: a dataset is there already. Name another --output-prefix, or give --overwrite.")
    files = [dataset_file(prefix, suffix) for prefix in prefixes for suffix in (".bin", ".idx")]
    needed = sum(path.stat().st_size for path in files if path.is_file())
    folder = next(folder for folder in output.absolute().parents if folder.exists())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DataError(f"{output}: {needed:,} bytes are needed, and {free:,} are free in {folder}. Make room.")


if __name__ == "__main__":
    run_tool(main)
