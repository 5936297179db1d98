"""Makes a smaller model of a trained one: layers of a reference, chosen, stacked or cut to half their width.

    python tools/ckpts/inherit.py --input_dir runs/reference --num_layers 12 --output_dir runs/small
    python tools/ckpts/inherit.py --input_dir runs/reference --layers 0,2,5-9 --sublayers attention feed_forward \\
        --output_dir runs/small [--config_file run.yml model_parallel_size=2] [--ranks 16]
    python tools/ckpts/inherit.py --input_dir runs/reference --operator hybrid_stack --num_layers 18 \\
        --output_dir runs/hybrid
    python tools/ckpts/inherit.py --input_dir runs/reference --operator half_width --rows even --output_dir runs/narrow
    python tools/ckpts/inherit.py --input_dir gpt2-medium --config_file run.yml num_layers=12 --output_dir runs/small

The reference is a checkpoint of any layout, or a Hugging Face folder, whose vocabulary and numbers are then taken as
convert_hf_to_neox.py does; a configuration says the rest. Embeddings, final norm and head are inherited always. What is
not begins as in a run of the configuration, from its seed. Before anything is written, a table names every tensor with
its source, and both models are measured on tokens of the configured dataset, --data_path or --text.

Weights alone are written where the reference has no optimizer's state; train on with `load` and `finetune: true`.
Otherwise `auto_resume: true` with `save` goes on from the output, and `load` with `finetune: true` takes its weights. A
configuration with the section `inherit` does the same when a run starts, without this tool.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_tokenformer import run_tool

from megatron.config.load_config import load_words
from megatron.config.model_size import count_parameters
from megatron.config.sections.inherit import InheritConfig
from megatron.config.sections.run_config import RunConfig
from megatron.errors import ConfigError
from megatron.registry import install_extra, require
from tools.ckpts.rewriting import add_measured_tokens, add_rewriting, parallel_sizes, read_rewriting
from tools.command_line import positive, stay_on_cpu, tool_parser
from tools.section_flags import add_section_flags, read_section_flags

if TYPE_CHECKING:
    from megatron.checkpointing.states.parameter_layout import ParallelSizes
    from megatron.growth.inheriting.inherit_checkpoint import Reference
    from megatron.growth.inheriting.inherit_operator import Inheritance


def main(argv: Sequence[str]) -> int:
    """Makes the checkpoint, then prints what was written, and how to train it."""
    args = parse_args(argv)
    stay_on_cpu()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("megatron").setLevel(logging.INFO)
    job = read_job(args)
    from megatron.growth.inheriting.inherit_checkpoint import inherit_checkpoint, plan_inheritance
    from megatron.growth.inheriting.source_table import source_table

    inheritance = plan_inheritance(job.reference, job.config, job.rules)
    print("\n".join(source_table(inheritance)), flush=True)
    print(measured(args, job, inheritance), flush=True)
    path = inherit_checkpoint(job.reference, job.config, job.rules, job.sizes, args.output_dir)
    before, after = (
        count_parameters(model, inheritance.vocab.padded) for model in (inheritance.before, inheritance.after)
    )
    print(f"{path}: {after:,} parameters by {job.rules.operator}, of {job.reference.name} with {before:,}")
    weights = f"load={args.output_dir} finetune=true"
    resumed = "" if job.reference.header.engine is None else f", or save={args.output_dir} auto_resume=true"
    print(f"Train on with: num_layers={inheritance.after.num_layers} {weights}{resumed}")
    return 0


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """Parses the command line."""
    parser = tool_parser(__doc__)
    source = "the reference: a global_stepN folder, a run's folder, or a Hugging Face folder"
    add_rewriting(parser, "YAML files of the run to come", config_required=False, source=source)
    parser.add_argument("--num_layers", type=positive, help="layers of the model, where no configuration says them")
    add_measured_tokens(parser)
    add_section_flags(parser, InheritConfig, "rules of inheriting", {"layers": layers_of})
    return parser.parse_args(argv)


def layers_of(text: str) -> str | list[int]:
    """Converts `first`, `last` or a list such as `0,2,5-9`. Raises ArgumentTypeError for anything else."""
    if text in ("first", "last"):
        return text
    layers: list[int] = []
    for part in text.split(","):
        start, dash, stop = part.partition("-")
        if not start.isdecimal() or (dash and not stop.isdecimal()) or int(stop or start) < int(start):
            raise argparse.ArgumentTypeError(f"expected first, last, or layers such as 0,2,5-9, not {text!r}")
        layers += range(int(start), int(stop or start) + 1)
    return layers


@dataclass(frozen=True)
class Job:
    """A reference, and the run to make a model for."""

    reference: Reference
    config: RunConfig
    rules: InheritConfig
    sizes: ParallelSizes


def read_job(args: argparse.Namespace) -> Job:
    """Reads the reference and the configuration, whose section `inherit` holds where no flag says otherwise.

    Raises ConfigError when they do not fit, CheckpointError for a reference that is not whole.
    """
    from megatron.checkpointing.states.tensor_folder import is_hf_folder
    from megatron.growth.inheriting.inherit_checkpoint import Reference, require_tokenizer_of
    from megatron.growth.inheriting.inheriting_model import inheriting_model

    rules = read_section_flags(args, InheritConfig)
    if is_hf_folder(args.input_dir):
        if args.config_file is None:
            raise ConfigError(
                f"{args.input_dir} is a Hugging Face folder, and says nothing of the run. Give --config_file; "
                "convert_hf_to_neox.py --write-config makes one."
            )
        config = load_words(args.config_file).run
        reference, sizes = folder_reference(args.input_dir, config), parallel_sizes(config, args.ranks)
    else:
        rewriting = read_rewriting(args)
        reference, config, sizes = Reference.of(rewriting.source), rewriting.config, rewriting.sizes
    if args.config_file is None:
        model = inheriting_model(reference.model, rules, args.num_layers)
        return Job(reference, config.model_copy(update={"model": model, "grow": None}), rules, sizes)
    require_tokenizer_of(reference, config)
    if config.inherit is not None:
        rules = config.inherit.model_copy(update={name: getattr(rules, name) for name in rules.model_fields_set})
    if args.num_layers is not None:
        model = config.model.model_copy(update={"num_layers": args.num_layers})
        config = config.model_copy(update={"model": model})
    return Job(reference, config, rules, sizes)


def folder_reference(folder: Path, config: RunConfig) -> Reference:
    """Returns a Hugging Face folder as a reference. Raises what `FolderReader` does."""
    require("transformers", "inherit.py", install_extra("hf"))
    from megatron.checkpointing.states.write_states import RunHeader
    from megatron.growth.inheriting.inherit_checkpoint import Reference
    from megatron.hf.import_folder import FolderReader, model_of_folder

    model = model_of_folder(folder, config.model)
    reader = FolderReader(folder, config.model_copy(update={"model": model}))
    versions = {package: version(package) for package in ("torch", "transformers", "safetensors")}
    return Reference(str(folder), model, reader.vocab, reader.read, RunHeader.new(reader.vocab.actual, versions))


def measured(args: argparse.Namespace, job: Job, inheritance: Inheritance) -> str:
    """Says what the losses of both models are, or why they are not known."""
    data = job.config.data
    if args.data_path is None and args.text is None and data.data_path is None and not data.train_data_paths:
        return "Losses are not measured: no dataset is configured. --data_path PREFIX or --text FILE measures them."
    from megatron.growth.inheriting.measure_losses import measure_losses
    from tools.ckpts.measured_tokens import measured_tokens

    tokens = measured_tokens(args.data_path, args.text, job.config, inheritance.vocab)
    before, after = measure_losses(job.reference, inheritance, tokens)
    return f"On {tokens.numel():,} tokens the loss of the reference is {before:.4f}, and of the new model {after:.4f}."


if __name__ == "__main__":
    run_tool(main)
